"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import nn

from mixtralkit.ops.hidden import Norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32 (Zhang & Sennrich, 2019); ``ops.norm`` does it."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype, device=device), requires_grad=False)

    @property
    def of(self) -> Norm:
        """(weight_D, eps), as operations take it."""
        return self.weight, self.eps
