"""``mixtralkit plan``: which ranks hold which experts, from a routing trace."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from mixtralkit.cli.run import command
from mixtralkit.config import ModelConfig, parse_dtype, shipped
from mixtralkit.config.engine import Dtype, Quantize, QuantizeAttention
from mixtralkit.config.options import Count, Natural, NotNegative, Options, Positive, Ranks, Share
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.formats import save_plan
from mixtralkit.planning.hardware import USUAL_HOST, Hardware
from mixtralkit.planning.memory import Room
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.plan_plot import plot_plan
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.quality import measure, measure_held_out
from mixtralkit.planning.policies.registry import POLICIES, Given, make_plan
from mixtralkit.planning.policies.tiers import GpuBudget
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.search import auto_for
from mixtralkit.planning.trace import load_routing
from mixtralkit.whole_file import check_free

FORMATS = {"mixtralkit": "plan", "sglang": "sglang", "tensorrt_llm": "tensorrt", "vllm": "vllm", "exflow": "exflow"}
TAKES = {"auto": ("dispatcher",), **{name: options for name, (_, options) in POLICIES.items()}}


@dataclass(frozen=True)
class PlanRequest(Options):
    """What is planned for.

    Attributes:
        world_size: Ranks.
        ranks_per_node: Ranks of one machine; all ranks are on one without it.
        memory_gb: Most memory for expert weights on each rank, in 10^9 bytes, all layers together.
        gpu_memory_gb: tiers: each GPU's memory in 10^9 bytes, keys and values and working memory included; experts
            that do not fit are in the host's (docs/host-memory.md).
        max_seq_len: tiers: most tokens of each of batch sequences in the cache.
        slots_per_rank: Most experts on each rank in each layer; without this and memory_gb no replicas are made,
            except what hot_experts asks for.
        num_experts: Experts of the model, for a trace that does not say.
        model: params.json or config.json with the sizes of the model, or the name of one in configs/models.
        dtype: Of the weights.
        quantize: Format of the experts' weights (docs/quantised.md); left out, dtype.
        quantize_attention: int8 or fp8, of attention's projections and the output matrix; left out, dtype.
        hardware: Machine for shadow and auto, a file or the name of one in configs/hardware.
        batch: shadow, tiers and auto: tokens of a step on each rank.
    """

    world_size: Ranks = 4
    ranks_per_node: Count | None = None
    memory_gb: Positive | None = None
    gpu_memory_gb: Positive | None = None
    max_seq_len: Count = 2048
    slots_per_rank: Count | None = None
    num_experts: Count | None = None
    model: Path = Path("mixtral-8x7b")
    dtype: Dtype = "bfloat16"
    quantize: Quantize | None = None
    quantize_attention: QuantizeAttention | None = None
    hardware: Path = Path("h200")
    batch: Count = 64


@dataclass(frozen=True)
class PolicyOptions(Options):
    """What one policy alone is told.

    Attributes:
        hot_experts: hot_cold: experts of each layer on every rank; without it as many as the budget allows.
        cold: hot_cold: placement of the other experts.
        hot_per: hot_cold: a copy of each hot expert on every rank, or on one rank of every node.
        cold_capacity_factor: hot_cold: rows that a cold expert takes, as a multiple of its even share; exact without.
        cold_token_percent: hot_cold: part (0, 1] of that capacity which is sent.
        overflow: hot_cold: what becomes of rows over the capacity.
        cut_order: hot_cold: which rows these are; weight keeps the heaviest choices, arrival the first.
        load_cap: affinity: most load of a rank in a layer, as a multiple of the mean.
        bound: affinity: how many times the usual seconds the bound on all placements may take; 0 leaves it out.
        num_groups: balanced: groups of experts that stay on one node each (hierarchical); global without it.
        shares: balanced: what is made even, loads as they are poured here, or in equal parts of replicas, as in SGLang.
        finetune_threshold: two_phase: total-variation distance above which a layer is corrected; Lina's rule without.
        errors: bits: what mixtralkit quantise-report measured, .json; memory_gb is filled.
        shadow_steps: shadow: steps over which sending the weights is paid.
        dispatcher: auto: how the plan will run: exact, static, two_stage, coherent, replicated or symmetric.
    """

    hot_experts: Natural | None = None
    cold: Literal["balanced", "contiguous"] = "balanced"
    hot_per: Literal["rank", "node"] = "rank"
    cold_capacity_factor: Positive | None = None
    cold_token_percent: float = 1.0
    overflow: Literal["drop", "reroute"] = "drop"
    cut_order: Literal["weight", "arrival"] = "weight"
    load_cap: Positive | None = None
    bound: NotNegative = 1.0
    num_groups: Count | None = None
    shares: Literal["poured", "equal"] = "poured"
    finetune_threshold: Share | None = None
    errors: Path | None = None
    shadow_steps: Positive = 1.0
    dispatcher: str = "exact"


@command
def plan(
    trace: Path,
    policy: str = "auto",
    output: Path = Path("plan.json"),
    format: str = "mixtralkit",
    plot: Path | None = None,
    overwrite: bool = False,
    *,
    request: PlanRequest,
    only: PolicyOptions,
) -> None:
    """Plans which ranks hold which experts, writes the plan, and prints its figures; the last line is JSON.

    Figures are those of the trace that the plan was made from, and those of a plan of half of it on the other half.

    Args:
        trace: Routing trace (.npz, .npy), or SGLang's recorded loads (.pt).
        policy: contiguous, hot_cold, two_phase, affinity, balanced, shadow, everywhere, bits, tiers or auto, or a plan
            by name as balanced+4 or hot_cold/node+2 (docs/planning.md).
        output: File for the plan.
        format: mixtralkit, sglang, tensorrt_llm, vllm or exflow.
        plot: File for a picture of loads and crossings, layer by layer.
        overwrite: Replace output and plot where they are there already.
    """
    if format not in FORMATS:
        raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
    if policy != "auto" and policy.partition("+")[0] not in POLICIES:
        raise ValueError(f"policy ({policy!r}) must be one of {', '.join([*POLICIES, 'auto'])}")
    for path in (output, plot):
        check_free(path, overwrite)
    given = _read(trace, request, policy)
    given = replace(given, options=given.options | {"bound": only.bound} | _options(policy, only))
    started = time.perf_counter()
    execution = Execution(only.dispatcher, request.batch)
    made = auto_for(given, execution) if policy == "auto" else make_plan(policy, given)
    seconds = time.perf_counter() - started
    if policy not in ("bits", "tiers"):
        given.budget.require(int(made.holds_LWE.sum(2).max()), made.num_layers, f"policy {policy}")
    save_plan(made, output, FORMATS[format])
    if plot is not None:
        plot_plan(made, given.loads_LE, given.trace and given.trace.transitions_LEE(), plot)
    ranks = request.world_size
    print(f"{output}: {made.policy}, {made.num_layers} layers, {made.num_experts} experts on {ranks} ranks")
    _print_notes(made)
    print(json.dumps(_figures(made, given, seconds) | _held_out(made.meta.get("chosen", policy), given)))


def _options(policy: str, only: PolicyOptions) -> dict[str, object]:
    """What differs from the defaults; ValueError for what the policy does not take."""
    name, _, count = policy.partition("+")
    takes = TAKES[name] if not count else [key for key in TAKES[name] if key != "hot_experts"]
    options = {key: value for key, value in asdict(only).items() if value != getattr(PolicyOptions, key)}
    for key, value in options.items():
        if key not in takes:
            users = ", ".join(user for user, own in TAKES.items() if key in own)
            raise ValueError(f"{key} ({value!r}) is an option of policy {users}, not of {policy!r}")
    return options


def _read(path: Path, request: PlanRequest, policy: str) -> Given:
    trace, loads_LE = load_routing(path, request.num_experts)
    model = ModelConfig.from_file(shipped("models", request.model))
    attention = parse_weights(request.quantize_attention, "quantize_attention")
    shape = ModelShape.of(model, parse_dtype(request.dtype).itemsize, parse_weights(request.quantize), attention)
    shape = replace(shape, num_experts=loads_LE.shape[1], top_k=shape.top_k if trace is None else trace.top_k)
    budget = Budget(request.slots_per_rank, request.memory_gb, shape.expert_bytes)
    if policy not in ("bits", "tiers"):
        budget.slots(*loads_LE.shape, request.world_size)
    hardware = Hardware.load(shipped("hardware", request.hardware))
    rows = request.batch * request.world_size * shape.top_k
    options = {}
    if request.gpu_memory_gb is not None:
        if policy != "tiers":
            raise ValueError(
                f"gpu_memory_gb ({request.gpu_memory_gb:g}) is an option of policy tiers, not of {policy!r}"
            )
        model = replace(model, num_experts=shape.num_experts, num_experts_per_tok=shape.top_k)
        length = request.max_seq_len
        rows_at_a_time = request.batch * request.world_size
        formats = {"weights": shape.weights, "attention_weights": attention}
        room = Room(rows_at_a_time, length, length, 0, shape.data_bytes, **formats)
        options["gpu"] = GpuBudget(request.gpu_memory_gb, model, room, hardware.host or USUAL_HOST)
    ranks = (request.world_size, trace, request.ranks_per_node)
    return Given(loads_LE, *ranks, budget, shape, hardware, rows, options)


def _figures(plan: ExpertPlan, given: Given, seconds: float) -> dict[str, object]:
    gpu_W, host_W = given.shape.rank_bytes(plan)
    quality = measure(plan, given.loads_LE, given.trace and given.trace.transitions_LEE())
    return {
        "policy": plan.policy,
        "crossings_per_token": quality.crossings_per_token,
        "uniform_crossings_per_token": quality.uniform_crossings_per_token,
        "node_crossings_per_token": quality.node_crossings_per_token,
        "balancedness_mean_over_max": quality.balancedness_mean_over_max,
        "max_over_mean": quality.max_over_mean,
        "memory_gb_per_rank": float(gpu_W.max()) / 1e9,
        **({"host_memory_gb_per_rank": float(host_W.max()) / 1e9} if host_W.any() else {}),
        "seconds": seconds,
        **plan.counts(),
    }


def _held_out(policy: str, given: Given) -> dict[str, object]:
    """The policy on halves of the trace, one against the other; prints what is doubtful."""
    if given.trace is None or given.trace.num_tokens < 4 or given.world_size == 1:
        return {}
    given = replace(given, options=given.options | {"bound": 0})
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
    for note in plan.notes():
        print(note)
    meta = plan.meta
    if plan.policy == "auto":
        print(
            f"chosen: {meta['chosen']}, expected {meta['expected_step_s'] * 1e3:.3f} ms a step on other tokens, "
            f"{meta['fitted_step_s'] * 1e3:.3f} on its own, "
            f"of {meta['batch']} tokens a rank on {meta['hardware']} ({meta['dispatcher']})"
        )
        for name, step_s in sorted(meta["candidates_step_s"].items(), key=lambda item: item[1]):
            print(f"  {step_s * 1e3:9.3f} ms  {name}")
    elif plan.policy == "affinity" and meta["bound"]:
        print(
            f"{'exact' if meta['exact'] else 'not proven to be the best'}; no placement without replicas has fewer "
            f"than {meta['crossings_bound']:.3f} crossings a token ({meta['bound'].rpartition(': ')[2]})"
        )
    elif plan.policy == "bits":
        print(
            f"{meta['bits']:.3f} bits a weight, harm {meta['harm']:.4g} by the errors of {meta['errors']}; "
            f"no choice within the budget has less than {meta['harm_bound']:.4g}"
        )
    elif plan.policy == "tiers" and plan.tier is not None:
        print(f"of {meta['gpu_memory_gb']:g} GB {meta['taken_gb']:.2f} are taken by all but experts")
    elif plan.policy == "two_phase" and meta:
        print(
            f"estimates right in {meta['estimates_right']:.0%} of the layers, corrected in {meta['corrected']:.0%}, "
            f"mean distance {meta['mean_distance']:.3f}"
        )
