"""Sums over ranks through the group."""

from __future__ import annotations

import torch

from mixtralkit.distributed import RankContext


def add_norm_reference(
    context: RankContext, partial_TD: torch.Tensor, residual_TD: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of ``RowReducer.add_norm``; the group's backend says how sums of half precision are rounded."""
    x_TD = residual_TD + context.all_reduce(partial_TD)
    x_f32 = x_TD.float()
    normed_TD = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    return x_TD, normed_TD.type_as(x_TD) * norm_weight_D
