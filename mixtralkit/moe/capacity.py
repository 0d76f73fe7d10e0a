"""Rows over a cold expert's capacity: which are cut, and where they may go instead.

Pangu's rule (see docs/hot-cold.md): an expert that is computed elsewhere takes at most
``int(ceil(K·T·capacity_factor / E) · cold_token_percent)`` of a rank's T rows. Local experts take all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from mixtralkit.moe.router import Routing
from mixtralkit.ops.counting import count_keys
from mixtralkit.planning.plan import ExpertPlan


@dataclass(frozen=True)
class CutRouting:
    """Choices after the capacity.

    Attributes:
        experts_TK: int64 expert of each choice, -1 where the choice was dropped.
        weights_TK: float32, zero where dropped.
        dropped, rerouted: int64 scalars on the device, choices of this rank's rows.
        is_cut: whether some choice may be -1.
        valid_T: as ``layer.StepRows`` has it; the dispatchers drop those rows' choices.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    dropped: torch.Tensor
    rerouted: torch.Tensor
    is_cut: bool = True
    valid_T: torch.Tensor | None = None

    @property
    def kept_TK(self) -> torch.Tensor:
        """``experts_TK``, -1 also in rows that only fill the shape."""
        return self.experts_TK if self.valid_T is None else self.experts_TK.masked_fill((self.valid_T < 0)[:, None], -1)

    def take(self, rows_N: torch.Tensor | slice) -> CutRouting:
        """Of some of the rows."""
        experts_NK, weights_NK = self.experts_TK[rows_N], self.weights_TK[rows_N]
        valid_N = None if self.valid_T is None else self.valid_T[rows_N]
        return replace(self, experts_TK=experts_NK, weights_TK=weights_NK, valid_T=valid_N)


def cold_capacity(plan: ExpertPlan, tokens: int | torch.Tensor, top_k: int) -> int | torch.Tensor | None:
    """Rows of ``tokens`` that a cold expert takes, on the device if ``tokens`` is there; None without a limit."""
    if plan.cold_capacity_factor is None:
        return None
    if isinstance(tokens, torch.Tensor):  # the same operations in the same precision
        share = top_k * tokens.double() * plan.cold_capacity_factor / plan.num_experts
        return (share.ceil() * plan.cold_token_percent).long()
    return int(math.ceil(top_k * tokens * plan.cold_capacity_factor / plan.num_experts) * plan.cold_token_percent)


def cut_to_capacity(
    routing: Routing,
    local_E: torch.Tensor,
    capacity: int | torch.Tensor | None,
    overflow: str,
    order: str = "weight",
    valid_T: torch.Tensor | None = None,
) -> CutRouting:
    """Keeps ``capacity`` choices of each cold expert, the heaviest or the first; the rest is dropped, or rerouted.

    Ties go to the earlier row, so the cut is the same on every run. ``reroute`` offers a choice to the row's
    next-best experts in turn, those that ``order`` prefers first, and takes the first with room; the row's weights
    become the softmax over the experts it ends with. A choice that finds no room is dropped: weight zero.

    Args:
        local_E: True for experts without a limit.
        capacity: rows; None returns the routing as it is.
        overflow: ``"drop"`` or ``"reroute"``.
        order: ``"weight"`` keeps the heaviest choices, ``"arrival"`` those of the first rows, as Pangu's slice does.
        valid_T: int64, negative for a row that only fills the shape, which takes no room and is not counted.
    """
    none = torch.zeros((), dtype=torch.int64, device=local_E.device)
    if capacity is None:
        return CutRouting(routing.experts_TK, routing.weights_TK, none, none, is_cut=False, valid_T=valid_T)
    num_experts, wanted_TK = len(local_E), routing.experts_TK
    if valid_T is not None:
        wanted_TK = wanted_TK.masked_fill((valid_T < 0)[:, None], num_experts)  # in nobody's queue
    worth_TK = routing.weights_TK if order == "weight" else torch.ones_like(routing.weights_TK)
    is_over_TK = _place_in_expert(wanted_TK, worth_TK, num_experts) >= capacity
    over_TK = is_over_TK & ~local_E[routing.experts_TK] & (wanted_TK < num_experts)
    if overflow == "drop":
        kept = routing.weights_TK.masked_fill(over_TK, 0.0)
        return CutRouting(routing.experts_TK.masked_fill(over_TK, -1), kept, over_TK.sum(), none, valid_T=valid_T)

    kept_TK = routing.experts_TK.masked_fill(over_TK, -1)
    filled_E = count_keys(wanted_TK.masked_fill(over_TK, num_experts), num_experts + 1)[:-1]
    room_E = torch.where(local_E, torch.full_like(filled_E, kept_TK.numel()), capacity - filled_E)
    experts_TK = _reroute(routing, kept_TK, room_E, worth_TK)
    chosen_TK = routing.logits_TE.gather(1, experts_TK.clamp(min=0)).masked_fill(experts_TK < 0, -torch.inf)
    # A row that lost no choice keeps its weights to the last bit; a row that lost all has only zeros.
    moved_T = over_TK.any(1, keepdim=True)
    weights_TK = torch.where(moved_T, chosen_TK.softmax(-1).nan_to_num(0.0), routing.weights_TK)
    dropped = (experts_TK < 0).sum()
    return CutRouting(experts_TK, weights_TK, dropped, over_TK.sum() - dropped, valid_T=valid_T)


