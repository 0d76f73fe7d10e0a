"""Every rank has every row: each computes a part, and one sum over the ranks makes them whole.

``split_width``: a part of every expert's hidden width. ``replicated``: all of some experts. ``gathered``: rows that are
each rank's own come together first, and the sums return to their owners.
"""

from __future__ import annotations

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.dispatch.collectives import enter_replicated, gather_ranks, sum_over_ranks
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.hidden import Hidden, Norm, add
from mixtralkit.planning.replicas import is_small


class SplitWidthDispatcher:
    """Nothing to choose: every rank computes its part of each choice. ``sums`` adds without gradients, if there."""

    def __init__(self, context: RankContext, sums: RowReducer | None = None) -> None:
        self.context, self.sums = context, sums

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, torch.Tensor | None]:
        weights_TK = enter_replicated(cut.weights_TK, self.context)
        x_TD = enter_replicated(hidden.normed_TD, self.context)
        return RoutedRows(x_TD, self._slots(cut, table), weights_TK), hidden.x_TD

    def _slots(self, cut: CutRouting, table: LayerTable) -> torch.Tensor:
        return cut.experts_TK

    def combine(self, y_RD: torch.Tensor, handle: torch.Tensor | None, norm: Norm | None = None) -> Hidden:
        if handle is None or self.sums is None:
            return add(sum_over_ranks(y_RD, self.context), handle, norm)
        return Hidden(*self.sums.add_norm(y_RD, handle, *norm), norm)


class ReplicatedDispatcher(SplitWidthDispatcher):
    """Each rank computes the choices of its own experts; replicas take turns by row."""

    def _slots(self, cut: CutRouting, table: LayerTable) -> torch.Tensor:
        small = is_small(*cut.experts_TK.shape, len(table.local_E))
        slots_TK = table.own_slots(cut.experts_TK, small)
        return slots_TK.masked_fill(cut.experts_TK < 0, -1) if cut.is_cut else slots_TK


class GatheredDispatcher:
    """Own rows, split-width experts."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, tuple[int, int, torch.Tensor | None]]:
        own, device = len(hidden), hidden.normed_TD.device
        longest = rows_per_rank
        if longest is None:
            longest = int(self.context.all_gather(torch.tensor([own], device=device)).max())  # host sync

        def everyone(values: torch.Tensor) -> torch.Tensor:
            padded = torch.cat([values, values.new_zeros(longest - own, *values.shape[1:])])
            return gather_ranks(padded, self.context).flatten(0, 1)

        rows = RoutedRows(everyone(hidden.normed_TD), everyone(cut.experts_TK), everyone(cut.weights_TK))
        return rows, (own, longest, hidden.x_TD)

    def combine(
        self, y_RD: torch.Tensor, handle: tuple[int, int, torch.Tensor | None], norm: Norm | None = None
    ) -> Hidden:
        own, longest, x_TD = handle
        start = self.context.rank * longest
        # Each rank keeps only its own rows of the sum, so their gradients must reach all that computed a part.
        summed_RD = sum_over_ranks(enter_replicated(y_RD, self.context), self.context)
        return add(summed_RD[start : start + own], x_TD, norm)
