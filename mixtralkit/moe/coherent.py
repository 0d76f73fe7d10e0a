"""Context-coherent routing: rows stay where their experts are, one exchange a layer (ExFlow, §4.1).

Every rank holds every sequence's context, so a row may be attended on any rank and need not travel home. It moves to
the rank of its heaviest choice. A row whose choices lie on several ranks still needs their parts: those, and only
those, cross in a second exchange, which is left out when no row of any rank is split. With top-1 none ever is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.assignment import Assigner
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.collectives import all_to_all
from mixtralkit.moe.dispatch import for_rank, start_rows
from mixtralkit.moe.exchange import Exchange, TravellingRows
from mixtralkit.moe.experts import RoutedRows
from mixtralkit.ops.counting import count_keys


@dataclass(frozen=True)
class CoherentHandle:
    """Where the computed rows live from now on.

    Attributes:
        homes_R: int64 rank at which each computed row lives on.
        ranks_RK: ranks of all its choices.
        ids_R: the numbers its sender gave, to know the row by.
        any_split: whether some row of some rank has choices on several ranks.
    """

    homes_R: torch.Tensor
    ranks_RK: torch.Tensor
    ids_R: torch.Tensor
    any_split: bool


class CoherentDispatch:
    """Rows move to the rank of their heaviest choice and stay; ``combine`` returns the rows that live here now."""

    def __init__(self, context: RankContext) -> None:
        self.context, self.exchange = context, Exchange(context)

    def dispatch(
        self, x_TD: torch.Tensor, cut: CutRouting, assigner: Assigner, ids_T: torch.Tensor
    ) -> tuple[RoutedRows, CoherentHandle]:
        """``ids_T`` (int64, below 2^24) number the rows over all ranks and travel with them."""
        rows = start_rows(x_TD, cut, assigner)
        rows = TravellingRows(rows.x_RD, rows.ranks_RK, rows.slots_RK, rows.weights_RK, ids_T)
        # A row without any choice left stays where it is: it goes "to" this rank as far as the exchange is concerned.
        homes_T = _home(rows.ranks_RK, self.context.rank)
        members_RK = torch.cat([rows.ranks_RK, homes_T[:, None]], dim=1)
        split_T = ((rows.ranks_RK >= 0) & (rows.ranks_RK != homes_T[:, None])).any(1)
        any_split = bool(self.context.all_gather(split_T.any()[None].int()).any())  # host sync
        here, _ = self.exchange.send(rows, members_RK)
        handle = CoherentHandle(_home(here.ranks_RK, self.context.rank), here.ranks_RK, here.ids_R, any_split)
        return for_rank(here, self.context.rank), handle

    def combine(self, y_RD: torch.Tensor, handle: CoherentHandle) -> tuple[torch.Tensor, torch.Tensor]:
        """Finished rows that live here, by rising id, and their ids."""
        rank, device = self.context.rank, y_RD.device
        by_id_R = handle.ids_R.argsort()
        y_RD, homes_R, ids_R = y_RD[by_id_R], handle.homes_R[by_id_R], handle.ids_R[by_id_R]
        mine_M = (homes_R == rank).nonzero().squeeze(1)  # host sync
        y_MD, ids_M = y_RD[mine_M], ids_R[mine_M]
        if not handle.any_split or self.context.group is None:
            return y_MD, ids_M
        leaving_N = (homes_R != rank).nonzero().squeeze(1)
        leaving_N = leaving_N[homes_R[leaving_N].argsort(stable=True)]
        send_W = count_keys(homes_R[leaving_N], self.context.world_size)
        # Both sides know what travels: a part from rank w for each of my rows that has a choice on w, by rising id.
        parts_WM = torch.zeros(self.context.world_size, len(mine_M), dtype=torch.bool, device=device)
        row_M = torch.arange(len(mine_M), device=device)
        for ranks_M in handle.ranks_RK[by_id_R][mine_M].T:
            parts_WM[ranks_M.clamp(min=0), row_M] |= ranks_M >= 0
        parts_WM[rank] = False
        _, target_P = parts_WM.nonzero(as_tuple=True)
        arrived_PD = all_to_all(y_RD[leaving_N], self.context, send_W.tolist(), parts_WM.sum(1).tolist())
        return y_MD.index_add(0, target_P, arrived_PD), ids_M


def _home(ranks_RK: torch.Tensor, rank: int) -> torch.Tensor:
    """Rank of each row's first choice that was not dropped; ``rank`` for a row that lost them all."""
    kept_RK = ranks_RK >= 0
    first_R = kept_RK.int().argmax(1, keepdim=True)
    return torch.where(kept_RK.any(1), ranks_RK.gather(1, first_R).squeeze(1), rank)
