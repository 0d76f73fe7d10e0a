"""FasterMoE's choice of shadowed experts, made once from a profile and kept."""

from __future__ import annotations

import numpy as np

from mixtralkit.planning.cost import ShadowModel, choose_shadows
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.hot_cold import most_hot, place_hot
from mixtralkit.planning.policies.inputs import Budget, checked_loads


def shadow(
    loads_LE: np.ndarray,
    world_size: int,
    model: ShadowModel,
    rows: float,
    steps: float = 1.0,
    budget: Budget | None = None,
) -> ExpertPlan:
    """Experts that FasterMoE would shadow, on every rank; the others once, packed evenly.

    A standing shadow is sent once and serves many steps, so what it saves is that of ``steps`` steps.

    Args:
        loads_LE: rows of each expert in a profile; only their shares count.
        rows: routed rows of a step, all ranks together (tokens · experts per token).
        steps: how many steps a shadow stays; 1 is FasterMoE's own decision.

    Raises:
        ValueError: for rows or steps not above 0, or a budget that cannot hold every expert once.
    """
    loads_LE = checked_loads(loads_LE, world_size)
    num_layers, num_experts = loads_LE.shape
    for name, value in (("rows", rows), ("steps", steps)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} ({value}) must be a number above 0")
    budget = budget or Budget()
    budget.slots(num_layers, num_experts, world_size)
    most = budget.most_slots(num_layers, num_experts)
    rows_LE = loads_LE / loads_LE.sum(1, keepdims=True) * rows * steps
    fits = num_experts if most is None else most_hot(num_experts, world_size, most)
    hot_L = [tuple(sorted(choose_shadows(rows_E, model, most=fits))) for rows_E in rows_LE]
    return ExpertPlan(
        place_hot(loads_LE, hot_L, world_size),
        num_experts,
        policy="shadow",
        meta={"rows": rows, "steps": steps, "shadows": [len(hot) for hot in hot_L]},
    )
