"""Rows to the ranks that compute them, and their weighted sums back home.

Three ways, one protocol. ``dispatch`` returns the rows this rank computes and a handle; ``combine`` takes one partial
sum for each of those rows and the handle, and returns one finished row for each row that was given to ``dispatch``.

=============  ==============================  =================================  =========================
               rows before                     rows travel                        sums travel
=============  ==============================  =================================  =========================
Replicated     the same on every rank          no                                 all-reduce
Exchange       each rank its own               once per destination rank          back, once per row sent
Gathered       each rank its own               to every rank                      reduce to the owner
=============  ==============================  =================================  =========================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.collectives import all_to_all, enter_replicated, gather_ranks, sum_over_ranks
from mixtralkit.moe.experts import RoutedRows
from mixtralkit.moe.gate import Routing
from mixtralkit.planning.plan import ExpertPlan


class Dispatch(Protocol):
    """How rows of one layer find their experts."""

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[RoutedRows, object]:
        """Rows to compute on this rank, and what ``combine`` must know to bring their sums home."""

    def combine(self, y_RD: torch.Tensor, handle: object) -> torch.Tensor:
        """Finished rows, in the order in which ``dispatch`` was given them."""


class ReplicatedDispatch:
    """Every rank has every row: each computes its own experts' part, one all-reduce adds the parts."""

    def __init__(self, context: RankContext, lookup: PlanLookup) -> None:
        self.context, self.lookup = context, lookup

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[RoutedRows, None]:
        ranks_TK = self.lookup.choose_ranks(routing.experts_TK, home=None)
        slots_TK = self.lookup.slots_WE[self.context.rank][routing.experts_TK]
        slots_TK = slots_TK.masked_fill(ranks_TK != self.context.rank, -1)
        weights_TK = enter_replicated(routing.weights_TK, self.context)
        return RoutedRows(enter_replicated(x_TD, self.context), slots_TK, weights_TK), None

    def combine(self, y_TD: torch.Tensor, handle: None) -> torch.Tensor:
        return sum_over_ranks(y_TD, self.context)


class SplitWidthDispatch:
    """Every rank has every row and a part of every expert's hidden width: nothing to choose, one all-reduce."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[RoutedRows, None]:
        weights_TK = enter_replicated(routing.weights_TK, self.context)
        return RoutedRows(enter_replicated(x_TD, self.context), routing.experts_TK, weights_TK), None

    def combine(self, y_TD: torch.Tensor, handle: None) -> torch.Tensor:
        return sum_over_ranks(y_TD, self.context)


class GatheredDispatch:
    """Own rows, split-width experts: rows of all ranks come together, the sums return to their owners."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[RoutedRows, tuple[int, int]]:
        counts = torch.tensor([x_TD.shape[0]], device=x_TD.device)
        longest = int(self.context.all_gather(counts).max())  # host sync
        missing = longest - x_TD.shape[0]

        def everyone(values: torch.Tensor) -> torch.Tensor:
            padded = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
            return gather_ranks(padded, self.context).flatten(0, 1)

        rows = RoutedRows(everyone(x_TD), everyone(routing.experts_TK), everyone(routing.weights_TK))
        return rows, (x_TD.shape[0], longest)

    def combine(self, y_RD: torch.Tensor, handle: tuple[int, int]) -> torch.Tensor:
        own, longest = handle
        start = self.context.rank * longest
        return sum_over_ranks(enter_owner(y_RD, self.context), self.context)[start : start + own]


def enter_owner(y_RD: torch.Tensor, context: RankContext) -> torch.Tensor:
    """Gradients of rows that only their owner keeps must reach every rank that computed a part of them."""
    return enter_replicated(y_RD, context)


@dataclass(frozen=True)
class ExchangeHandle:
    """What came from where.

    Attributes:
        send, receive: rows sent to and received from each rank.
        local: rows computed at home, first among the computed rows.
        merge_TK: for every choice the place of its sum among ``(rows at home)(rows sent)(one row of zeros)``; a
            choice whose sum another choice of the row already brings points at the zeros.
    """

    send: list[int]
    receive: list[int]
    local: int
    merge_TK: torch.Tensor


