"""Root-mean-square normalisation of rows, alone or of a sum that is wanted as well."""

from __future__ import annotations

import torch

from mixtralkit.ops.norm.reference import add_rms_norm_reference, rms_norm_reference
from mixtralkit.ops.runtime import runs_triton


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich, 2019), in the dtype of ``x_TD``.

    Computed in float32, rounded to the dtype before the product with the weight and after it.
    """
    if not runs_triton(x_TD, weight_D):
        return rms_norm_reference(x_TD, weight_D, eps)
    from mixtralkit.ops.norm.triton import rms_norm_rows

    return rms_norm_rows(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y rounded to the dtype, ``rms_norm`` of that)."""
    if not runs_triton(x_TD, y_TD, weight_D):
        return add_rms_norm_reference(x_TD, y_TD, weight_D, eps)
    from mixtralkit.ops.norm.triton import add_rms_norm_rows

    return add_rms_norm_rows(x_TD, y_TD, weight_D, eps)
