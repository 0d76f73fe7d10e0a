"""Rotary position embedding (Su et al., 2021) on neighbouring pairs of features, as Mistral's weights want it."""

from __future__ import annotations

import torch

from mixtralkit.ops.attention import rotate

__all__ = ["rope_table", "rotate", "rotations"]


def rotations(positions_T: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles: float32 [T, 1, C/2] each."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles = positions_T.float()[:, None, None] / theta**exponents
    return angles.cos(), angles.sin()


def rope_table(max_seq_len: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """``rotations`` of every position below ``max_seq_len`` as (cos, sin): float32 [S, C/2, 2]."""
    positions_S = torch.arange(max_seq_len, device=device)
    return torch.stack(rotations(positions_S, head_dim, theta), dim=-1).squeeze(1)