def _reroute(routing: Routing, experts_TK: torch.Tensor, room_E: torch.Tensor, worth_TK: torch.Tensor) -> torch.Tensor:
    """Fills the holes (-1) of ``experts_TK`` with next-best experts while ``room_E`` lasts, the worthiest first."""
    top_k, num_experts = experts_TK.shape[1], routing.logits_TE.shape[1]
    order_TE = routing.logits_TE.argsort(dim=1, descending=True, stable=True)
    # The gate's own choices come first in the order, however equal logits were sorted.
    is_chosen_TE = torch.zeros_like(order_TE, dtype=torch.bool).scatter_(1, routing.experts_TK, True)
    order_TE = order_TE.gather(1, (~is_chosen_TE.gather(1, order_TE)).int().argsort(dim=1, stable=True))
    for place in range(top_k, num_experts):
        offered_T = order_TE[:, place]
        hole_TK = experts_TK < 0
        first_hole_TK = hole_TK & (hole_TK.cumsum(1) == 1)  # the heaviest choice that still looks for an expert
        wants_T = first_hole_TK.any(1)
        worth_T = (worth_TK * first_hole_TK).sum(1).masked_fill(~wants_T, -1.0)
        in_line_T = _place_in_expert(
            offered_T.masked_fill(~wants_T, num_experts)[:, None], worth_T[:, None], num_experts
        )[:, 0]
        accepted_T = wants_T & (in_line_T < room_E[offered_T])
        experts_TK = torch.where(first_hole_TK & accepted_T[:, None], offered_T[:, None], experts_TK)
        room_E = room_E - count_keys(offered_T.masked_fill(~accepted_T, num_experts), num_experts + 1)[:-1]
    return experts_TK


def _place_in_expert(experts_TK: torch.Tensor, worth_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """0 for an expert's worthiest choice, 1 for the next, …; equal ones in row order. Ids up to num_experts."""
    flat_N = experts_TK.flatten()
    by_worth_N = worth_TK.detach().flatten().argsort(descending=True, stable=True)
    order_N = by_worth_N[flat_N[by_worth_N].argsort(stable=True)]
    sorted_N = flat_N[order_N]
    counts = count_keys(sorted_N, num_experts + 1)
    start_N = (counts.cumsum(0) - counts)[sorted_N]
    index_N = torch.arange(len(flat_N), device=flat_N.device)
    return torch.empty_like(flat_N).scatter_(0, order_N, index_N - start_N).view_as(experts_TK)
