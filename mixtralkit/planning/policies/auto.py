"""One search for the fastest plan: every name of the registry, made from one part of a trace and timed on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.registry import Given, candidate_names, make_plan
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import sample_routing, simulate
from mixtralkit.planning.trace import RoutingTrace

_AS_FAST = 1.001
_MOST_TOKENS = 1 << 22  # of a step that repeats the trace; every candidate is replayed on it


@dataclass(frozen=True)
class Timed:
    """A plan by name, how it was run, and the mean seconds of a step on tokens that it was not made from."""

    name: str
    execution: Execution
    step_s: float
    slots_per_rank: float


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

    The one with the least mean held-out time, or among those within a thousandth the one with fewest slots, is made
    again from the whole trace; ``meta`` says which it is, the seconds a step expected of it, and those of every
    candidate, and those of the plan on the tokens it is made from.

    Args:
        shape, hardware: what ``simulate`` needs; ``shape`` of this trace's experts and choices.
        execution: None is ``exact`` with 64 tokens a rank.

    Raises:
        ValueError: for a budget that cannot hold every expert once, or a trace too short to be split.
    """
    execution = execution or Execution(batch=64)
    rows = (execution.batch or trace.num_tokens / world_size) * world_size * trace.top_k
    given = Given.of(
        trace, world_size, ranks_per_node=ranks_per_node, budget=budget or Budget(), shape=shape, hardware=hardware,
        rows=rows,
    )  # fmt: skip
    found = held_out(candidate_names(given, given.slots), given, [execution])
    chosen = fastest(found)
    plan = make_plan(chosen.name, given)
    again = simulate(plan, fill_steps(trace, _tokens(execution, given)), shape, hardware, execution)
    meta = {
        "chosen": chosen.name,
        "expected_step_s": chosen.step_s,
        "fitted_step_s": again.step_s,
        "candidates_step_s": {one.name: one.step_s for one in found},
        "dispatcher": execution.dispatcher,
        "batch": execution.batch,
        "hardware": hardware.name,
    }
    return replace(plan, policy="auto", meta=meta)


def fastest(found: Sequence[Timed]) -> Timed:
    """The least time; among those within a thousandth the one with fewest slots."""
    least = min(one.step_s for one in found)
    return min((one for one in found if one.step_s <= least * _AS_FAST), key=lambda one: one.slots_per_rank)


def held_out(
    names: Sequence[str], given: Given, executions: Sequence[Execution], most_steps: int | None = None
) -> list[Timed]:
    """Every plan under every execution, made from one half of the trace and timed on the other, then the other way.

    Without a trace tokens are drawn from the loads, from which the plans are made too.

    Args:
        most_steps: steps that are timed at most; None times all that the half has.
    """
    pairs = [(given.trace, given.trace)]
    if given.trace is not None:
        halves = given.trace.split(0.5)
        pairs = [halves, halves[::-1]]
    given = replace(given, options=given.options | {"bound": False})
    seconds_NX, slots_N = np.zeros((len(names), len(executions))), np.zeros(len(names))
    for fit, check in pairs:
        part = given if fit is None else replace(given, trace=fit, loads_LE=fit.loads_LE())
        plans = [make_plan(name, part) for name in names]
        slots_N += [plan.holds_LWE.sum(2).max(1).mean() / len(pairs) for plan in plans]
        for x, execution in enumerate(executions):
            steps = _steps(given, check, execution, most_steps)
            seconds_NX[:, x] += [
                simulate(plan, steps, given.shape, given.hardware, execution).step_s / len(pairs) for plan in plans
            ]
    return [
        Timed(name, execution, float(seconds_NX[n, x]), float(slots_N[n]))
        for n, name in enumerate(names)
        for x, execution in enumerate(executions)
    ]


def _tokens(execution: Execution, given: Given) -> int:
    """Of a step, all ranks together; without a batch those of the whole trace."""
    whole = 0 if given.trace is None else given.trace.num_tokens
    return execution.step_tokens or (execution.batch or 0) * given.world_size or whole


def _steps(given: Given, check: RoutingTrace | None, execution: Execution, most: int | None) -> RoutingTrace:
    tokens = _tokens(execution, given)
    if check is None:
        return sample_routing(given.loads_LE, tokens * (most or 1), given.shape.top_k)
    if most is None:
        return fill_steps(check, tokens)
    return check.take(np.arange(most * tokens) % check.num_tokens)


def auto_for(given: Given, execution: Execution) -> ExpertPlan:
    """``auto`` of the registry's input; where only loads are known tokens are drawn from them."""
    trace = given.trace
    if trace is None:
        tokens = 2 * (execution.batch or 64) * given.world_size
        trace = sample_routing(given.loads_LE, tokens, given.shape.top_k)
    return auto(trace, given.world_size, given.shape, given.hardware, execution, given.budget, given.ranks_per_node)


def fill_steps(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """The trace, begun again from its start until it fills whole steps of ``tokens`` tokens."""
    if tokens > max(_MOST_TOKENS, trace.num_tokens):
        raise ValueError(f"batch: a step of {tokens:,} tokens, all ranks together, must have at most {_MOST_TOKENS:,}")
    steps = -(-trace.num_tokens // tokens)
    return trace.take(np.arange(steps * tokens) % trace.num_tokens)
