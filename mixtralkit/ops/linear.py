"""A product with a weight matrix, with the norm in front of it and the residual behind it.

Few rows (a decode step) cost what reading the weights costs: Triton kernels that keep the memory busy, also while the
kernel in front of them ends. More rows are left to the library's product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixtralkit.ops.norm import rms_norm, rms_norm_plain
from mixtralkit.ops.runtime import runs_triton

MOST_ROWS = 64  # above, the library's product was the faster on every shape measured


def linear(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x · wᵀ [+ residual], summed in float32 on a GPU: [T, O].

    Args:
        norm: (weight_I, eps): ``rms_norm`` of x comes first, rounded as it rounds.
        residual_TO: added before the sum is rounded.
        out: where the result goes; None takes new memory.
        out_dtype: of the result; None means that of ``out``, else of ``x_TI``.
    """
    assert x_TI.shape[1] == w_OI.shape[1]
    assert out is None or out_dtype in (None, out.dtype)
    dtype = (out_dtype or x_TI.dtype) if out is None else out.dtype
    wants_gradient = w_OI.requires_grad and torch.is_grad_enabled()
    if not runs_triton(x_TI) or wants_gradient or x_TI.dtype != w_OI.dtype or 0 in (*x_TI.shape, w_OI.shape[0]):
        return linear_plain(x_TI, w_OI, norm, residual_TO, out, dtype)
    if x_TI.shape[0] > MOST_ROWS:
        return linear_library(x_TI, w_OI, norm, residual_TO, out, dtype)
    from mixtralkit.ops.linear_triton import linear_few

    return linear_few(x_TI, w_OI, norm, residual_TO, out, dtype)


def linear_plain(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The twin of ``linear``, with gradients; rounds the product to the dtype of x before what follows."""
    y_TO = F.linear(x_TI if norm is None else rms_norm_plain(x_TI, *norm), w_OI)
    if residual_TO is not None:
        y_TO = y_TO + residual_TO
    if out is not None:
        return out.copy_(y_TO)
    return y_TO if out_dtype is None else y_TO.to(out_dtype)


def linear_library(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    residual_TO: torch.Tensor | None,
    out: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``linear`` by the GPU library's product: our norm in front, the residual inside, one rounding."""
    if norm is not None:
        x_TI = rms_norm(x_TI, *norm)
    w_IO, other = w_OI.t(), {} if dtype == x_TI.dtype else {"out_dtype": dtype}
    if out is not None:
        other["out"] = out
    if residual_TO is None:
        return torch.mm(x_TI, w_IO, **other)
    return torch.addmm(residual_TO.to(dtype), x_TI, w_IO, **other)
