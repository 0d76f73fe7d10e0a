"""Context-coherent routing: rows stay where their experts are, one exchange a layer (ExFlow, §4.1).

Every rank holds every sequence's context, so a row may be attended on any rank and need not travel back. It moves to
the rank of its heaviest choice. A row whose choices lie on several ranks still needs their parts: those, and only
those, cross in a second exchange, which is left out when no row of any rank is split. With top-1 none ever is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.dispatch.collectives import all_to_all
from mixtralkit.moe.dispatch.exchange import Exchange, TravellingRows
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.counting import count_keys
from mixtralkit.ops.hidden import Hidden, Norm, add
from mixtralkit.ops.norm import rms_norm
from mixtralkit.ops.symmetric_exchange import ArrivedRows, SymmetricExchange
from mixtralkit.planning.replicas import is_small


@dataclass(frozen=True)
class CoherentHandle:
    """Where the computed rows live from now on.

    Attributes:
        x_RD: the residual stream of the computed rows, which came with them; None where there is none.
        owners_R: int64 rank at which each computed row lives on.
        ranks_RK: ranks of all its choices.
        ids_R: the numbers to know the rows by.
        any_split: whether some row of some rank has choices on several ranks.
    """

    x_RD: torch.Tensor | None
    owners_R: torch.Tensor
    ranks_RK: torch.Tensor
    ids_R: torch.Tensor
    any_split: bool


class CoherentDispatcher:
    """Rows move to the rank of their heaviest choice and stay; ``combine`` returns the rows that live here now.

    ``Hidden.ids_T`` (below 2^24) numbers the rows over all ranks and travels with them.
    """

    def __init__(self, context: RankContext) -> None:
        self.context, self.exchange = context, Exchange(context)

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, CoherentHandle]:
        ranks_TK, slots_TK = table.pour(cut.kept_TK)
        streams = hidden.x_TD is not None
        # The stream travels and is normalised again where it arrives, so that only one row crosses.
        x_TD = hidden.x_TD if streams else hidden.normed_TD
        rows = TravellingRows(x_TD, ranks_TK, slots_TK, cut.weights_TK, hidden.ids_T)
        # A row without any choice left stays where it is: it goes "to" this rank as far as the exchange is concerned.
        owners_T = _owner(ranks_TK, self.context.rank)
        members_RK = torch.cat([ranks_TK, owners_T[:, None]], dim=1)
        split_T = ((ranks_TK >= 0) & (ranks_TK != owners_T[:, None])).any(1)
        any_split = bool(self.context.all_gather(split_T.any()[None].int()).any())  # host sync
        here, _ = self.exchange.send(rows, members_RK)
        owners_R = _owner(here.ranks_RK, self.context.rank)
        handle = CoherentHandle(here.x_RD if streams else None, owners_R, here.ranks_RK, here.ids_R, any_split)
        routed = here.for_rank(self.context.rank)
        if streams:
            routed = RoutedRows(rms_norm(here.x_RD, *hidden.norm), routed.slots_RK, routed.weights_RK)
        return routed, handle

    def combine(self, y_RD: torch.Tensor, handle: CoherentHandle, norm: Norm | None = None) -> Hidden:
        """Finished rows that live here, by rising id."""
        by_id_R = handle.ids_R.argsort()
        owners_R, ids_R, y_RD = handle.owners_R[by_id_R], handle.ids_R[by_id_R], y_RD[by_id_R]
        mine_M = (owners_R == self.context.rank).nonzero().squeeze(1)  # host sync
        y_MD, ids_M = y_RD[mine_M], ids_R[mine_M]
        if handle.any_split and self.context.group is not None:
            y_MD = self._with_parts(y_MD, y_RD, owners_R, handle.ranks_RK[by_id_R], mine_M)
        x_MD = None if handle.x_RD is None else handle.x_RD[by_id_R][mine_M]
        found = add(y_MD, x_MD, norm)
        return Hidden(found.x_TD, found.normed_TD, found.norm, ids_M)

    def _with_parts(self, y_MD, y_RD, owners_R, ranks_RK, mine_M) -> torch.Tensor:
        """Rows that live here with what the other ranks computed of them; every rank's rows stand by rising id."""
        rank, world = self.context.rank, self.context.world_size
        leaving_N = (owners_R != rank).nonzero().squeeze(1)
        leaving_N = leaving_N[owners_R[leaving_N].argsort(stable=True)]
        send_W = count_keys(owners_R[leaving_N], world)
        # Both sides know what travels: a part from rank w for each of my rows that has a choice on w, by rising id.
        parts_WM = torch.zeros(world, len(mine_M), dtype=torch.bool, device=y_RD.device)
        row_M = torch.arange(len(mine_M), device=y_RD.device)
        for ranks_M in ranks_RK[mine_M].T:
            parts_WM[ranks_M.clamp(min=0), row_M] |= ranks_M >= 0
        parts_WM[rank] = False
        _, target_P = parts_WM.nonzero(as_tuple=True)
        arrived_PD = all_to_all(y_RD[leaving_N], self.context, send_W.tolist(), parts_WM.sum(1).tolist())
        return y_MD.index_add(0, target_P, arrived_PD)


class CoherentSymmetricDispatcher:
    """The same by kernels that reach into other ranks' memory: row t is the same row on every rank, and
    ``Hidden.valid_T`` says which rows are here. Nothing waits for the host; no gradients."""

    def __init__(self, exchange: SymmetricExchange) -> None:
        self.exchange = exchange

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, tuple[ArrivedRows, bool]]:
        exchange, rows, streams = self.exchange, len(hidden), hidden.x_TD is not None
        small = is_small(rows, cut.experts_TK.shape[1], len(table.local_E))
        x_TD, places_EC = hidden.x_TD if streams else hidden.normed_TD, table.places_2EC[int(small)]
        choices = cut.experts_TK, cut.weights_TK
        arrived = exchange.dispatch(x_TD, *choices, places_EC, rows, valid_T=hidden.valid_T, stays=True)
        x_RD = rms_norm(arrived.x_RD, *hidden.norm) if streams else arrived.x_RD
        likely = -(-rows // exchange.context.world_size)
        routed = RoutedRows(x_RD, arrived.slots_RK, arrived.weights_RK, None, exchange.sum_buffer(rows), likely)
        return routed, (arrived, streams)

    def combine(self, y_RD: torch.Tensor, handle: tuple[ArrivedRows, bool], norm: Norm | None = None) -> Hidden:
        arrived, streams = handle
        norm = norm if streams else None
        x_TD, normed_TD, valid_T = self.exchange.combine_at_owner(y_RD, arrived, norm, residual=streams)
        if not streams:
            return Hidden(None, x_TD, valid_T=valid_T)
        return Hidden(x_TD, normed_TD, norm, valid_T=valid_T)


def _owner(ranks_RK: torch.Tensor, rank: int) -> torch.Tensor:
    """Rank of each row's first choice that was not dropped; ``rank`` for a row that lost them all."""
    kept_RK = ranks_RK >= 0
    first_R = kept_RK.int().argmax(1, keepdim=True)
    return torch.where(kept_RK.any(1), ranks_RK.gather(1, first_R).squeeze(1), rank)
