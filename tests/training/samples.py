"""A small corpus, its tokens and a small model, for the training tests."""

from __future__ import annotations

from functools import cache

from mixtralkit.config import ModelConfig
from mixtralkit.training.corpus import Document
from mixtralkit.training.tokens import TokenSet, train_tokenizer

_WORDS = "the gate sends every row to two experts and each expert returns its part of the sum\n"


def small_corpus() -> dict[str, dict[str, list[Document]]]:
    prose = "".join(_WORDS[i % 7 :] + f"row {i} of {i * 7}\n" for i in range(120)).encode()
    code = "".join(f"def f{i}(x):\n    if x > {i}:\n        return x\n\n" for i in range(120)).encode()
    chat = [Document(f"chat/{i}", turns=(f"What is row {i}?", f"Row {i} of the sum.")) for i in range(60)]
    return {
        "chat": {"train": chat[:50], "heldout": chat[50:]},
        "code": {"train": [Document("code/a", code)], "heldout": [Document("code/b", code[:800])]},
        "prose": {"train": [Document("prose/a", prose)], "heldout": [Document("prose/b", prose[:800])]},
    }


@cache
def small_tokens() -> TokenSet:
    corpus = small_corpus()
    return TokenSet.encode(corpus, train_tokenizer(corpus, 340))


def small_config() -> ModelConfig:
    return ModelConfig(
        dim=32, n_layers=2, head_dim=12, hidden_dim=24, n_heads=4, n_kv_heads=2, vocab_size=340,
        max_seq_len=64, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
