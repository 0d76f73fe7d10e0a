"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import nn

from mixtralkit.ops.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TD, self.weight, self.eps)

    def after_sum(self, x_TD: torch.Tensor, y_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + y, its norm)."""
        return add_rms_norm(x_TD, y_TD, self.weight, self.eps)
