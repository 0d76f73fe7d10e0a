"""The norms in plain torch, with gradients."""

from __future__ import annotations

import torch


def rms_norm_reference(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The reference of ``rms_norm``, with gradients."""
    x_f32 = x_TD.float()
    normed = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.type_as(x_TD) * weight_D


def add_rms_norm_reference(
    x_TD: torch.Tensor, y_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of ``add_rms_norm``, with gradients."""
    sum_TD = x_TD + y_TD
    return sum_TD, rms_norm_reference(sum_TD, weight_D, eps)
