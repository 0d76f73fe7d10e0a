"""Rows over a cold expert's capacity: which choices are cut, and where they may go instead.

Pangu's rule (docs/hot-cold.md): an expert that is computed elsewhere takes at most
``int(ceil(K·T·capacity_factor / E) · cold_token_percent)`` of a rank's T rows. Local experts take all. This is the
reference of ``ops/capacity``, and what the simulator replays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.planning.plan import ExpertPlan


@dataclass(frozen=True)
class CapacityRule:
    """Of a plan: how many rows a cold expert takes, which these are, and what becomes of the others."""

    num_experts: int
    factor: float
    percent: float = 1.0
    reroutes: bool = False
    by_weight: bool = True

    @classmethod
    def of(cls, plan: ExpertPlan) -> CapacityRule | None:
        """None for a plan without a limit."""
        if plan.cold_capacity_factor is None:
            return None
        by_weight = plan.cut_order == "weight"
        return cls(
            plan.num_experts, plan.cold_capacity_factor, plan.cold_token_percent, plan.overflow == "reroute", by_weight
        )

    def capacity(self, choices: int | torch.Tensor) -> int | torch.Tensor:
        """Rows that a cold expert takes where a rank's rows have ``choices`` of all experts, K·T; int64 as a tensor."""
        if isinstance(choices, torch.Tensor):
            return (torch.ceil(choices.double() * self.factor / self.num_experts) * self.percent).long()
        return int(math.ceil(choices * self.factor / self.num_experts) * self.percent)


@dataclass(frozen=True)
class CutChoices:
    """Choices after the capacity.

    Attributes:
        experts_TK: int64, -1 where a choice found no room and in rows that are not valid.
        over_TK: bool, choices that their expert had no room for.
        dropped, rerouted: int64 scalars on the device, of ``over_TK``.
    """

    experts_TK: torch.Tensor
    over_TK: torch.Tensor
    dropped: torch.Tensor
    rerouted: torch.Tensor


def cut_choices(
    experts_TK: torch.Tensor,
    worth_TK: torch.Tensor,
    local_GE: torch.Tensor,
    capacity_G: torch.Tensor,
    offers: Iterable[torch.Tensor] = (),
    group_T: torch.Tensor | None = None,
    valid_T: torch.Tensor | None = None,
) -> CutChoices:
    """Each group of rows keeps ``capacity_G`` choices of each of its cold experts, those of most worth.

    Ties go to the earlier row. Then the rows that lost choices are offered other experts, one offer after the other:
    each row's first open choice takes the offered expert if the row lacks it and it has room, rows by falling worth of
    that choice. On a GPU nothing waits for the host.

    Args:
        experts_TK: int64.
        worth_TK: weights for the heaviest, or all the same for the earliest.
        local_GE: bool, experts of each group without a limit.
        capacity_G: int64.
        offers: int64 [T] each, the next expert for every row; none drops what is over.
        group_T: int64 group of each row; None where there is one.
        valid_T: int64, negative for a row that counts for nothing.
    """
    (rows, top_k), num_experts = experts_TK.shape, local_GE.shape[1]
    counts_T1 = torch.ones(rows, 1, dtype=torch.bool, device=experts_TK.device)
    if valid_T is not None:
        counts_T1 = (valid_T >= 0)[:, None]
    group_T1 = experts_TK.new_zeros(rows, 1) if group_T is None else group_T[:, None]
    nobody, room_X = local_GE.numel(), torch.where(local_GE, rows * top_k, capacity_G[:, None]).flatten()
    room_X = torch.cat([room_X, room_X.new_zeros(1)])  # the last is the expert of choices that want none
    keys_TK = (group_T1 * num_experts + experts_TK).where(counts_T1, nobody)
    over_TK = counts_T1 & (_place_in_line(keys_TK, worth_TK) >= room_X[keys_TK])
    cut_TK = experts_TK.masked_fill(over_TK | ~counts_T1, -1)
    room_X = room_X - _count(keys_TK.masked_fill(over_TK, nobody), nobody + 1)
    at_N = slice(None)
    if experts_TK.device.type == "cpu":  # where shapes are free, only the rows with open choices
        at_N = over_TK.any(1).nonzero().squeeze(1)
    open_NK, wanted_NK, found_NK, worth_NK = over_TK[at_N], experts_TK[at_N], cut_TK[at_N], worth_TK[at_N]
    for offer_T in offers:
        if experts_TK.device.type == "cpu" and not open_NK.any():
            break
        offer_N1 = offer_T[at_N][:, None]
        first_NK = open_NK & (open_NK.cumsum(1) == 1)
        wants_N1 = first_NK.any(1, True) & ~((wanted_NK == offer_N1) | (found_NK == offer_N1)).any(1, True)
        keys_N1 = (group_T1[at_N] * num_experts + offer_N1).where(wants_N1, nobody)
        takes_N1 = wants_N1 & (_place_in_line(keys_N1, (worth_NK * first_NK).sum(1, True)) < room_X[keys_N1])
        room_X = room_X - _count(keys_N1.where(takes_N1, nobody), nobody + 1)
        found_NK = torch.where(first_NK & takes_N1, offer_N1, found_NK)
        open_NK = open_NK & ~(first_NK & takes_N1)
    cut_TK[at_N] = found_NK
    dropped = open_NK.sum()
    return CutChoices(cut_TK, over_TK, dropped, over_TK.sum() - dropped)


