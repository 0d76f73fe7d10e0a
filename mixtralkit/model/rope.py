"""Rotary position embedding (Su et al., 2021) on neighbouring pairs of features, as Mistral's weights want it."""

from __future__ import annotations

import torch


def rotations(positions_T: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles: float32 [T, 1, C/2] each."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles = positions_T.float()[:, None, None] / theta**exponents
    return angles.cos(), angles.sin()


def rotate(x_THC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns features (2i, 2i+1) of every head by angle i: float32 inside, the dtype of ``x_THC`` outside."""
    even, odd = x_THC.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x_THC)
