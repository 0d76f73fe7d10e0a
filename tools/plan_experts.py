"""Plans which ranks hold which experts, from a routing trace: ``python tools/plan_experts.py TRACE --world_size 4``."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from mixtralkit.cli import run_tool
from mixtralkit.config import ModelConfig, parse_dtype
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.formats import save_plan
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.plan_plot import plot_plan
from mixtralkit.planning.policies.auto import auto_for
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.quality import measure, measure_held_out
from mixtralkit.planning.policies.registry import POLICIES, Given, make_plan
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.trace import load_routing

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FORMATS = {"mixtralkit": "plan", "sglang": "sglang", "tensorrt_llm": "tensorrt", "vllm": "vllm", "exflow": "exflow"}


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
    dispatcher: str = "exact",
    model: Path = CONFIGS / "models" / "mixtral-8x7b.json",
    dtype: str = "bfloat16",
    hardware: Path = CONFIGS / "hardware" / "h200.json",
    plot: Path | None = None,
) -> None:
    """Plans which ranks hold which experts, writes the plan, and prints its figures; the last line is JSON.

    Figures are those of the trace that the plan was made from, and those of a plan of half of it on the other half.

    Args:
        trace: routing trace (.npz, .npy), or SGLang's recorded loads (.pt).
        policy: contiguous, hot_cold, two_phase, affinity, balanced, shadow, everywhere or auto, or a plan by name as
            balanced+4 or hot_cold/node+2 (docs/planning.md).
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
        dispatcher: auto: how the plan will run: exact, static, two_stage, coherent, replicated or symmetric.
        model: params.json or config.json with the sizes of the model.
        dtype: of the weights.
        hardware: machine for shadow and auto, configs/hardware/*.json.
        plot: file for a picture of loads and crossings, layer by layer.
    """
    if format not in FORMATS:
        raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
    if policy != "auto" and policy.partition("+")[0] not in POLICIES:
        raise ValueError(f"policy ({policy!r}) must be one of {', '.join([*POLICIES, 'auto'])}")
    options = {
        "hot_experts": hot_experts, "cold": cold, "hot_per": hot_per, "cold_capacity_factor": cold_capacity_factor,
        "cold_token_percent": cold_token_percent, "overflow": overflow, "cut_order": cut_order, "load_cap": load_cap,
        "num_groups": num_groups, "finetune_threshold": finetune_threshold, "shadow_steps": shadow_steps,
    }  # fmt: skip
    given = _read(trace, num_experts, world_size, ranks_per_node, model, dtype, slots_per_rank, memory_gb)
    rows = batch * world_size * given.shape.top_k
    given = replace(given, hardware=Hardware.load(hardware), rows=rows, options=options)
    started = time.perf_counter()
    plan = auto_for(given, Execution(dispatcher, batch)) if policy == "auto" else make_plan(policy, given)
    seconds = time.perf_counter() - started
    given.budget.require(int(plan.holds_LWE.sum(2).max()), plan.num_layers, f"policy {policy}")
    save_plan(plan, output, FORMATS[format])
    if plot is not None:
        plot_plan(plan, given.loads_LE, given.trace and given.trace.transitions_LEE(), plot)
    print(f"{output}: {plan.policy}, {plan.num_layers} layers, {plan.num_experts} experts on {world_size} ranks")
    _print_notes(plan)
    print(json.dumps(_figures(plan, given, seconds) | _held_out(plan.meta.get("chosen", policy), given)))


def _read(
    path: Path, num_experts: int | None, world_size: int, ranks_per_node: int | None, model: Path, dtype: str,
    slots_per_rank: int | None, memory_gb: float | None,
) -> Given:  # fmt: skip
    if world_size < 1:
        raise ValueError(f"world_size ({world_size}) must be at least 1")
    trace, loads_LE = load_routing(path, num_experts)
    shape = ModelShape.of(ModelConfig.from_file(model), parse_dtype(dtype).itemsize)
    shape = replace(shape, num_experts=loads_LE.shape[1], top_k=shape.top_k if trace is None else trace.top_k)
    budget = Budget(slots_per_rank, memory_gb, shape.expert_bytes)
    budget.slots(*loads_LE.shape, world_size)
    return Given(loads_LE, world_size, trace, ranks_per_node, budget, shape)


def _figures(plan: ExpertPlan, given: Given, seconds: float) -> dict[str, object]:
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


def _held_out(policy: str, given: Given) -> dict[str, object]:
    """The policy on halves of the trace, one against the other; prints what is doubtful."""
    if given.trace is None or given.trace.num_tokens < 4 or given.world_size == 1:
        return {}
    given = replace(given, options=given.options | {"bound": False})
    found = measure_held_out(
        lambda fit: make_plan(policy, replace(given, trace=fit, loads_LE=fit.loads_LE())), given.trace
    )
    for name in found.held_out:
        print(
            f"{name}, planned from half of the tokens: {found.fitted[name]:.3f} on these, "
            f"{found.held_out[name]:.3f} on the others, contiguous {found.plain[name]:.3f}"
        )
    for doubt in found.doubts():
        print(f"warning: {doubt}")
    return {"fitted_half": found.fitted, "held_out_half": found.held_out, "contiguous_half": found.plain}


def _print_notes(plan: ExpertPlan) -> None:
    """What a policy has to say beside its plan."""
    meta = plan.meta
    if plan.policy == "auto":
        print(
            f"chosen: {meta['chosen']}, expected {meta['expected_step_s'] * 1e3:.3f} ms a step on other tokens, "
            f"{meta['fitted_step_s'] * 1e3:.3f} on its own, "
            f"of {meta['batch']} tokens a rank on {meta['hardware']} ({meta['dispatcher']})"
        )
        for name, step_s in sorted(meta["candidates_step_s"].items(), key=lambda item: item[1]):
            print(f"  {step_s * 1e3:9.3f} ms  {name}")
    elif plan.policy == "affinity":
        print(
            f"{'exact' if meta['exact'] else 'not proven to be the best'}; no placement without replicas has fewer "
            f"than {meta['crossings_bound']:.3f} crossings a token ({meta['bound'].rpartition(': ')[2]})"
        )
    elif plan.policy == "two_phase" and meta:
        print(
            f"estimates right in {meta['estimates_right']:.0%} of the layers, corrected in {meta['corrected']:.0%}, "
            f"mean distance {meta['mean_distance']:.3f}"
        )


if __name__ == "__main__":
    run_tool(plan_experts)
