"""Own rows, whole experts, collectives with unequal splits: for ranks on several hosts, on CPUs, and for gradients.

``exact`` sends a row once to each rank that computes any of its choices; ``two_stage`` once to each node, where the
rank with the sender's place hands it on, and adds the sums of one node before they travel back; ``static`` keeps room
for every row everywhere, so that no shape depends on the routing. ::

    (t0: e0 e5) (t1: e5 e6) (t2: e1 e0)   rank 1 has e4 … e7
    to rank 1:  (t0: – e5) (t1: e5 e6)    back: one sum each for t0 and t1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.dispatch.exchange import Exchange, ExchangeHandle, StaticExchange, TravellingRows
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.hidden import Hidden, Norm, add
from mixtralkit.planning.replicas import is_small


@dataclass(frozen=True)
class ExactHandle:
    """``exchange``: of each stage in turn. ``x_TD``: what the sums are added to."""

    exchange: tuple[Any, ...]
    x_TD: torch.Tensor | None

    @property
    def send(self) -> list[int]:
        """Rows that this rank sent to each member in the first stage."""
        return self.exchange[0].send

    @property
    def receive(self) -> list[int]:
        """Rows that this rank received from each member in the first stage."""
        return self.exchange[0].receive


class ExactDispatcher:
    """Unequal splits, which the host has to know: each exchange waits for the device. Replicas are poured."""

    def __init__(self, context: RankContext) -> None:
        self.context, self.exchange = context, Exchange(context)

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, ExactHandle]:
        rows = TravellingRows(hidden.normed_TD, *table.pour(cut.kept_TK), cut.weights_TK)
        here, handles = self._send(rows)
        return here.for_rank(self.context.rank), ExactHandle(handles, hidden.x_TD)

    def _send(self, rows: TravellingRows) -> tuple[TravellingRows, tuple[ExchangeHandle, ...]]:
        here, handle = self.exchange.send(rows, rows.ranks_RK)
        return here, (handle,)

    def combine(self, y_RD: torch.Tensor, handle: ExactHandle, norm: Norm | None = None) -> Hidden:
        return add(self._bring_back(y_RD, handle.exchange), handle.x_TD, norm)

    def _bring_back(self, y_RD: torch.Tensor, handles: tuple[ExchangeHandle, ...]) -> torch.Tensor:
        return self.exchange.bring_back(y_RD, handles[0])


class TwoStageDispatcher(ExactDispatcher):
    """Across nodes once, then inside the node."""

    def __init__(self, context: RankContext, across: RankContext, inside: RankContext) -> None:
        super().__init__(context)
        self.across, self.inside, self.per_node = Exchange(across), Exchange(inside), inside.world_size

    def _send(self, rows: TravellingRows) -> tuple[TravellingRows, tuple[ExchangeHandle, ...]]:
        nodes_RK = torch.where(rows.ranks_RK < 0, -1, rows.ranks_RK // self.per_node)
        on_node, across = self.across.send(rows, nodes_RK)
        here_RK = on_node.ranks_RK // self.per_node == self.context.rank // self.per_node
        members_RK = torch.where(here_RK & (on_node.ranks_RK >= 0), on_node.ranks_RK % self.per_node, -1)
        here, inside = self.inside.send(on_node, members_RK)
        return here, (across, inside)

    def _bring_back(self, y_RD: torch.Tensor, handles: tuple[ExchangeHandle, ...]) -> torch.Tensor:
        across, inside = handles
        return self.across.bring_back(self.inside.bring_back(y_RD, inside), across)


class StaticDispatcher:
    """Shapes that ``rows_per_rank`` fixes: no host synchronisation, for decode where no memory is shared."""

    def __init__(self, context: RankContext) -> None:
        self.context, self.exchange = context, StaticExchange(context)

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, tuple[int, torch.Tensor | None]]:
        small = is_small(rows_per_rank * self.context.world_size, cut.experts_TK.shape[1], len(table.local_E))
        rows = TravellingRows(hidden.normed_TD, *table.look_up(cut.kept_TK, small), cut.weights_TK)
        here = self.exchange.send(rows, rows_per_rank)
        return here.for_rank(self.context.rank), (len(hidden), hidden.x_TD)

    def combine(self, y_RD: torch.Tensor, handle: tuple[int, torch.Tensor | None], norm: Norm | None = None) -> Hidden:
        own, x_TD = handle
        return add(self.exchange.bring_back(y_RD, own), x_TD, norm)
