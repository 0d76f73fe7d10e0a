"""Folders of tokenizers with side files, as fine-tunes have them, and what transformers makes of them."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import sentencepiece

from tests.engine.parts import TEXT, tokenizer_bytes

os.environ["HF_HUB_OFFLINE"] = "1"

ALPHABET = [
    *"abcdefgh  \n\tTINS[]/<>|_é日😀",
    "<|im_start|>",
    "<|im_end|>",
    "the ",
    "▁",
    "\u00a0",
    "  ",
    "[INST]",
    "def",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_folder(folder: Path, model: bytes | None = None, **files: Any) -> Path:
    """A folder with ``tokenizer.model`` (none for ``b""``), ``config.json`` and JSON files, ``name=content``."""
    folder.mkdir(parents=True, exist_ok=True)
    if model != b"":
        (folder / "tokenizer.model").write_bytes(tokenizer_bytes() if model is None else model)
    for name, content in {"config": {"model_type": "mixtral"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def trained(**more: Any) -> bytes:
    """A sentencepiece model as ``tokenizer_bytes`` makes it, with other options of the trainer."""
    model = io.BytesIO()
    options = {
        "vocab_size": 384, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "minloglevel": 2, **more,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT.splitlines()), model_writer=model, **options)
    return model.getvalue()


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(1, 24))) for _ in range(count)]


def theirs(folder: Path):
    """transformers' tokenizer of the folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
