"""What the evaluation's tests share: a small random model with its tokenizer, and the slow way to score a sequence."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mixtralkit import Mixtral
from mixtralkit.distributed import RankContext
from mixtralkit.engine.tokenizer import Tokenizer
from tests.engine.parts import engine_config, make_model, make_tokenizer

MAX_SEQ_LEN = 96


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return make_tokenizer(Path(folder))


def make_mixtral(
    context: RankContext,
    attention: str = "dp",
    max_batch_size: int = 4,
    sharpness: float = 4.0,
    end_scale: float = 1.0,
) -> Mixtral:
    """A random model; ``sharpness`` scales its logits, and a larger ``end_scale`` makes the end token likely.

    At the default sharpness the likeliest token has anything from a tenth to all of the probability.
    """
    config = engine_config(max_batch_size=max_batch_size, max_seq_len=MAX_SEQ_LEN)
    model = make_model(context, config, attention)
    first, stop = model.layout.vocab
    with torch.no_grad():
        weight_VD = model.named_tensors()["output.weight"].mul_(sharpness)
        if first <= tokenizer().eos_id < stop:
            weight_VD[tokenizer().eos_id - first] *= end_scale
    return Mixtral.from_parts(model, tokenizer())


def slow_logprobs(mixtral: Mixtral, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """(log P(continuation | context), whether each token is the likeliest), by one forward pass over one sequence."""
    tokens = torch.tensor([[*context, *continuation]])
    logits_TV = mixtral.model.forward(tokens, 0)[0, len(context) - 1 : -1]
    wanted_T = torch.tensor(list(continuation))
    logprobs_T = logits_TV.double().log_softmax(-1).gather(1, wanted_T[:, None])[:, 0]
    return float(logprobs_T.sum()), bool((logits_TV.argmax(-1) == wanted_T).all())
