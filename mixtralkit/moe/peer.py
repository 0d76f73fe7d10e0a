"""The way of rows by kernels that reach into each other's memory: no collective, nothing waits for the host."""

from __future__ import annotations

import torch

from mixtralkit.moe.assignment import Assigner
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.experts import RoutedRows
from mixtralkit.ops.symmetric_exchange import ExpertPlaces, SymmetricExchange


class PeerDispatch:
    """``StaticDispatch``'s assignment and sums, and rows that cross a link only to be computed there. No gradients."""

    def __init__(self, exchange: SymmetricExchange, places: ExpertPlaces, rows_per_rank: int) -> None:
        """``places`` are those of the layer's plan, or of one holder of each expert in it."""
        self.exchange, self.places, self.rows_per_rank = exchange, places, rows_per_rank

    def dispatch(self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner) -> tuple[RoutedRows, torch.Tensor]:
        rows = self.rows_per_rank  # as many choices come here as rows of this rank's own have, more or less
        arrived = self.exchange.dispatch(x_TD, cut.experts_TK, cut.weights_TK, self.places, rows)
        outbox_RD = self.exchange.sum_buffer(rows)
        return RoutedRows(arrived.x_RD, arrived.slots_RK, arrived.weights_RK, rows, outbox_RD), arrived.members_T

    def combine(self, y_RD: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
        return self.exchange.combine(y_RD, handle)[0]
