"""Plans which ranks hold which experts, from a routing trace: ``python tools/plan_experts.py TRACE --world_size 4``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixtralkit.cli import run_tool
from mixtralkit.config import ModelConfig, parse_dtype
from mixtralkit.planning.cost import ModelShape, ShadowModel
from mixtralkit.planning.formats import save_plan
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.plan_plot import plot_plan
from mixtralkit.planning.policies.affinity import affinity
from mixtralkit.planning.policies.auto import auto
from mixtralkit.planning.policies.balanced import balanced
from mixtralkit.planning.policies.hot_cold import hot_cold
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.quality import measure
from mixtralkit.planning.policies.shadow import shadow
from mixtralkit.planning.policies.two_phase import two_phase
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import sample_routing
from mixtralkit.planning.trace import RoutingTrace, load_loads

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FORMATS = {"mixtralkit": "plan", "sglang": "sglang", "tensorrt_llm": "tensorrt", "vllm": "vllm", "exflow": "exflow"}


@dataclass(frozen=True)
class _Input:
    """What a policy may need. ``trace`` is None where the file holds only loads."""

    trace: RoutingTrace | None
    loads_LE: np.ndarray
    world_size: int
    ranks_per_node: int | None
    budget: Budget
    shape: ModelShape

    def tokens(self, policy: str) -> RoutingTrace:
        if self.trace is None:
            raise ValueError(f"policy {policy} needs every token's experts, and the file holds only loads")
        return self.trace


def plan_experts(
    trace: Path,
    policy: str = "auto",
    world_size: int = 4,
    output: Path = Path("plan.json"),
    format: str = "mixtralkit",
    num_experts: int | None = None,
    ranks_per_node: int | None = None,
    memory_gb: float | None = None,
    slots_per_rank: int | None = None,
    hot_experts: int | None = None,
    cold: str = "balanced",
    hot_per: str = "rank",
    cold_capacity_factor: float | None = None,
    cold_token_percent: float = 1.0,
    overflow: str = "drop",
    cut_order: str = "weight",
    load_cap: float | None = None,
    num_groups: int | None = None,
    finetune_threshold: float | None = None,
    shadow_steps: float = 1.0,
    batch: int = 64,
    layout: str = "ep",
    model: Path = CONFIGS / "models" / "mixtral-8x7b.json",
    dtype: str = "bfloat16",
    hardware: Path = CONFIGS / "hardware" / "h200.json",
    plot: Path | None = None,
) -> None:
    """Plans which ranks hold which experts, writes the plan, and prints its figures; the last line is JSON.

    Figures are those of the trace that the plan was made from.

    Args:
        trace: routing trace (.npz, .npy), or SGLang's recorded loads (.pt).
        policy: contiguous, hot_cold, two_phase, affinity, balanced, shadow or auto (docs/planning.md).
        world_size: ranks to plan for.
        output: file for the plan.
        format: mixtralkit, sglang, tensorrt_llm, vllm or exflow.
        num_experts: experts of the model, for a trace that does not say.
        ranks_per_node: ranks of one machine; all ranks are on one without it.
        memory_gb: most memory for expert weights on each rank, in 10⁹ bytes, all layers together.
        slots_per_rank: most experts on each rank in each layer; without this and memory_gb no replicas are made,
            except what hot_experts asks for.
        hot_experts: hot_cold: experts of each layer on every rank; without it as many as the budget allows.
        cold: hot_cold: balanced or contiguous placement of the other experts.
        hot_per: hot_cold: a copy of each hot expert on every rank, or on one rank of every node.
        cold_capacity_factor: hot_cold: rows that a cold expert takes, as a multiple of its even share; exact without.
        cold_token_percent: hot_cold: part (0, 1] of that capacity which is sent.
        overflow: hot_cold: drop or reroute rows over the capacity.
        cut_order: hot_cold: which rows these are; weight keeps the heaviest choices, arrival the first.
        load_cap: affinity: most load of a rank in a layer, as a multiple of the mean.
        num_groups: balanced: groups of experts that stay on one node each (hierarchical); global without it.
        finetune_threshold: two_phase: total-variation distance above which a layer is corrected; Lina's rule without.
        shadow_steps: shadow: steps over which sending the weights is paid.
        batch: shadow and auto: tokens of a step on each rank.
        layout: auto: how the plan will run: ep, static, two_stage, coherent, tp_ep, or peer, by the hardware's fused.
        model: params.json or config.json with the sizes of the model.
        dtype: of the weights.
        hardware: machine for shadow and auto, configs/hardware/*.json.
        plot: file for a picture of loads and crossings, layer by layer.
    """
    if format not in FORMATS:
        raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
    makers: dict[str, Callable[[_Input], ExpertPlan]] = {
        "contiguous": lambda g: contiguous(*g.loads_LE.shape, g.world_size),
        "hot_cold": lambda g: hot_cold(
            g.loads_LE, g.world_size, hot_experts, g.budget, cold, _ring(hot_per, g.ranks_per_node),
            cold_capacity_factor, cold_token_percent, overflow, cut_order,
        ),
        "two_phase": lambda g: _two_phase(g, finetune_threshold),
        "affinity": lambda g: affinity(
            g.tokens("affinity").transitions_LEE(), g.world_size, g.ranks_per_node, g.budget, g.loads_LE, load_cap
        ),
        "balanced": lambda g: balanced(g.loads_LE, g.world_size, g.budget, g.ranks_per_node, num_groups),
        "shadow": lambda g: shadow(
            g.loads_LE, g.world_size, ShadowModel.from_hardware(g.shape, Hardware.load(hardware)),
            batch * g.world_size * g.shape.top_k, shadow_steps, g.budget,
        ),
        "auto": lambda g: _auto(g, Hardware.load(hardware), Execution(layout, batch, fused=layout == "peer")),
    }  # fmt: skip
    if policy not in makers:
        raise ValueError(f"policy ({policy!r}) must be one of {', '.join(makers)}")
    given = _read(trace, num_experts, world_size, ranks_per_node, model, dtype, slots_per_rank, memory_gb)
    started = time.perf_counter()
    plan = replace(makers[policy](given), ranks_per_node=ranks_per_node)
    seconds = time.perf_counter() - started
    given.budget.require(int(plan.holds_LWE.sum(2).max()), plan.num_layers, f"policy {policy}")
    save_plan(plan, output, FORMATS[format])
    if plot is not None:
        plot_plan(plan, given.loads_LE, given.trace and given.trace.transitions_LEE(), plot)
    print(f"{output}: {plan.policy}, {plan.num_layers} layers, {plan.num_experts} experts on {world_size} ranks")
    _print_notes(plan)
    print(json.dumps(_figures(plan, given, seconds)))


def _read(
    path: Path, num_experts: int | None, world_size: int, ranks_per_node: int | None, model: Path, dtype: str,
    slots_per_rank: int | None, memory_gb: float | None,
) -> _Input:  # fmt: skip
    if world_size < 1:
        raise ValueError(f"world_size ({world_size}) must be at least 1")
    trace = None if path.suffix in (".pt", ".pth") else RoutingTrace.load(path, num_experts)
    loads_LE = load_loads(path, num_experts) if trace is None else trace.loads_LE()
    shape = ModelShape.of(ModelConfig.from_file(model), parse_dtype(dtype).itemsize)
    shape = replace(shape, num_experts=loads_LE.shape[1], top_k=shape.top_k if trace is None else trace.top_k)
    budget = Budget(slots_per_rank, memory_gb, shape.expert_bytes)
    budget.slots(*loads_LE.shape, world_size)
    return _Input(trace, loads_LE, world_size, ranks_per_node, budget, shape)


def _ring(hot_per: str, ranks_per_node: int | None) -> int:
    if hot_per not in ("rank", "node"):
        raise ValueError(f"hot_per ({hot_per!r}) must be 'rank' or 'node'")
    if hot_per == "node" and ranks_per_node is None:
        raise ValueError("hot_per ('node') needs ranks_per_node")
    return 1 if hot_per == "rank" else ranks_per_node


def _two_phase(given: _Input, threshold: float | None) -> ExpertPlan:
    """Estimated from the first half of the trace, corrected by the counts of the second."""
    if given.trace is None:
        return two_phase(given.loads_LE, given.world_size, budget=given.budget)
    profile, batch = given.trace.split(0.5)
    return two_phase(profile.loads_LE(), given.world_size, batch.loads_LE(), given.trace.top_k, threshold, given.budget)


def _auto(given: _Input, hardware: Hardware, execution: Execution) -> ExpertPlan:
    trace = given.trace
    if trace is None:
        trace = sample_routing(given.loads_LE, 2 * execution.batch * given.world_size, given.shape.top_k)
    return auto(trace, given.world_size, given.shape, hardware, execution, given.budget, given.ranks_per_node)


def _figures(plan: ExpertPlan, given: _Input, seconds: float) -> dict[str, object]:
    quality = measure(plan, given.loads_LE, given.trace and given.trace.transitions_LEE())
    return {
        "policy": plan.policy,
        "crossings_per_token": quality.crossings_per_token,
        "uniform_crossings_per_token": quality.uniform_crossings_per_token,
        "node_crossings_per_token": quality.node_crossings_per_token,
        "balancedness_mean_over_max": quality.balancedness_mean_over_max,
        "max_over_mean": quality.max_over_mean,
        "memory_gb_per_rank": quality.memory_gb_per_rank(plan.num_layers, given.shape.expert_bytes),
        "seconds": seconds,
    }


def _print_notes(plan: ExpertPlan) -> None:
    """What a policy has to say beside its plan."""
    meta = plan.meta
    if plan.policy == "auto":
        print(
            f"chosen: {meta['chosen']}, expected {meta['expected_step_s'] * 1e3:.3f} ms a step of {meta['batch']} "
            f"tokens a rank on {meta['hardware']} ({meta['layout']})"
        )
        for name, step_s in sorted(meta["candidates_step_s"].items(), key=lambda item: item[1]):
            print(f"  {step_s * 1e3:9.3f} ms  {name}")
    elif plan.policy == "affinity":
        print(
            f"{'exact' if meta['exact'] else 'not proven to be the best'}; "
            f"no placement has fewer than {meta['crossings_bound']:.3f} crossings a token"
        )
    elif plan.policy == "two_phase" and meta:
        print(
            f"estimates right in {meta['estimates_right']:.0%} of the layers, corrected in {meta['corrected']:.0%}, "
            f"mean distance {meta['mean_distance']:.3f}"
        )


if __name__ == "__main__":
    run_tool(plan_experts)
