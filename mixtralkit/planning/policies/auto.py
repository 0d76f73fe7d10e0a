"""Tries the other policies within the budget and takes what the time model says is fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mixtralkit.planning.cost import ModelShape, ShadowModel
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from mixtralkit.planning.policies.affinity import affinity
from mixtralkit.planning.policies.balanced import balanced
from mixtralkit.planning.policies.hot_cold import hot_cold, most_hot
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.shadow import shadow
from mixtralkit.planning.policies.two_phase import two_phase
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import simulate
from mixtralkit.planning.trace import RoutingTrace

Recipe = Callable[[RoutingTrace], ExpertPlan]

_AS_FAST = 1.001


def auto(
    trace: RoutingTrace,
    world_size: int,
    shape: ModelShape,
    hardware: Hardware,
    execution: Execution | None = None,
    budget: Budget | None = None,
    ranks_per_node: int | None = None,
) -> ExpertPlan:
    """The plan with the least predicted time of a step under the budget.

    Candidates are made from one half of the trace and timed on the other, then the other way round, so that none wins
    by fitting noise. The one with the least mean time, or among those within a thousandth the one with fewest slots,
    is made again from the whole trace; ``meta`` says which it is, the seconds a step expected of it, and those of
    every candidate.

    Args:
        shape, hardware: what ``simulate`` needs; ``shape`` of this trace's experts and choices.
        execution: None is ``ep`` with 64 tokens a rank.

    Raises:
        ValueError: for a budget that cannot hold every expert once, or a trace too short to be split.
    """
    budget = budget or Budget()
    execution = execution or Execution(batch=64)
    slots = budget.slots(trace.num_layers, trace.num_experts, world_size)
    recipes = _recipes(trace, world_size, slots, ranks_per_node, shape, hardware, execution)
    halves = trace.split(0.5)
    seconds, used = dict.fromkeys(recipes, 0.0), dict.fromkeys(recipes, 0.0)
    for fit, check in (halves, halves[::-1]):
        check = fill_steps(check, (execution.batch or check.num_tokens) * world_size)
        for name, make in recipes.items():
            plan = make(fit)
            seconds[name] += simulate(plan, check, shape, hardware, execution).step_s / 2
            used[name] += float(plan.holds_LWE.sum(2).max(1).mean()) / 2
    least = min(seconds.values())
    chosen = min((name for name in seconds if seconds[name] <= least * _AS_FAST), key=lambda name: used[name])
    meta = {
        "chosen": chosen,
        "expected_step_s": seconds[chosen],
        "candidates_step_s": seconds,
        "layout": execution.layout,
        "batch": execution.batch,
        "hardware": hardware.name,
    }
    return replace(recipes[chosen](trace), policy="auto", meta=meta)


def fill_steps(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """The trace, begun again from its start until it fills whole steps of ``tokens`` tokens."""
    steps = -(-trace.num_tokens // tokens)
    return trace.take(np.arange(steps * tokens) % trace.num_tokens)


def _recipes(
    trace: RoutingTrace,
    world_size: int,
    slots: int,
    ranks_per_node: int | None,
    shape: ModelShape,
    hardware: Hardware,
    execution: Execution,
) -> dict[str, Recipe]:
    """Every policy, with numbers of slots and of hot experts up to what the budget allows, each twice the last."""
    num_layers, num_experts = trace.num_layers, trace.num_experts
    on_nodes = {"ranks_per_node": ranks_per_node}
    first = contiguous(num_layers, num_experts, world_size)
    recipes: dict[str, Recipe] = {"contiguous": lambda _: replace(first, **on_nodes)}
    if num_experts % world_size == 0:
        recipes["affinity"] = lambda t: affinity(t.transitions_LEE(), world_size, ranks_per_node)
    fewest = -(-num_experts // world_size)
    for count in (fewest + more for more in (0, *_doubling(slots - fewest))):
        few = Budget(slots_per_rank=count)
        recipes[f"balanced, {count} slots"] = lambda t, b=few: balanced(t.loads_LE(), world_size, b, ranks_per_node)
        recipes[f"two_phase, {count} slots"] = lambda t, b=few: replace(
            two_phase(t.loads_LE(), world_size, top_k=t.top_k, budget=b), **on_nodes
        )
    for hot in _doubling(most_hot(num_experts, world_size, slots)):
        recipes[f"hot_cold, {hot} hot"] = lambda t, h=hot: replace(hot_cold(t.loads_LE(), world_size, h), **on_nodes)
    rows = (execution.batch or trace.num_tokens / world_size) * world_size * trace.top_k
    costs = ShadowModel.from_hardware(shape, hardware)
    recipes["shadow"] = lambda t: replace(
        shadow(t.loads_LE(), world_size, costs, rows, budget=Budget(slots_per_rank=slots)), **on_nodes
    )
    if slots >= num_experts:
        whole = everywhere(num_layers, num_experts, world_size)
        recipes["everywhere"] = lambda _: replace(whole, **on_nodes)
    return recipes


def _doubling(most: int) -> list[int]:
    """1, 2, 4 … and ``most``; nothing below 1."""
    return sorted({min(2**i, most) for i in range(most.bit_length() + 1)}) if most > 0 else []
