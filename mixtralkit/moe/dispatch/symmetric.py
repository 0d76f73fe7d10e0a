"""Own rows, whole experts, kernels that reach into other ranks' memory: no collective, no wait for the host."""

from __future__ import annotations

import torch

from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.hidden import Hidden, Norm
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.replicas import is_small


class SymmetricDispatcher:
    """A row crosses a link once for each rank that computes any of its choices; sums are fetched. No gradients."""

    def __init__(self, exchange: SymmetricExchange) -> None:
        self.exchange = exchange

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, tuple[torch.Tensor, torch.Tensor | None]]:
        exchange, rows = self.exchange, rows_per_rank
        small = is_small(rows * exchange.context.world_size, cut.experts_TK.shape[1], len(table.local_E))
        places_EC = table.places_2EC[int(small)]
        arrived = exchange.dispatch(hidden.normed_TD, cut.experts_TK, cut.weights_TK, places_EC, rows, cut.valid_T)
        # as many choices come here as rows of this rank's own have, more or less
        found = RoutedRows(arrived.x_RD, arrived.slots_RK, arrived.weights_RK, None, exchange.sum_buffer(rows), rows)
        return found, (arrived.members_T, hidden.x_TD)

    def combine(
        self, y_RD: torch.Tensor, handle: tuple[torch.Tensor, torch.Tensor | None], norm: Norm | None = None
    ) -> Hidden:
        members_T, x_TD = handle
        sums_TD, normed_TD = self.exchange.combine(y_RD, members_T, x_TD, None if x_TD is None else norm)
        return Hidden(None, sums_TD) if x_TD is None else Hidden(sums_TD, normed_TD, norm)
