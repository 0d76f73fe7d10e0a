"""The product in plain torch, with gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixtralkit.moe.weights import PackedWeight
from mixtralkit.ops.norm.reference import rms_norm_reference

TILE = 1024  # outputs of a packed matrix that are numbers at a time


def linear_reference(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor | PackedWeight,
    norm: tuple[torch.Tensor, float] | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The reference of ``linear``, with gradients; rounds the product to the dtype of x before what follows."""
    y_TO = multiply(x_TI if norm is None else rms_norm_reference(x_TI, *norm), w_OI)
    if residual_TO is not None:
        y_TO = y_TO + residual_TO
    if out is not None:
        return out.copy_(y_TO)
    return y_TO if out_dtype is None else y_TO.to(out_dtype)


def multiply(x_TI: torch.Tensor, w_OI: torch.Tensor | PackedWeight) -> torch.Tensor:
    """x · wᵀ in the dtype of x; of packed weights a tile at a time, so that no matrix is ever there as numbers."""
    if isinstance(w_OI, torch.Tensor):
        return F.linear(x_TI, w_OI)
    tiles = [
        matrix.take(first, min(first + TILE, len(matrix))) for matrix in w_OI.unstacked()
        for first in range(0, len(matrix), TILE)
    ]  # fmt: skip
    return torch.cat([F.linear(x_TI, tile.float().to(x_TI.dtype)) for tile in tiles], dim=1)
