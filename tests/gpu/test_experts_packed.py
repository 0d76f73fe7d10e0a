"""Experts in fewer bits in bfloat16, which the interpreter cannot do, on a GPU."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.moe.weights import FORMATS, PackedWeight
from mixtralkit.ops.experts import SMALL_BATCH, expert_sum, expert_sum_reference

pytestmark = pytest.mark.gpu
SLOTS, WIDTH, HIDDEN = 8, 1024, 1792


def matrices(name: str) -> tuple[PackedWeight, PackedWeight]:
    generator = torch.Generator("cuda").manual_seed(0)
    w13 = torch.randn(SLOTS, 2, HIDDEN, WIDTH, device="cuda", generator=generator) * WIDTH**-0.5
    w2 = torch.randn(SLOTS, WIDTH, HIDDEN, device="cuda", generator=generator) * HIDDEN**-0.5
    up, down = FORMATS[name].quantize(w13), FORMATS[name].quantize(w2)
    return PackedWeight(up.weights, WIDTH, tuple(t.flatten(1, 2) for t in up.tensors), stacked=2), down


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_layers_of_any_number_of_rows(name):
    """One row, few, sorted ones, and so many that the weights are unpacked; also from a graph."""
    generator, packed = torch.Generator("cuda").manual_seed(1), matrices(name)
    for rows in (1, 9, 40, 200, 2000):
        x_RD = torch.randn(rows, WIDTH, device="cuda", generator=generator).bfloat16()
        slots_RK = torch.rand(rows, SLOTS, device="cuda", generator=generator).topk(2).indices
        weights_RK = torch.rand(rows, 2, device="cuda", generator=generator)
        expected = expert_sum_reference(x_RD.float(), slots_RK, weights_RK, *(m.float() for m in packed))
        found = expert_sum(x_RD, slots_RK, weights_RK, *packed)
        in_fp8 = (
            name in ("fp8", "fp8:channel", "fp8:tensor") and rows > SMALL_BATCH
        )  # rows too, of three bits after the first
        assert (found.float() - expected).norm() <= (6e-2 if in_fp8 else 1e-2) * expected.norm(), rows
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = expert_sum(x_RD, slots_RK, weights_RK, *packed)
        graph.replay()
        assert again.equal(found), rows
