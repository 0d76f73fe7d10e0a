"""A rank's experts of one layer: their weights, and the weighted sum of rows over them."""

from __future__ import annotations

import torch
from torch import nn

from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.ops.experts import expert_sum


class Experts(nn.Module):
    """SwiGLU experts: ``w2 · (silu(w1 · x) * (w3 · x))``, with w1 above w3 in ``w13``.

    F may be a part of the expert's hidden width; the sum over the ranks that hold the other parts is the caller's.

    Attributes:
        w13, w2: [S, 2F, D] and [S, D, F], the weights of the plan's slots.
        storage: the whole memory that these lie in, [P, 2F, D] and [P, D, F], and int64 [S'] the place in it of every
            slot that rows may name, copies of other ranks' experts too; None where slots are those of ``w13``.
    """

    def __init__(
        self,
        w13_SGD: torch.Tensor,
        w2_SDF: torch.Tensor,
        storage: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.w13, self.w2 = (nn.Parameter(w, requires_grad=False) for w in (w13_SGD, w2_SDF))
        self.storage = storage

    def forward(self, rows: RoutedRows) -> torch.Tensor:
        """One weighted partial sum a row: y_RD = Σ_k weight · expert(x) [+ residual], zero where nothing is here."""
        trains = torch.is_grad_enabled() and self.w13.requires_grad
        if self.storage is None or trains:
            return run_experts(rows, self.w13, self.w2)
        return run_experts(rows, *self.storage, likely_slots=len(self.w13))  # few batches have a use for copies


def run_experts(
    rows: RoutedRows,
    w13_SGD: torch.Tensor,
    w2_SDF: torch.Tensor,
    storage_S: torch.Tensor | None = None,
    likely_slots: int | None = None,
) -> torch.Tensor:
    """``ops.experts.expert_sum`` of rows as a dispatcher gives them."""
    return expert_sum(
        rows.x_RD, rows.slots_RK, rows.weights_RK, w13_SGD, w2_SDF, rows.residual_RD, rows.out_RD, rows.likely_rows,
        storage_S, likely_slots,
    )  # fmt: skip
