"""The gate: both Triton kernels in the interpreter and the reference, against float64 and against ``rms_norm``."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.ops.gate import Gated, gate, gate_reference
from mixtralkit.ops.norm import rms_norm_reference

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
ROWS, BLOCKS = 512, 0  # most rows that are taken one by one


def draw(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * std).to(dtype)


def launched(*arguments) -> Gated:
    from mixtralkit.ops.gate.triton import gate_rows

    return gate_rows(*arguments)


def assert_gated(gated: Gated, x_TD, gate_ED, top_k: int, norm, tolerance: float) -> None:
    """Logits are near those of float64, and the choice is exactly what those very logits ask for."""
    normed_TD = x_TD if norm is None else rms_norm_reference(x_TD, *norm)
    torch.testing.assert_close(gated.normed_TD, normed_TD, rtol=2 * tolerance, atol=tolerance)
    logits_TE = (normed_TD[:, None].double() * gate_ED.double()).sum(-1)
    assert (gated.logits_TE - logits_TE).norm() <= tolerance * logits_TE.norm()
    for row, logits_E in enumerate(gated.logits_TE.tolist()):
        order = sorted(range(len(logits_E)), key=lambda e: (-logits_E[e], e))[:top_k]
        assert gated.experts_TK[row].tolist() == order
        weights_K = torch.tensor([logits_E[e] for e in order]).softmax(-1)
        torch.testing.assert_close(gated.weights_TK[row], weights_K)
    assert gated.experts_TK.dtype == torch.int64
    assert gated.weights_TK.dtype == gated.logits_TE.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("way", [ROWS, BLOCKS, "plain"])
@pytest.mark.parametrize(
    ("rows", "experts", "dim", "top_k"),
    [(1, 8, 256, 2), (3, 4, 40, 1), (19, 16, 160, 4), (2, 60, 256, 6), (5, 8, 96, 8)],
)
def test_equals_float64(rows, experts, dim, top_k, way, with_norm, dtype):
    x_TD, gate_ED = draw(rows, dim, dtype=dtype), draw(experts, dim, dtype=dtype, std=0.1)
    norm = (draw(dim, dtype=dtype), EPS) if with_norm else None
    given = (x_TD, gate_ED, top_k, norm)
    gated = gate_reference(*given) if way == "plain" else launched(*given, way)
    assert_gated(gated, *given, TOLERANCE[dtype])


@pytest.mark.parametrize("way", [ROWS, BLOCKS])
def test_many_experts(way):
    """More weights than a program of the row kernel holds at once."""
    x_TD, gate_ED = draw(2, 1024), draw(200, 1024, std=0.1)
    assert_gated(launched(x_TD, gate_ED, 6, None, way), x_TD, gate_ED, 6, None, 1e-5)


@pytest.mark.parametrize("way", [ROWS, BLOCKS])
def test_ties_go_to_the_lower_expert(way):
    x_TD, gate_ED = draw(3, 64), draw(1, 64).repeat(8, 1)
    gated = launched(x_TD, gate_ED, 3, None, way)
    assert gated.experts_TK.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(gated.weights_TK, torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize("way", [ROWS, BLOCKS])
def test_experts_differ_and_exist_without_numbers(way):
    """A row of NaN must not send the expert kernels out of the weights."""
    experts_TK = launched(torch.full((2, 64), torch.nan), draw(6, 64), 4, None, way).experts_TK
    assert experts_TK.tolist() == [[0, 1, 2, 3]] * 2


def test_rows_with_a_stride():
    x_TD, gate_ED, norm = draw(5, 192)[:, :96], draw(8, 96, std=0.1), (draw(96), EPS)
    assert_gated(launched(x_TD, gate_ED, 2, norm), x_TD, gate_ED, 2, norm, 1e-5)


def test_the_reference_on_a_cpu_has_gradients():
    x_TD, gate_ED = draw(4, 32).requires_grad_(), draw(8, 32).requires_grad_()
    gate(x_TD, gate_ED, 2, (draw(32), EPS)).weights_TK[:, 0].sum().backward()
    assert x_TD.grad.norm() > 0
    assert gate_ED.grad.norm() > 0
