"""A rank's experts of one layer: their weights, and the weighted sum of rows over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from mixtralkit.layout import SlotGroup
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.weights import PLAIN, ExpertWeights, PackedWeight
from mixtralkit.ops.experts import expert_sum

Matrices = tuple[torch.Tensor | PackedWeight, torch.Tensor | PackedWeight]  # w1 above w3 of every slot, and w2


class Experts(nn.Module):
    """SwiGLU experts: ``w2 · (silu(w1 · x) * (w3 · x))``, with w1 above w3 in ``w13``.

    Experts of several formats are so many groups: each sums the choices of its own, and the sums are added. F may be a
    part of the expert's hidden width; the sum over the ranks that hold the other parts is the caller's.

    Parameters are ``w13`` [S, 2F, D] and ``w2`` [S, D, F], the weights of the plan's slots, or the parts of these in
    another format (``layout.RankLayout``).

    Attributes:
        matrices: both, in whatever format; of the first group.
        storage: the whole memory that these lie in, w13 and w2 of its P places, and int64 [S'] the place in it of every
            slot that rows may name, copies of other ranks' experts too; None where slots are those of ``w13``.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        storage: tuple[Sequence[torch.Tensor], torch.Tensor] | None = None,
        groups: Sequence[SlotGroup] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> None:
        """``tensors`` of the parameters in order, group by group; None is one plain group.

        ``columns`` D and F, needed where a format is not plain. Only a single group has a storage.
        """
        super().__init__()
        self.groups = groups or (SlotGroup(PLAIN, tuple(range(len(tensors[0])))),)
        self.columns = columns
        self.names = [name for group in self.groups for name in names_of(group)]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        place_GS = torch.full((len(self.groups), self.slots + 1), -1)  # the last is what slot -1 finds
        for group, place_S in zip(self.groups, place_GS, strict=True):
            place_S[list(group.slots)] = torch.arange(len(group.slots))
        self._place_GS = place_GS.to(tensors[0].device)
        self.storage = None
        if storage is not None:
            self.store_in(*storage)

    def store_in(self, tensors: Sequence[torch.Tensor], places_S: torch.Tensor) -> None:
        """The memory that the parameters lie in, and the places of the slots there."""
        self.storage = (*as_matrices(self.groups[0].weights, self.columns, tensors), places_S)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The parameters."""
        return [getattr(self, name) for name in self.names]

    @property
    def matrices(self) -> Matrices:
        return self.matrices_of(self.groups[0])

    def matrices_of(self, group: SlotGroup) -> Matrices:
        """Those of a group's slots."""
        return as_matrices(group.weights, self.columns, [getattr(self, name) for name in names_of(group)])

    @property
    def slots(self) -> int:
        """Experts that are here by the plan."""
        return sum(len(getattr(self, names_of(group)[0])) for group in self.groups)

    @property
    def trains(self) -> bool:
        """Whether gradients are wanted now."""
        return torch.is_grad_enabled() and self.tensors[0].requires_grad

    def forward(self, rows: RoutedRows) -> torch.Tensor:
        """One weighted partial sum a row: y_RD = Σ_k weight · expert(x) [+ residual], zero where nothing is here."""
        if len(self.groups) > 1:
            return self._by_format(rows)
        if self.storage is None or self.trains:
            return run_experts(rows, *self.matrices)
        return run_experts(rows, *self.storage, likely_slots=self.slots)  # few batches have a use for copies

    def _by_format(self, rows: RoutedRows) -> torch.Tensor:
        """The kernels of each format on the choices of its slots; their sums, which the formats round, in float32."""
        sum_RD = None if rows.residual_RD is None else rows.residual_RD.float()
        for group, place_S in zip(self.groups, self._place_GS, strict=True):
            if group.slots:
                own = replace(rows, slots_RK=place_S[rows.slots_RK], residual_RD=None, out_RD=None)
                part_RD = run_experts(own, *self.matrices_of(group)).float()
                sum_RD = part_RD if sum_RD is None else sum_RD + part_RD
        sum_RD = torch.zeros_like(rows.x_RD) if sum_RD is None else sum_RD.type_as(rows.x_RD)
        return sum_RD if rows.out_RD is None else rows.out_RD.copy_(sum_RD)


def names_of(group: SlotGroup) -> list[str]:
    """Of a group's parameters: the parts of w13, then of w2."""
    return [name for matrix in ("w13", "w2") for name, _ in group.weights.parameters(f"{matrix}{group.suffix}")]


def as_matrices(weights: ExpertWeights, columns: tuple[int, int] | None, tensors: Sequence[torch.Tensor]) -> Matrices:
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
