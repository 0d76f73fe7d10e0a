"""Tries the other policies within the budget and takes, for each layer, what the time model says is fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

_AS_FAST = 1.001  # times within a thousandth are equal: the plan with fewer slots is taken


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

    Candidates are made from one half of the trace and timed on the other, so that none wins by fitting noise. Where
    layers do not depend on each other each takes its own candidate. The winner is made again from the whole trace;
    ``meta`` says what was chosen, which seconds a step are expected and what every candidate and ``contiguous`` take.

    Args:
        shape, hardware: what ``simulate`` needs; ``shape`` of this trace's experts and choices.
        execution: None is ``ep`` with 64 tokens a rank.

    Raises:
        ValueError: for a budget that cannot hold every expert once, or a trace too short to be split.
    """
    budget = budget or Budget()
    execution = execution or Execution(batch=64)
    slots = budget.slots(trace.num_layers, trace.num_experts, world_size)
    fit, check = trace.split(0.5)
    check = fill_steps(check, (execution.batch or check.num_tokens) * world_size)
    recipes = _recipes(trace, world_size, slots, ranks_per_node, shape, hardware, execution)
    plans = {name: make(fit) for name, make in recipes.items()}
    found = {name: simulate(plan, check, shape, hardware, execution) for name, plan in plans.items()}
    seconds = {name: result.step_s for name, result in found.items()}
    name = _fastest(seconds, {name: _slots_of(plan).mean() for name, plan in plans.items()})
    names = [name] * trace.num_layers
    expected_s = seconds[name]
    if execution.layout != "coherent":
        names = [
            _fastest(
                {name: float(result.seconds_L[layer]) for name, result in found.items()},
                {name: _slots_of(plan)[layer] for name, plan in plans.items()},
            )
            for layer in range(trace.num_layers)
        ]
        expected_s = simulate(_mixed(plans, names), check, shape, hardware, execution).step_s
    chosen = _mixed({name: recipes[name](trace) for name in dict.fromkeys(names)}, names)
    meta = {
        "expected_step_s": expected_s,
        "contiguous_step_s": seconds["contiguous"],
        "candidates_step_s": seconds,
        "layers": names,
        "layout": execution.layout,
        "batch": execution.batch,
        "hardware": hardware.name,
    }
    return replace(chosen, policy="auto", ranks_per_node=ranks_per_node, meta=meta)


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


def _fastest(seconds: Mapping[str, float], slots: Mapping[str, float]) -> str:
    """Of those as fast as the fastest, the one with fewest slots, the first among equals."""
    least = min(seconds.values())
    return min((name for name in seconds if seconds[name] <= least * _AS_FAST), key=lambda name: slots[name])


def _slots_of(plan: ExpertPlan) -> np.ndarray:
    """Experts on the fullest rank of each layer."""
    return plan.holds_LWE.sum(2).max(1)


def _mixed(plans: Mapping[str, ExpertPlan], names: list[str]) -> ExpertPlan:
    """Each layer of the plan that is named for it."""
    first = plans[names[0]]
    most = max(plan.slots_LWS.shape[2] for plan in plans.values())
    slots_LWS = np.full((first.num_layers, first.world_size, most), -1)
    for layer, name in enumerate(names):
        own_WS = plans[name].slots_LWS[layer]
        slots_LWS[layer, :, : own_WS.shape[1]] = own_WS
    used = int((slots_LWS >= 0).any((0, 1)).nonzero()[0].max()) + 1
    return replace(first, slots_LWS=slots_LWS[:, :, :used])