def cut_trace(
    plan: ExpertPlan, local_GE: np.ndarray, experts_TK: np.ndarray, weights_TK: np.ndarray | None, group_T: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Choices of a trace over the capacity become -1, or another expert; with the numbers dropped and rerouted.

    A trace does not know a row's next-best experts: ``reroute`` offers those after the row's first, by id. Without
    weights all choices are worth the same.

    Args:
        local_GE: True where a group of rows (a rank in a step) has the expert itself, which has no limit.
    """
    rule = CapacityRule.of(plan)
    if rule is None:
        return experts_TK, 0, 0
    ids_TK, group_T = torch.from_numpy(experts_TK.astype(np.int64)), torch.from_numpy(group_T.astype(np.int64))
    by_weight = weights_TK is not None and rule.by_weight
    worth_TK = torch.from_numpy(weights_TK.astype(np.float32)) if by_weight else torch.ones(ids_TK.shape)
    offers = _by_id(ids_TK, plan.num_experts) if rule.reroutes else ()
    capacity_G = rule.capacity(_count(group_T, len(local_GE)) * ids_TK.shape[1])
    cut = cut_choices(ids_TK, worth_TK, torch.from_numpy(local_GE), capacity_G, offers, group_T)
    return cut.experts_TK.numpy(), int(cut.dropped), int(cut.rerouted)


def _by_id(experts_TK: torch.Tensor, num_experts: int) -> Iterator[torch.Tensor]:
    """The experts after each row's first by id, from the last on to 0, without those that it has chosen."""
    chosen_TK = ((experts_TK - experts_TK[:, :1]) % num_experts).sort(dim=1).values
    for number in range(num_experts - experts_TK.shape[1]):
        after_T = torch.full_like(chosen_TK[:, 0], number)
        for taken_T in chosen_TK.unbind(1):
            after_T += after_T >= taken_T
        yield (experts_TK[:, 0] + after_T) % num_experts


def _place_in_line(keys_TK: torch.Tensor, worth_TK: torch.Tensor) -> torch.Tensor:
    """0 for the choice of most worth of each key, 1 for the next, …; equal ones in row order."""
    flat_N = keys_TK.flatten()
    by_worth_N = worth_TK.detach().flatten().argsort(descending=True, stable=True)
    order_N = by_worth_N[flat_N[by_worth_N].argsort(stable=True)]
    sorted_N = flat_N[order_N]
    index_N = torch.arange(len(flat_N), device=flat_N.device)
    is_first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    start_N = torch.where(is_first_N, index_N, 0).cummax(0).values if len(flat_N) else index_N
    return torch.empty_like(flat_N).scatter_(0, order_N, index_N - start_N).view_as(keys_TK)


def _count(keys: torch.Tensor, size: int) -> torch.Tensor:
    keys_N = keys.flatten()
    return torch.zeros(size, dtype=torch.int64, device=keys.device).scatter_add_(0, keys_N, torch.ones_like(keys_N))
