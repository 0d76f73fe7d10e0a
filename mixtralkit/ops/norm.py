"""Root-mean-square normalisation of rows, alone or of a sum that is wanted as well."""

from __future__ import annotations

import torch

from mixtralkit.ops.runtime import runs_triton


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich, 2019), in the dtype of ``x_TD``.

    Computed in float32, rounded to the dtype before the product with the weight and after it.
    """
    if not _takes(x_TD, weight_D):
        return rms_norm_plain(x_TD, weight_D, eps)
    from mixtralkit.ops.norm_triton import rms_norm_rows

    return rms_norm_rows(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y rounded to the dtype, ``rms_norm`` of that)."""
    if not _takes(x_TD, weight_D) or x_TD.dtype != y_TD.dtype:
        return add_rms_norm_plain(x_TD, y_TD, weight_D, eps)
    from mixtralkit.ops.norm_triton import add_rms_norm_rows

    return add_rms_norm_rows(x_TD, y_TD, weight_D, eps)


def rms_norm_plain(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The twin of ``rms_norm``, with gradients."""
    x_f32 = x_TD.float()
    normed = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.type_as(x_TD) * weight_D


def add_rms_norm_plain(
    x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ``add_rms_norm``, with gradients."""
    sum_TD = x_TD + y_TD
    return sum_TD, rms_norm_plain(sum_TD, weight_D, eps)


def _takes(x_TD: torch.Tensor, weight_D: torch.Tensor) -> bool:
    wants_gradient = weight_D.requires_grad and torch.is_grad_enabled()
    return runs_triton(x_TD) and not wants_gradient and x_TD.numel() > 0 and x_TD.dtype == weight_D.dtype
