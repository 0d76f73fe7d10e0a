"""Policies by name for plans between steps: those that need no more than one layer's loads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixtralkit.engine.plan_judge import MoveJudge
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.registry import Given, make_plan
from mixtralkit.planning.search import auto
from mixtralkit.planning.simulate import sample_routing

# (rows of each expert in one layer [1, E], tokens of a rank's step) -> a plan of one layer
Policy = Callable[[np.ndarray, int], ExpertPlan]

BETWEEN_STEPS = ("contiguous", "hot_cold", "two_phase", "balanced", "shadow", "auto")
_AUTO_TOKENS = 4096  # at least so many are drawn from the loads for ``auto``, which halves them


def make_policy(
    name: str, model: Transformer, judge: MoveJudge, slots_per_rank: int | None = None, hot_experts: int | None = None
) -> Policy:
    """A policy by name.

    Args:
        name: contiguous, hot_cold, two_phase, balanced, shadow or auto; ``affinity`` needs more than loads.
        judge: has the machine for ``shadow`` and ``auto``.
        slots_per_rank: most experts of a rank in each layer; None for as many as the fullest rank has now.
        hot_experts: of ``hot_cold``; given without ``slots_per_rank``, it decides how many a rank has.

    Raises:
        ValueError: another name, or slots that cannot hold every expert or all hot ones.
    """
    plan = model.layout.plan
    world, num_experts, nodes = plan.world_size, plan.num_experts, plan.ranks_per_node
    if slots_per_rank is None and hot_experts is None:
        slots_per_rank = int(plan.holds_LWE.sum(2).max())
    budget = Budget(slots_per_rank)
    top_k = model.params.num_experts_per_tok
    options = {"shadow_steps": judge.steps} | ({} if hot_experts is None else {"hot_experts": hot_experts})

    def by_name(loads_1E: np.ndarray, tokens: int) -> ExpertPlan:
        rows = tokens * world * top_k
        given = Given(loads_1E, world, None, nodes, budget, judge.shape, judge.hardware, rows, options)
        return make_plan(name, given)

    def by_auto(loads_1E: np.ndarray, tokens: int) -> ExpertPlan:
        sample = sample_routing(loads_1E, max(_AUTO_TOKENS, 2 * tokens * world), top_k)
        return auto(sample, world, judge.shape, judge.hardware, judge.execution(tokens), budget, nodes)

    if name not in BETWEEN_STEPS:
        raise ValueError(f"policy ({name!r}) must be one of {', '.join(BETWEEN_STEPS)} for plans between steps")
    if hot_experts is not None and name != "hot_cold":
        raise ValueError(f"hot_experts ({hot_experts}) needs policy 'hot_cold', not {name!r}")
    policy = by_auto if name == "auto" else by_name
    policy(np.ones((1, num_experts)), 1)  # says now what would be wrong later
    return policy
