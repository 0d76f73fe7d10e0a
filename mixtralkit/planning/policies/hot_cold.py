"""Hot experts on every rank, or every node, the others once (Pangu, MindFormers ``enable_cold_hot_expert``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.inputs import Budget, checked_loads
from mixtralkit.planning.policies.packing import pack_in_order, pack_once

COLD = ("balanced", "contiguous")


def hot_cold(
    loads_LE: np.ndarray,
    world_size: int,
    hot_experts: int | None = None,
    budget: Budget | None = None,
    cold: str = "balanced",
    ring: int = 1,
    cold_capacity_factor: float | None = None,
    cold_token_percent: float = 1.0,
    overflow: str = "drop",
    cut_order: str = "weight",
) -> ExpertPlan:
    """The ``hot_experts`` most chosen experts of each layer in every ring, the lower id first among equals.

    Args:
        loads_LE: rows of each expert in a profile.
        hot_experts: None takes as many as the budget allows, and none without a budget.
        cold: where the others go: ``"balanced"`` heaviest first to the lightest rank, ``"contiguous"`` by id.
        ring: consecutive ranks that share one copy of a hot expert: 1 for one on every rank, or the ranks of a node.
        cold_capacity_factor: and the next two, as in ``ExpertPlan``.

    Raises:
        ValueError: naming what the budget lacks, or an argument out of range.
    """
    loads_LE = checked_loads(loads_LE, world_size)
    num_layers, num_experts = loads_LE.shape
    budget = budget or Budget()
    if cold not in COLD:
        raise ValueError(f"cold ({cold!r}) must be one of {', '.join(COLD)}")
    if ring < 1 or world_size % ring:
        raise ValueError(f"ring ({ring}) must divide world_size ({world_size})")
    hot = hot_experts
    if hot is None:
        hot = most_hot(num_experts, world_size, budget.slots(num_layers, num_experts, world_size), ring)
    if not 0 <= hot <= num_experts:
        raise ValueError(f"hot_experts ({hot}) must lie in 0 … num_experts ({num_experts})")
    slots = _slots_with(hot, num_experts, world_size, ring)
    budget.require(slots, num_layers, f"{hot} hot experts")
    order_LE = np.argsort(-loads_LE, axis=1, kind="stable")
    slots_LWS = place_hot(loads_LE, [sorted(order_E[:hot].tolist()) for order_E in order_LE], world_size, cold, ring)
    return ExpertPlan(
        slots_LWS,
        num_experts,
        policy="hot_cold",
        cold_capacity_factor=cold_capacity_factor,
        cold_token_percent=cold_token_percent,
        overflow=overflow,
        cut_order=cut_order,
        meta={"hot_experts": hot, "cold": cold, "ring": ring},
    )


def most_hot(num_experts: int, world_size: int, slots: int, ring: int = 1) -> int:
    """Most experts that can be in every ring while all others still find one of ``slots`` slots a rank."""
    counts = range(num_experts + 1)
    return max(hot for hot in counts if _slots_with(hot, num_experts, world_size, ring) <= slots)


def place_hot(
    loads_LE: np.ndarray, hot_L: Sequence[Sequence[int]], world_size: int, cold: str = "balanced", ring: int = 1
) -> np.ndarray:
    """Slots [L, W, S] with the named experts of each layer in every ring and the others once, as ``cold`` says."""
    layers = [_place(loads_E, list(hot), world_size, cold, ring) for loads_E, hot in zip(loads_LE, hot_L, strict=True)]
    most = max(len(rank) for layer in layers for rank in layer)
    return np.array([[[*rank, *[-1] * (most - len(rank))] for rank in layer] for layer in layers])


def _slots_with(hot: int, num_experts: int, world_size: int, ring: int) -> int:
    cold_of_ring = -(-(num_experts - hot) * ring // world_size)
    return -(-(hot + cold_of_ring) // ring)


def _place(loads_E: np.ndarray, hot: list[int], world_size: int, cold: str, ring: int) -> list[list[int]]:
    """Others to rings, then each ring's experts to its ranks."""
    pack = pack_once if cold == "balanced" else pack_in_order
    others = [expert for expert in range(len(loads_E)) if expert not in hot]
    share_E = loads_E.copy()
    share_E[hot] /= world_size // ring
    ranks = []
    for items in pack(loads_E[others], world_size // ring):
        experts = sorted([*hot, *(others[item] for item in items)])
        ranks += [sorted(experts[item] for item in rank) for rank in pack(share_E[experts], ring)]
    return ranks
