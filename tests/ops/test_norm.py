"""RMSNorm: the Triton kernels in the interpreter and the reference, against float64."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.ops.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

SHAPES = [(1, 256), (3, 160), (5, 40), (2, 1024)]
EPS = 1e-5


def in_float64(x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    x = x_TD.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_D.double()


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_reference_is_the_formula(dtype, tolerance):
    x_TD, weight_D = draw(7, 160, dtype=dtype), draw(160, dtype=dtype)
    torch.testing.assert_close(
        rms_norm(x_TD, weight_D, EPS).double(), in_float64(x_TD, weight_D), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(shape, dtype):
    from mixtralkit.ops.norm.triton import add_rms_norm_rows, rms_norm_rows

    x_TD, y_TD, weight_D = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[1], dtype=dtype)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    torch.testing.assert_close(rms_norm_rows(x_TD, weight_D, EPS), rms_norm_reference(x_TD, weight_D, EPS), **tolerance)
    sum_TD, normed_TD = add_rms_norm_rows(x_TD, y_TD, weight_D, EPS)
    expected_sum_TD, expected_TD = add_rms_norm_reference(x_TD, y_TD, weight_D, EPS)
    assert torch.equal(sum_TD, expected_sum_TD)
    torch.testing.assert_close(normed_TD, expected_TD, **tolerance)


def test_kernel_takes_strided_rows_and_leading_dimensions():
    from mixtralkit.ops.norm.triton import rms_norm_rows

    wide_TD, weight_D = draw(4, 96, dtype=torch.float32), draw(64, dtype=torch.float32)
    torch.testing.assert_close(
        rms_norm_rows(wide_TD[:, :64], weight_D, EPS), rms_norm_reference(wide_TD[:, :64], weight_D, EPS)
    )
    x_BTD = draw(2, 3, 64, dtype=torch.float32)
    torch.testing.assert_close(rms_norm_rows(x_BTD, weight_D, EPS), rms_norm_reference(x_BTD, weight_D, EPS))


def test_no_rows():
    empty_TD, weight_D = torch.empty(0, 16), torch.ones(16)
    assert rms_norm(empty_TD, weight_D, EPS).shape == (0, 16)
    assert [x.shape for x in add_rms_norm(empty_TD, empty_TD, weight_D, EPS)] == [(0, 16), (0, 16)]


def test_gradients_are_kept():
    weight_D = draw(16, dtype=torch.float32).requires_grad_()
    x_TD = draw(3, 16, dtype=torch.float32).requires_grad_()
    rms_norm(x_TD, weight_D, EPS).square().sum().backward()
    assert x_TD.grad.abs().sum() > 0
    assert weight_D.grad.abs().sum() > 0
