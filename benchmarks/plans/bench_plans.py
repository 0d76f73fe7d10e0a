"""Which policy is worth what on routing it has not seen.

    python -m benchmarks.plans.bench_plans TRACE [--check OTHER]

Every policy plans from one trace and is measured on another: a second file, or the half that was held out. Times are
predicted (``docs/cost-model.md``), crossings and balance counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mixtralkit.cli.run import run_tool
from mixtralkit.config import ModelConfig
from mixtralkit.planning.cost import ModelShape, ShadowModel
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from mixtralkit.planning.policies.affinity import affinity
from mixtralkit.planning.policies.balanced import balanced
from mixtralkit.planning.policies.hot_cold import hot_cold
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.quality import measure
from mixtralkit.planning.policies.shadow import shadow
from mixtralkit.planning.policies.two_phase import two_phase
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.search import auto, fill_steps
from mixtralkit.planning.simulate import simulate
from mixtralkit.planning.trace import RoutingTrace

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHADOW_STEPS = 1000
HEADS = (
    "ranks", "policy", "GB a rank", "crossings, fit", "crossings", "mean/max, fit", "mean/max", "max/mean",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a step runs on, and how many tokens it has on each rank."""

    shape: ModelShape
    hardware: Hardware
    batches: tuple[int, ...]


def bench_plans(
    trace: Path,
    check: Path | None = None,
    num_experts: int | None = None,
    world_sizes: tuple[int, ...] = (2, 4, 8),
    batches: tuple[int, ...] = (64, 1024),
    more_slots: int = 1,
    model: Path = CONFIGS / "models" / "mixtral-8x7b.json",
    hardware: Path = CONFIGS / "hardware" / "h200.json",
) -> None:
    """Prints a table of all policies; the last line is JSON.

    Args:
        trace: routing to plan from.
        check: routing to measure on; without it half of the trace is held out.
        num_experts: experts of the model, for traces that do not say.
        world_sizes: numbers of ranks.
        batches: tokens of a step on each rank, to predict its time.
        more_slots: slots on each rank beyond those that hold every expert once, for the policies that replicate.
        model: sizes of the model; its layers are those of the trace.
        hardware: machine of the predicted times.
    """
    fit = RoutingTrace.load(trace, num_experts)
    fit, other = fit.split(0.5) if check is None else (fit, RoutingTrace.load(check, num_experts))
    shape = replace(ModelShape.of(ModelConfig.from_file(model)), num_experts=fit.num_experts, top_k=fit.top_k)
    machine = Machine(shape, Hardware.load(hardware), batches)
    heads = [*HEADS, *(f"ms, batch {batch}" for batch in batches)]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    rows = []
    for world_size in world_sizes:
        for name, make in _policies(fit, world_size, more_slots, machine).items():
            rows.append(dict(zip(heads, [world_size, name, *_figures(make(), fit, other, machine)], strict=True)))
            cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in rows[-1].values())
            print("| " + " | ".join(cells) + " |", flush=True)
    about = {"fit_tokens": fit.num_tokens, "check_tokens": other.num_tokens, "hardware": machine.hardware.name}
    print(json.dumps({**about, "rows": rows}))


def _policies(
    fit: RoutingTrace, world_size: int, more_slots: int, machine: Machine
) -> dict[str, Callable[[], ExpertPlan]]:
    loads_LE, sizes = fit.loads_LE(), (fit.num_layers, fit.num_experts, world_size)
    few = -(-fit.num_experts // world_size)
    budget = Budget(slots_per_rank=few + more_slots)
    profile, batch = fit.split(0.5)
    costs = ShadowModel.from_hardware(machine.shape, machine.hardware)
    rows = max(machine.batches) * world_size * fit.top_k
    more = f"{few + more_slots} slots"
    policies = {
        "contiguous": lambda: contiguous(*sizes),
        f"balanced, {few} slots": lambda: balanced(loads_LE, world_size),
        f"balanced, {more}": lambda: balanced(loads_LE, world_size, budget),
        f"hot_cold, {more}": lambda: hot_cold(loads_LE, world_size, budget=budget),
        f"two_phase, {more}": lambda: two_phase(
            profile.loads_LE(), world_size, batch.loads_LE(), fit.top_k, budget=budget
        ),
        f"shadow, {more}": lambda: shadow(loads_LE, world_size, costs, rows, SHADOW_STEPS, budget),
        **{
            f"auto for batch {size}, {more}": lambda size=size: auto(
                fit, world_size, machine.shape, machine.hardware, Execution(batch=size), budget
            )
            for size in machine.batches
        },
        "everywhere": lambda: everywhere(*sizes),
    }
    if fit.num_experts % world_size == 0:
        policies["affinity"] = lambda: affinity(fit.transitions_LEE(), world_size, bound=0)
    return policies


def _figures(plan: ExpertPlan, fit: RoutingTrace, other: RoutingTrace, machine: Machine) -> list[float]:
    on_fit, on_other = (measure(plan, trace.loads_LE(), trace.transitions_LEE()) for trace in (fit, other))
    milliseconds = [
        simulate(
            plan, fill_steps(other, batch * plan.world_size), machine.shape, machine.hardware, Execution(batch=batch)
        ).step_s * 1e3
        for batch in machine.batches
    ]  # fmt: skip
    return [
        on_other.memory_gb_per_rank(plan.num_layers, machine.shape.expert_bytes),
        on_fit.crossings_per_token,
        on_other.crossings_per_token,
        on_fit.balancedness_mean_over_max,
        on_other.balancedness_mean_over_max,
        on_other.max_over_mean,
        *milliseconds,
    ]


if __name__ == "__main__":
    run_tool(bench_plans)
