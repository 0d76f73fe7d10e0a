"""RMSNorm in Triton: a program holds a whole row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.runtime import overlaps_launches


def rms_norm_rows(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``norm.rms_norm`` on a GPU; any number of leading dimensions."""
    x_TD, normed_TD = _rows(x_TD), torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _launch(x_TD, None, weight_D, None, normed_TD, eps)
    return normed_TD


def add_rms_norm_rows(
    x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``norm.add_rms_norm`` on a GPU."""
    assert x_TD.shape == y_TD.shape
    sum_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    normed_TD = torch.empty_like(sum_TD)
    _launch(_rows(x_TD), _rows(y_TD), weight_D, sum_TD, normed_TD, eps)
    return sum_TD, normed_TD


def _rows(x_TD: torch.Tensor) -> torch.Tensor:
    """The tensor as rows one stride apart: itself where it can be, else a copy."""
    return x_TD if x_TD.dim() == 2 and x_TD.stride(1) == 1 else x_TD.contiguous().flatten(0, -2)


def _launch(x_TD, y_TD, weight_D, sum_TD, normed_TD, eps: float) -> None:
    dim = x_TD.shape[1]
    block_d = triton.next_power_of_2(dim)
    overlaps = overlaps_launches(x_TD.device)
    _norm_kernel[(x_TD.shape[0],)](
        x_TD,
        y_TD,
        weight_D,
        sum_TD,
        normed_TD,
        dim,
        x_TD.stride(0),
        0 if y_TD is None else y_TD.stride(0),
        eps,
        ADDS=y_TD is not None,
        BLOCK_D=block_d,
        PDL=overlaps,
        num_warps=min(max(block_d // 512, 1), 16),
        **({"launch_pdl": True} if overlaps else {}),
    )


@triton.jit
def _norm_kernel(
    x, y, weight, summed, normed, dim, x_stride, y_stride, eps,
    ADDS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK_D)
    inside_D = d_D < dim
    weight_D = tl.load(weight + d_D, inside_D, 0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_D = tl.load(x + row * x_stride + d_D, inside_D, 0.0)
    if ADDS:
        y_D = tl.load(y + row * y_stride + d_D, inside_D, 0.0)
        x_D = (x_D.to(tl.float32) + y_D.to(tl.float32)).to(x_D.dtype)
        tl.store(summed + row * dim + d_D, x_D, inside_D)
    tl.store(normed + row * dim + d_D, normalised(x_D, weight_D, dim, eps), inside_D)


@triton.jit
def normalised(x_D, weight_D, dim, eps):
    """RMSNorm of a row that a program holds, zeros where the block is wider than ``dim``; rounded as ``rms_norm``."""
    x_f32 = x_D.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_f32 * x_f32, 0) / dim + eps)
    rounded_D = (x_f32 * scale).to(x_D.dtype)
    return (rounded_D.to(tl.float32) * weight_D.to(tl.float32)).to(x_D.dtype)
