"""A rank's experts: rows grouped by expert, one product a projection, weighted sum back in row order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mixtralkit.ops.experts import expert_sum


@dataclass(frozen=True)
class RoutedRows:
    """Rows at the rank that computes them.

    Attributes:
        x_RD: the rows.
        slots_RK: int64 slot of this rank's expert for each choice of the row, -1 where another rank computes it.
        weights_RK: float32 weight of each choice.
        likely_rows, out_RD: as ``expert_sum`` takes them.
    """

    x_RD: torch.Tensor
    slots_RK: torch.Tensor
    weights_RK: torch.Tensor
    likely_rows: int | None = None
    out_RD: torch.Tensor | None = None


class Experts(nn.Module):
    """SwiGLU experts of this rank: ``w2 · (silu(w1 · x) * (w3 · x))``, with w1 above w3 in ``w13``.

    F may be a part of the expert's hidden width; the sum over the ranks that hold the other parts is the caller's.
    """

    def __init__(self, slots: int, dim: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        empty = {"dtype": dtype, "device": device}
        self.w13 = nn.Parameter(torch.empty(slots, 2 * hidden, dim, **empty), requires_grad=False)
        self.w2 = nn.Parameter(torch.empty(slots, dim, hidden, **empty), requires_grad=False)

    def forward(self, rows: RoutedRows) -> torch.Tensor:
        """One weighted partial sum a row: y_RD = Σ_k weight · expert(x), zero where no choice is this rank's."""
        return weighted_expert_sum(rows, self.w13, self.w2)


def weighted_expert_sum(rows: RoutedRows, w13_SGD: torch.Tensor, w2_SDF: torch.Tensor) -> torch.Tensor:
    """Σ_k weights_RK · swiglu(x_RD; slots_RK), in the dtype of ``x_RD``, summed in float32."""
    return expert_sum(
        rows.x_RD, rows.slots_RK, rows.weights_RK, w13_SGD, w2_SDF, out_RD=rows.out_RD, likely_rows=rows.likely_rows
    )
