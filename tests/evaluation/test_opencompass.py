"""What OpenCompass's wrapper of MixtralKit calls (``opencompass/models/mixtral.py``), imitated call by call."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.functional import cross_entropy

from mixtralkit.distributed import RankContext
from tests.engine.parts import engine_config, make_checkpoint, make_model
from tests.model.test_hugging_face import hugging_face, oracle_greedy
from tests.ranks import run_ranks

TEXTS = ["Who are you?", "In the beginning God created the heaven", "1", "def add(first, second):"]
LENGTH, NEW_TOKENS = 64, 8
LONG = "And the earth was without form, and void. " * 6


class Wrapper:
    """Imports where OpenCompass imports, keywords as it writes them, positional arguments where it gives them."""

    def __init__(self, path: str, max_seq_len: int, max_batch_size: int, tokenizer_path: str, num_gpus: int) -> None:
        from mixtralkit.mixtral import Mixtral

        self.generator = Mixtral.build(
            ckpt_dir=path,
            tokenizer_path=tokenizer_path,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            num_gpus=num_gpus,
        )
        self.tokenizer, self.model = self.generator.tokenizer, self.generator.model

    def generate(self, inputs: list[str], max_out_len: int) -> list[str]:
        """Greedy answers; a prompt keeps its last ``max_seq_len`` tokens, which leaves no room for an answer."""
        longest = self.model.params.max_seq_len
        prompts = [self.tokenizer.encode(text, True, False)[-longest:] for text in inputs]
        answers, _ = self.generator.generate(prompt_tokens=prompts, max_gen_len=max_out_len, temperature=0)
        return [self.tokenizer.decode(ids) for ids in answers]

    def get_ppl(self, inputs: list[str]) -> list[float]:
        """Mean nats per token of each text: one forward pass over all, padded with zeros at the right."""
        params = self.model.params
        assert len(inputs) <= params.max_batch_size
        encoded = [self.tokenizer.encode(text, True, False) for text in inputs]
        width = min(params.max_seq_len, max(map(len, encoded)))
        tokens = torch.zeros((len(inputs), width), dtype=torch.long)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: min(width, len(ids))] = torch.tensor(ids[-width:])
        logits = self.model.forward(tokens, 0)[..., :-1, :].contiguous().float()
        losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none", ignore_index=0)
        return (losses.view(len(inputs), -1).sum(-1) / (tokens != 0).sum(-1)).tolist()

    def get_token_len(self, prompt: str) -> int:
        return len(self.tokenizer.encode(prompt, True, True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), engine_config()))


def build(folder: str, num_gpus: int = 1) -> Wrapper:
    """On the CPU in float32, also where there is a GPU: the wrapper cannot ask for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return Wrapper(folder, LENGTH, len(TEXTS), f"{folder}/tokenizer.model", num_gpus)


@pytest.fixture(scope="module")
def wrapper(folder) -> Wrapper:
    return build(folder)


@pytest.fixture(scope="module")
def oracle(wrapper) -> tuple[list[str], list[float]]:
    """Answers and nats per token by transformers, text by text and without padding."""
    theirs = hugging_face(make_model(RankContext(), engine_config()))
    prompts = [wrapper.tokenizer.encode(text) for text in TEXTS]
    answers, losses = [], []
    for ids, answer in zip(prompts, oracle_greedy(theirs, prompts, NEW_TOKENS), strict=True):
        eos = wrapper.tokenizer.eos_id
        answers.append(wrapper.tokenizer.decode(answer[: answer.index(eos)] if eos in answer else answer))
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, :-1]
        losses.append(float(cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")) / len(ids))
    return answers, losses


def test_greedy_answers_and_perplexities_are_those_of_transformers(wrapper, oracle):
    answers, losses = oracle
    assert len(set(answers)) == len(TEXTS)
    assert wrapper.generate(TEXTS, NEW_TOKENS) == answers
    assert wrapper.get_ppl(TEXTS) == pytest.approx(losses, abs=1e-4)
    assert wrapper.get_ppl(TEXTS[2:3]) == pytest.approx(losses[2:3], abs=1e-4)


def test_texts_longer_than_the_model_are_answered_and_scored(wrapper):
    assert wrapper.get_token_len(LONG) > LENGTH
    short, cut = wrapper.generate([TEXTS[0], LONG], NEW_TOKENS)
    assert short == wrapper.generate(TEXTS[:1], NEW_TOKENS)[0]
    assert cut == ""
    scores = wrapper.get_ppl([LONG, TEXTS[0]])
    assert scores[1] == pytest.approx(wrapper.get_ppl(TEXTS[:1])[0], abs=1e-4)
    assert torch.tensor(scores).isfinite().all()


def test_the_tokenizer_alone(folder, wrapper):
    from mixtralkit.layers import Tokenizer

    alone = Tokenizer(f"{folder}/tokenizer.model")
    ids = alone.encode(TEXTS[0], True, True)
    assert (ids[0], ids[-1]) == (alone.bos_id, alone.eos_id)
    assert wrapper.get_token_len(TEXTS[0]) == len(ids)
    assert alone.decode(ids) == TEXTS[0]


def _on_ranks(context: RankContext, folder: str) -> tuple[list[str], list[float]]:
    os.environ.update(RANK=str(context.rank), WORLD_SIZE=str(context.world_size))
    wrapper = build(folder, context.world_size)
    return wrapper.generate(TEXTS, NEW_TOKENS), wrapper.get_ppl(TEXTS)


def test_every_rank_of_two_gets_the_same(folder, oracle):
    for answers, losses in run_ranks(_on_ranks, 2, folder):
        assert answers == oracle[0]
        assert losses == pytest.approx(oracle[1], abs=1e-4)


def test_more_gpus_than_ranks_says_how_to_start(folder):
    """OpenCompass starts one process unless its ``run_cfg`` has ``num_procs`` as large as ``num_gpus``."""
    with pytest.raises(ValueError, match=r"num_gpus \(2\) must equal the number of ranks \(1\); start with: torchrun"):
        build(folder, num_gpus=2)
