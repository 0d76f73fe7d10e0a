"""Hot experts on every rank, the others once (Pangu, MindFormers ``enable_cold_hot_expert``)."""

from __future__ import annotations

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
    cold_capacity_factor: float | None = None,
    cold_token_percent: float = 1.0,
    overflow: str = "drop",
) -> ExpertPlan:
    """The ``hot_experts`` most chosen experts of each layer on every rank, the lower id first among equals.

    Args:
        loads_LE: rows of each expert in a profile.
        hot_experts: None takes as many as the budget allows, and none without a budget.
        cold: where the others go: ``"balanced"`` heaviest first to the lightest rank, ``"contiguous"`` by id.
        cold_capacity_factor: and the next two, as in ``ExpertPlan``.

    Raises:
        ValueError: naming what the budget lacks, or an argument out of range.
    """
    loads_LE = checked_loads(loads_LE, world_size)
    num_layers, num_experts = loads_LE.shape
    budget = budget or Budget()
    if cold not in COLD:
        raise ValueError(f"cold ({cold!r}) must be one of {', '.join(COLD)}")
    hot = most_hot(num_experts, world_size, budget.slots(num_layers, num_experts, world_size))
    if hot_experts is not None:
        hot = hot_experts
    if not 0 <= hot <= num_experts:
        raise ValueError(f"hot_experts ({hot}) must lie in 0 … num_experts ({num_experts})")
    budget.require(_slots_with(hot, num_experts, world_size), num_layers, f"{hot} hot experts on every rank")
    slots = [_place(loads_E, hot, world_size, cold) for loads_E in loads_LE]
    return ExpertPlan(
        np.array(slots),
        num_experts,
        policy="hot_cold",
        cold_capacity_factor=cold_capacity_factor,
        cold_token_percent=cold_token_percent,
        overflow=overflow,
        meta={"hot_experts": hot, "cold": cold},
    )


def place_hot(loads_LE: np.ndarray, hot_L: list[tuple[int, ...]], world_size: int) -> np.ndarray:
    """Slots [L, W, S] with the named experts of each layer on every rank and the others packed evenly, once."""
    layers = [_with_hot(loads_E, list(hot), world_size, "balanced") for loads_E, hot in zip(loads_LE, hot_L, strict=True)]
    most = max(len(rank) for layer in layers for rank in layer)
    return np.array([[[*rank, *[-1] * (most - len(rank))] for rank in layer] for layer in layers])


def _slots_with(hot: int, num_experts: int, world_size: int) -> int:
    return hot + -(-(num_experts - hot) // world_size)


def most_hot(num_experts: int, world_size: int, slots: int) -> int:
    """Most experts that can be on every rank while all others still find one of ``slots`` slots a rank."""
    return max(hot for hot in range(num_experts + 1) if _slots_with(hot, num_experts, world_size) <= slots)


def _place(loads_E: np.ndarray, hot: int, world_size: int, cold: str) -> list[list[int]]:
    order = np.lexsort((np.arange(len(loads_E)), -loads_E))
    ranks = _with_hot(loads_E, sorted(order[:hot].tolist()), world_size, cold)
    most = _slots_with(hot, len(loads_E), world_size)
    return [[*rank, *[-1] * (most - len(rank))] for rank in ranks]


def _with_hot(loads_E: np.ndarray, hot: list[int], world_size: int, cold: str) -> list[list[int]]:
    others = [e for e in range(len(loads_E)) if e not in hot]
    pack = pack_once if cold == "balanced" else pack_in_order
    return [[*hot, *sorted(others[i] for i in rank)] for rank in pack(loads_E[others], world_size)]
