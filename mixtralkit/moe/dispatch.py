"""Rows to the ranks that compute them, and their weighted sums back home.

Several ways, one protocol: ``dispatch`` returns the rows this rank computes and a handle; ``combine`` takes one partial
sum for each of those rows and the handle, and returns one finished row for each row that was given to ``dispatch``.

=============  =====================  ==========================================  ===========================
way            rows before            rows travel                                 sums travel
=============  =====================  ==========================================  ===========================
Replicated     on every rank          no                                          one all-reduce
SplitWidth     on every rank          no                                          one all-reduce
Gathered       each rank its own      to every rank                               one all-reduce
Exchanged      each rank its own      once per destination rank                   back, once per row sent
Static         each rank its own      the same, in shapes fixed beforehand        back, in fixed shapes
Peer           each rank its own      once per destination rank, pushed           back, fetched; moe/peer.py
TwoStage       each rank its own      once per node, then once per rank inside    back the same way
=============  =====================  ==========================================  ===========================
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.assignment import Assigner
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.collectives import enter_replicated, gather_ranks, sum_over_ranks
from mixtralkit.moe.exchange import Exchange, StaticExchange, TravellingRows
from mixtralkit.moe.experts import RoutedRows


class Dispatch(Protocol):
    """How rows of one layer find their experts."""

    def dispatch(self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner) -> tuple[RoutedRows, Any]:
        """Rows to compute on this rank, and what ``combine`` must know to bring their sums home. Collective."""

    def combine(self, y_RD: torch.Tensor, handle: Any) -> torch.Tensor:
        """Finished rows, in the order in which ``dispatch`` was given them. Collective."""


class ReplicatedDispatch:
    """Every rank has every row: each computes its own experts' part, one all-reduce adds the parts."""

    def __init__(self, context: RankContext, even: bool = True) -> None:
        self.context, self.even = context, even

    def dispatch(self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner) -> tuple[RoutedRows, None]:
        to = assigner.assign(cut, even=self.even)
        slots_TK = to.slots_TK.masked_fill(to.ranks_TK != self.context.rank, -1)
        weights_TK = enter_replicated(cut.weights_TK, self.context)
        return RoutedRows(enter_replicated(x_TD, self.context), slots_TK, weights_TK), None

    def combine(self, y_RD: torch.Tensor, handle: None) -> torch.Tensor:
        return sum_over_ranks(y_RD, self.context)


class SplitWidthDispatch:
    """Every rank has every row and a part of every expert's hidden width: nothing to choose, one all-reduce."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def dispatch(self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner) -> tuple[RoutedRows, None]:
        weights_TK = enter_replicated(cut.weights_TK, self.context)
        return RoutedRows(enter_replicated(x_TD, self.context), cut.experts_TK, weights_TK), None

    def combine(self, y_RD: torch.Tensor, handle: None) -> torch.Tensor:
        return sum_over_ranks(y_RD, self.context)


class GatheredDispatch:
    """Own rows, split-width experts: rows of all ranks come together, the sums return to their owners."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def dispatch(self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner) -> tuple[RoutedRows, tuple[int, int]]:
        counts = torch.tensor([x_TD.shape[0]], device=x_TD.device)
        longest = int(self.context.all_gather(counts).max())  # host sync
        missing = longest - x_TD.shape[0]

        def everyone(values: torch.Tensor) -> torch.Tensor:
            padded = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
            return gather_ranks(padded, self.context).flatten(0, 1)

        rows = RoutedRows(everyone(x_TD), everyone(cut.experts_TK), everyone(cut.weights_TK))
        return rows, (x_TD.shape[0], longest)

    def combine(self, y_RD: torch.Tensor, handle: tuple[int, int]) -> torch.Tensor:
        own, longest = handle
        start = self.context.rank * longest
        # Each rank keeps only its own rows of the sum, so their gradients must reach all that computed a part.
        summed_RD = sum_over_ranks(enter_replicated(y_RD, self.context), self.context)
        return summed_RD[start : start + own]


class ExchangedDispatch:
    """Own rows, whole experts: a row leaves once for each rank that computes any of its choices.

    ::

        (t0: e0 e5) (t1: e5 e6) (t2: e1 e0)   rank 1 has e4 … e7
        to rank 1:  (t0: – e5) (t1: e5 e6)    back: one sum each for t0 and t1
    """

    def __init__(self, context: RankContext) -> None:
        self.context, self.exchange = context, Exchange(context)

    def dispatch(self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner) -> tuple[RoutedRows, Any]:
        rows = start_rows(x_TD, cut, assigner)
        here, handle = self.exchange.send(rows, rows.ranks_RK)
        return for_rank(here, self.context.rank), handle

    def combine(self, y_RD: torch.Tensor, handle: Any) -> torch.Tensor:
        return self.exchange.bring_back(y_RD, handle)


class StaticDispatch:
    """``ExchangedDispatch`` in shapes that ``rows_per_rank`` fixes: no host synchronisation, for decode."""

    def __init__(self, context: RankContext, rows_per_rank: int) -> None:
        self.context, self.rows_per_rank = context, rows_per_rank
        self.exchange = StaticExchange(context)

    def dispatch(self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner) -> tuple[RoutedRows, int]:
        rows = start_rows(x_TD, cut, assigner, even=False)
        return for_rank(self.exchange.send(rows, self.rows_per_rank), self.context.rank), x_TD.shape[0]

    def combine(self, y_RD: torch.Tensor, handle: int) -> torch.Tensor:
        return self.exchange.bring_back(y_RD, handle)


class TwoStageDispatch:
    """Across nodes once, then inside the node: a row that several ranks of a far node compute crosses the wire once.

    First to the rank of the destination node with the sender's place in its own node, which hands it on; the sums
    of one node are added there before they travel back.
    """

    def __init__(self, context: RankContext, across: RankContext, inside: RankContext) -> None:
        self.context = context
        self.across, self.inside = Exchange(across), Exchange(inside)
        self.ranks_per_node = inside.world_size

    def dispatch(self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner) -> tuple[RoutedRows, tuple[Any, Any]]:
        rows = start_rows(x_TD, cut, assigner)
        nodes_RK = torch.where(rows.ranks_RK < 0, -1, rows.ranks_RK // self.ranks_per_node)
        on_node, across_handle = self.across.send(rows, nodes_RK)
        here_RK = on_node.ranks_RK // self.ranks_per_node == self.context.rank // self.ranks_per_node
        members_RK = torch.where(here_RK & (on_node.ranks_RK >= 0), on_node.ranks_RK % self.ranks_per_node, -1)
        here, inside_handle = self.inside.send(on_node, members_RK)
        return for_rank(here, self.context.rank), (across_handle, inside_handle)

    def combine(self, y_RD: torch.Tensor, handle: tuple[Any, Any]) -> torch.Tensor:
        across_handle, inside_handle = handle
        return self.across.bring_back(self.inside.bring_back(y_RD, inside_handle), across_handle)


def start_rows(x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner, even: bool = True) -> TravellingRows:
    """This rank's rows, ready to leave: every choice with its rank and slot."""
    to = assigner.assign(cut, even=even)
    ids_T = torch.arange(x_TD.shape[0], device=x_TD.device)
    return TravellingRows(x_TD, to.ranks_TK, to.slots_TK, cut.weights_TK, ids_T)


def for_rank(rows: TravellingRows, rank: int) -> RoutedRows:
    """The rows as the experts take them: slots of other ranks' choices are -1."""
    return RoutedRows(rows.x_RD, rows.slots_RK.masked_fill(rows.ranks_RK != rank, -1), rows.weights_RK)