class ExchangeDispatch:
    """Own rows, whole experts: a row leaves once for each rank that computes any of its choices.

    ::

        (t0: e0 e5) (t1: e5 e6) (t2: e1 e0)   rank 1 has e4 … e7
        to rank 1:  (t0: – e5) (t1: e5 e6)    back: one sum each for t0 and t1
    """

    def __init__(self, context: RankContext, lookup: PlanLookup) -> None:
        self.context, self.lookup = context, lookup

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[RoutedRows, ExchangeHandle]:
        context, (tokens, top_k) = self.context, routing.experts_TK.shape
        ranks_TK = self.lookup.choose_ranks(routing.experts_TK, home=context.rank)
        goes_WT = torch.zeros(context.world_size, tokens, dtype=torch.bool, device=x_TD.device)
        goes_WT[ranks_TK.T, torch.arange(tokens, device=x_TD.device)] = True
        local_rows = goes_WT[context.rank].nonzero().squeeze(1)  # host sync
        goes_WT[context.rank] = False
        to, rows_N = goes_WT.nonzero(as_tuple=True)  # host sync; ordered by rank, then row
        send_W = goes_WT.sum(1)
        send, receive = self._exchange_counts(send_W)

        slots_NK = self.lookup.slots_WE[to[:, None], routing.experts_TK[rows_N]]
        slots_NK = slots_NK.masked_fill(ranks_TK[rows_N] != to[:, None], -1)
        choices_N2K = torch.cat([slots_NK.float(), routing.weights_TK[rows_N]], dim=1)  # ids are exact in float32
        received_RD = all_to_all(x_TD[rows_N], context, send, receive)
        slots_RK, weights_RK = all_to_all(choices_N2K, context, send, receive).split(top_k, dim=1)

        own_slots = self.lookup.slots_WE[context.rank][routing.experts_TK[local_rows]]
        own_slots = own_slots.masked_fill(ranks_TK[local_rows] != context.rank, -1)
        rows = RoutedRows(
            torch.cat([x_TD[local_rows], received_RD]),
            torch.cat([own_slots, slots_RK.detach().long()]),
            torch.cat([routing.weights_TK[local_rows], weights_RK]),
        )
        merge_TK = _merge_index(ranks_TK, context.rank, context.world_size, local_rows, to, rows_N)
        return rows, ExchangeHandle(send, receive, len(local_rows), merge_TK)

    def combine(self, y_RD: torch.Tensor, handle: ExchangeHandle) -> torch.Tensor:
        home_D, away_D = y_RD.split([handle.local, y_RD.shape[0] - handle.local])
        back_ND = all_to_all(away_D, self.context, handle.receive, handle.send)
        sums_MD = torch.cat([home_D, back_ND, y_RD.new_zeros(1, y_RD.shape[1])])
        return sums_MD[handle.merge_TK].sum(1)

    def _exchange_counts(self, send_W: torch.Tensor) -> tuple[list[int], list[int]]:
        if self.context.group is None:
            return [0], [0]
        counts_WW = self.context.all_gather(send_W)
        counts = counts_WW.tolist()  # host sync: the splits of the exchange are exact
        return counts[self.context.rank], [row[self.context.rank] for row in counts]


def _merge_index(
    ranks_TK: torch.Tensor,
    home: int,
    world_size: int,
    local_rows: torch.Tensor,
    to: torch.Tensor,
    rows_N: torch.Tensor,
) -> torch.Tensor:
    """Place of each choice's sum among ``(local rows)(sent rows)(zeros)``; only the first choice per rank has one."""
    zeros = len(local_rows) + len(rows_N)
    place_TW = ranks_TK.new_full((len(ranks_TK), world_size), zeros)
    place_TW[local_rows, home] = torch.arange(len(local_rows), device=ranks_TK.device)
    place_TW[rows_N, to] = torch.arange(len(local_rows), zeros, device=ranks_TK.device)
    merge_TK = place_TW.gather(1, ranks_TK)
    earlier_TKK = (ranks_TK[:, :, None] == ranks_TK[:, None, :]).tril(diagonal=-1)
    return merge_TK.masked_fill(earlier_TKK.any(-1), zeros)


class PlanLookup:
    """A layer of a plan as device tensors."""

    def __init__(self, plan: ExpertPlan, layer: int, device: torch.device) -> None:
        self.slots_WE = torch.tensor(plan.slot_of_LWE[layer], dtype=torch.int64, device=device)
        holds_WE = self.slots_WE >= 0
        self.copies_E = holds_WE.sum(0)
        # ranks of each expert's replicas first, in rank order
        self.replicas_EW = (~holds_WE.T).int().argsort(dim=1, stable=True)

    def choose_ranks(self, experts_TK: torch.Tensor, home: int | None) -> torch.Tensor:
        """Which rank computes each choice: ``home`` if it has the expert, else its replicas in turn."""
        flat_N = experts_TK.flatten()
        turn_N = torch.arange(len(flat_N), device=flat_N.device) // experts_TK.shape[1]
        ranks_N = self.replicas_EW[flat_N, turn_N % self.copies_E[flat_N]]
        if home is not None:
            ranks_N = torch.where(self.slots_WE[home][flat_N] >= 0, home, ranks_N)
        return ranks_N.view_as(experts_TK)
