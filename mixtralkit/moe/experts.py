"""A rank's experts of one layer: their weights, and the weighted sum of rows over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.weights import PLAIN, ExpertWeights, PackedWeight
from mixtralkit.ops.experts import expert_sum

Matrices = tuple[torch.Tensor | PackedWeight, torch.Tensor | PackedWeight]  # w1 above w3 of every slot, and w2


class Experts(nn.Module):
    """SwiGLU experts: ``w2 · (silu(w1 · x) * (w3 · x))``, with w1 above w3 in ``w13``.

    F may be a part of the expert's hidden width; the sum over the ranks that hold the other parts is the caller's.

    Parameters are ``w13`` [S, 2F, D] and ``w2`` [S, D, F], the weights of the plan's slots, or the parts of these in
    another format (``layout.RankLayout``).

    Attributes:
        matrices: both, in whatever format.
        storage: the whole memory that these lie in, w13 and w2 of its P places, and int64 [S'] the place in it of every
            slot that rows may name, copies of other ranks' experts too; None where slots are those of ``w13``.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        storage: tuple[Sequence[torch.Tensor], torch.Tensor] | None = None,
        weights: ExpertWeights = PLAIN,
        columns: tuple[int, int] | None = None,
    ) -> None:
        """``tensors`` of the parameters in order; ``columns`` D and F, needed where the format is not plain."""
        super().__init__()
        self.weights, self.columns = weights, columns
        self.names = [name for matrix in ("w13", "w2") for name, _ in weights.parameters(matrix)]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.storage = None
        if storage is not None:
            self.store_in(*storage)

    def store_in(self, tensors: Sequence[torch.Tensor], places_S: torch.Tensor) -> None:
        """The memory that the parameters lie in, and the places of the slots there."""
        self.storage = (*matrices_of(self.weights, self.columns, tensors), places_S)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The parameters."""
        return [getattr(self, name) for name in self.names]

    @property
    def matrices(self) -> Matrices:
        return matrices_of(self.weights, self.columns, self.tensors)

    @property
    def slots(self) -> int:
        """Experts that are here by the plan."""
        return len(self.tensors[0])

    @property
    def trains(self) -> bool:
        """Whether gradients are wanted now."""
        return torch.is_grad_enabled() and self.tensors[0].requires_grad

    def forward(self, rows: RoutedRows) -> torch.Tensor:
        """One weighted partial sum a row: y_RD = Σ_k weight · expert(x) [+ residual], zero where nothing is here."""
        if self.storage is None or self.trains:
            return run_experts(rows, *self.matrices)
        return run_experts(rows, *self.storage, likely_slots=self.slots)  # few batches have a use for copies


def matrices_of(weights: ExpertWeights, columns: tuple[int, int] | None, tensors: Sequence[torch.Tensor]) -> Matrices:
    """w13 and w2 of their parts; ``columns`` as in ``Experts``."""
    if weights.is_plain:
        return tuple(tensors)
    parts = len(weights.parts)
    return (
        PackedWeight(weights, columns[0], tuple(tensors[:parts]), stacked=2),
        PackedWeight(weights, columns[1], tuple(tensors[parts:])),
    )


def run_experts(
    rows: RoutedRows,
    w13_SGD: torch.Tensor | PackedWeight,
    w2_SDF: torch.Tensor | PackedWeight,
    storage_S: torch.Tensor | None = None,
    likely_slots: int | None = None,
) -> torch.Tensor:
    """``ops.experts.expert_sum`` of rows as a dispatcher gives them."""
    return expert_sum(
        rows.x_RD, rows.slots_RK, rows.weights_RK, w13_SGD, w2_SDF, rows.residual_RD, rows.out_RD, rows.likely_rows,
        storage_S, likely_slots,
    )  # fmt: skip
