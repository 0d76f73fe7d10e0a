"""Where each choice of a row is computed: at home if it can be, else at the replica that keeps the ranks even."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.balance import ranks_in_turn
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.ops.counting import count_keys
from mixtralkit.planning.replicas import spread_rows


@dataclass(frozen=True)
class Assignment:
    """For every choice of every row, both -1 where it was dropped.

    Attributes:
        ranks_TK: int64 rank that computes it.
        slots_TK: int64 slot of the expert on that rank.
    """

    ranks_TK: torch.Tensor
    slots_TK: torch.Tensor


class Assigner:
    """Who holds which expert in one layer, as look-ups on the device.

    ``rows_are_everywhere`` says that every rank is given the same rows, so that no rank is nearer than another.
    Otherwise a rank computes at home what it can, and the rows of experts that some, but not all, other ranks hold
    are spread evenly by counts which the ranks exchange once.

    Args:
        slots_WE: int slot of each expert on each rank, -1 where it is not held; every expert is held somewhere.
    """

    def __init__(self, slots_WE: np.ndarray, context: RankContext, rows_are_everywhere: bool) -> None:
        self.context, self.rows_are_everywhere = context, rows_are_everywhere
        self.num_experts = slots_WE.shape[1]
        self.holds_WE = slots_WE >= 0
        copies_E = self.holds_WE.sum(0)
        free_to_go_E = np.ones_like(copies_E) if rows_are_everywhere else copies_E < context.world_size
        self.has_choice = bool(((copies_E > 1) & free_to_go_E).any())
        on_device = {"dtype": torch.int64, "device": context.device}
        self.slots_WE = torch.tensor(slots_WE, **on_device)
        self.copies_E = torch.tensor(copies_E, **on_device)
        # the ranks of each expert's replicas first, in rank order
        self.replicas_EW = (self.slots_WE.T < 0).int().argsort(dim=1, stable=True)
        at_home_E = self.holds_WE.all(0) if rows_are_everywhere else self.holds_WE[context.rank]
        self.at_home_E = torch.tensor(at_home_E, device=context.device)

    def assign(self, cut: CutRouting, even: bool = True) -> Assignment:
        """Ranks and slots of the choices. Collective where rows are not everywhere and there is a choice.

        Args:
            even: spread exactly evenly, which copies the counts to the host; otherwise replicas take turns by row,
                without any synchronisation.
        """
        lost_N = cut.experts_TK.flatten() < 0
        experts_N = cut.experts_TK.flatten().clamp(min=0)
        if self.has_choice and even:
            ranks_N = self._spread_evenly(experts_N, lost_N)
        else:
            row_N = torch.arange(len(experts_N), device=experts_N.device) // cut.experts_TK.shape[1]
            ranks_N = self.replicas_EW[experts_N, row_N % self.copies_E[experts_N]]
        if not self.rows_are_everywhere:
            ranks_N = torch.where(self.at_home_E[experts_N], self.context.rank, ranks_N)
        ranks_N = ranks_N.clamp(max=self.context.world_size - 1)  # dropped choices may carry any number
        slots_N = self.slots_WE[ranks_N, experts_N]
        shape = cut.experts_TK.shape
        return Assignment(ranks_N.masked_fill(lost_N, -1).view(shape), slots_N.masked_fill(lost_N, -1).view(shape))

    def _spread_evenly(self, experts_N: torch.Tensor, lost_N: torch.Tensor) -> torch.Tensor:
        keyed_N = experts_N.masked_fill(lost_N, self.num_experts)
        own_E = count_keys(keyed_N, self.num_experts + 1)[:-1]
        everywhere = self.rows_are_everywhere
        counts_SE = own_E.unsqueeze(0) if everywhere else self.context.all_gather(own_E)  # S sources of rows
        counts_SE = counts_SE.cpu().numpy()  # host sync
        free_SE = counts_SE if everywhere else counts_SE * ~self.holds_WE
        fixed_W = 0 * self.holds_WE.sum(1) if everywhere else (counts_SE * self.holds_WE).sum(1)
        ends_EW = spread_rows(free_SE.sum(0), fixed_W, self.holds_WE).cumsum(1)
        before_E = free_SE[: 0 if everywhere else self.context.rank].sum(0)
        device = experts_N.device
        return ranks_in_turn(
            experts_N, torch.from_numpy(before_E).to(device), torch.from_numpy(ends_EW).to(device), lost_N
        )
