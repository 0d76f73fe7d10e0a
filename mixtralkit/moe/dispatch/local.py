"""One rank has all rows and all experts: nothing travels, and the residual is added where the experts are summed."""

from __future__ import annotations

import torch

from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.hidden import Hidden, Norm
from mixtralkit.planning.replicas import is_small


class LocalDispatcher:
    """For one rank; see ``base.Dispatcher``."""

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, Hidden]:
        small = is_small(len(hidden), cut.experts_TK.shape[1], len(table.local_E))
        slots_TK = cut.experts_TK
        if not table.is_identity:
            slots_TK = table.own_slots(slots_TK, small)
            slots_TK = slots_TK.masked_fill(cut.experts_TK < 0, -1) if cut.is_cut else slots_TK
        return RoutedRows(hidden.normed_TD, slots_TK, cut.weights_TK, hidden.x_TD), hidden

    def combine(self, y_RD: torch.Tensor, handle: Hidden, norm: Norm | None = None) -> Hidden:
        return Hidden(None, y_RD) if handle.x_TD is None else Hidden(y_RD, None, norm)
