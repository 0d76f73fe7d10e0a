"""The product by the GPU's library."""

from __future__ import annotations

import torch

from mixtralkit.ops.norm import rms_norm

MOST_PACKED_ROWS = 512  # above, packed weights are unpacked for this product


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
