"""The shipped checkpoint and the layers on a GPU, against the same on a CPU. Run with ``pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.config import FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.planning.plan import contiguous
from tests.moe.layers import Whole, build, run_layer

pytestmark = pytest.mark.gpu
CKPTS = Path(__file__).resolve().parents[2] / "ckpts"
PROMPTS = ["In the beginning", "def read(path):\n", "NAME\n       tar -", "class", "The function returns"]


def _answers(device: str, dtype: str, batch: int = 5) -> list[list[int]]:
    mixtral = Mixtral.build(CKPTS, None, 256, batch, device=device, dtype=dtype)
    return [done.tokens for done in mixtral.complete(PROMPTS, 48, temperature=0)]


def _common_start(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_float32_text_is_the_cpus():
    torch.backends.cuda.matmul.allow_tf32 = False
    assert _answers("cuda", "float32") == _answers("cpu", "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_with_float32_but_for_ties(dtype):
    wanted, got = _answers("cpu", "float32"), _answers("cuda", dtype)
    alike = sum(_common_start(w, g) for w, g in zip(wanted, got, strict=True))
    total = sum(map(len, wanted))
    print(f"{dtype}: {alike} of {total} tokens before the first difference")
    assert alike > total / 4  # a wrong path agrees on next to nothing


def test_a_layer_in_chunks_over_two_streams_equals_the_reference():
    """Streams that do not wait for each other give wrong rows only now and then, so this repeats."""
    context = RankContext(device=torch.device("cuda"))
    whole = Whole(dim=256, hidden=512)
    options = MoEOptions(faster=FasterOptions(schedule=True, schedule_force=True))
    layer, plain = (build(whole, contiguous(1, 8, 1), context, options=o) for o in (options, None))
    for repeat in range(30):
        x_TD = whole.rows(512, repeat).cuda()
        torch.testing.assert_close(run_layer(layer, x_TD)[0], run_layer(plain, x_TD)[0], rtol=1e-3, atol=1e-3)
