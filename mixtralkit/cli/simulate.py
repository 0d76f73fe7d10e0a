"""``mixtralkit simulate``: a routing trace against expert plans; time, load, traffic, crossings, dropped rows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from mixtralkit.cli.run import command
from mixtralkit.config import ModelConfig, shipped
from mixtralkit.config.engine import Quantize, QuantizeAttention
from mixtralkit.config.options import Count, Natural, Positive, Ranks, Rule, Share
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning import simulate as simulator
from mixtralkit.planning.cost import ModelShape, TimeModel
from mixtralkit.planning.formats import load_plan
from mixtralkit.planning.fused_cost import FusedTimeModel
from mixtralkit.planning.hardware import USUAL_HOST, Hardware
from mixtralkit.planning.memory import Room
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.registry import POLICIES, Given, make_plan
from mixtralkit.planning.policies.tiers import GpuBudget, tiers
from mixtralkit.planning.replay import PHASES, Execution
from mixtralkit.planning.simulate import Simulation
from mixtralkit.planning.tiers import RULES, simulate_tiers
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.whole_file import check_free

DataBytes = Annotated[int, Rule("in 1 … 16", lambda value: 1 <= value <= 16)]
_RANKS_SHOWN = 32  # one by one; of more ranks only the least, the median and the most


@command
def simulate(
    trace: Path,
    plan: tuple[str, ...] = ("contiguous",),
    dispatcher: tuple[str, ...] = ("exact",),
    world_size: Ranks | None = None,
    ranks_per_node: Count | None = None,
    batch: Count | None = None,
    chunks: Count = 1,
    context: Natural = 0,
    span: Count = 1,
    hardware: Path = Path("h200"),
    model: Path = Path("mixtral-8x7b"),
    num_experts: Count | None = None,
    data_bytes: DataBytes | None = None,
    quantize: Quantize | None = None,
    quantize_attention: QuantizeAttention | None = None,
    gpu_memory_gb: Positive | None = None,
    max_seq_len: Count = 2048,
    tier_rules: tuple[str, ...] = RULES,
    decay: Share = 0.98,
    ahead: Count = 2,
    plot: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Replays TRACE against every PLAN under every DISPATCHER; prints tables, and one line of JSON for each.

    Args:
        trace: routing trace, .npz or .npy.
        plan: plan.json files, or names as contiguous, balanced+4, hot_cold/node+2, affinity (docs/planning.md).
        dispatcher: split_width, replicated, gathered, exact, static, symmetric, two_stage, coherent.
        world_size: ranks of a plan that is given by name.
        ranks_per_node: ranks of one machine, instead of what the plans say.
        batch: tokens of a step on each rank; the whole trace in one step when not given.
        chunks: parts of a step whose exchange and products overlap (exact and two_stage).
        context: tokens of each sequence that are in the cache already.
        span: tokens of a step that belong to one sequence; 1 in decode.
        hardware: hardware file, or the name of one in configs/hardware. With figures of this project's kernels, as
            h200x4 has them, steps run by these, else as plain torch.
        model: params.json or config.json with the sizes of the model, or the name of one in configs/models. Experts and
            choices are the trace's.
        num_experts: experts, for a trace that does not say.
        data_bytes: of a number in rows and weights; the hardware's when not given.
        quantize: format of the experts' weights (docs/quantised.md); left out, numbers of data_bytes.
        quantize_attention: int8 or fp8, of attention's projections and the output matrix.
        gpu_memory_gb: replay one GPU of so many 10^9 bytes with the other experts in the host's memory, by the plan
            that policy tiers makes of half of the trace, on the other half (docs/host-memory.md). A plan file with
            tiers is replayed on the whole trace without this.
        max_seq_len: with gpu_memory_gb: most tokens of a sequence in the cache; batch says how many sequences.
        tier_rules: which experts such a GPU keeps: static, lru, lru/layer, frequency, frequency/layer,
            prefetch or belady.
        decay: what a use counts for frequency against one a step later.
        ahead: experts of a layer that prefetch asks for.
        plot: picture to write, .png.
        overwrite: replace the picture where it is there already.
    """
    check_free(plot, overwrite)
    routing = RoutingTrace.load(trace, num_experts)
    machine = Hardware.load(shipped("hardware", hardware))
    config = ModelConfig.from_file(shipped("models", model))
    formats = parse_weights(quantize), parse_weights(quantize_attention, "quantize_attention")
    sizes = ModelShape.of(config, data_bytes or machine.data_bytes, *formats)
    shape = replace(sizes, num_experts=routing.num_experts, top_k=routing.top_k)
    if unknown := [rule for rule in tier_rules if rule not in RULES]:
        raise ValueError(f"tier_rules ({unknown[0]!r}) must be of {', '.join(RULES)}")
    if gpu_memory_gb is not None:
        length = max_seq_len
        room = Room(batch or 1, length, length, 0, shape.data_bytes, weights=formats[0], attention_weights=formats[1])
        known, tried = routing.split(0.5)
        host = machine.host or USUAL_HOST
        config = replace(config, num_experts=shape.num_experts, num_experts_per_tok=shape.top_k)
        made = tiers(_one_rank(plan, routing), known.loads_LE(), GpuBudget(gpu_memory_gb, config, room, host))
        print(_tiers(made, tried, shape, machine, batch or 1, context, tier_rules, decay, ahead))
        return
    results: dict[str, Simulation] = {}
    plans: dict[str, ExpertPlan] = {}
    for name in plan:
        expert_plan = _load_plan(name, routing, world_size, ranks_per_node)
        if ranks_per_node is not None:
            expert_plan = replace(expert_plan, ranks_per_node=ranks_per_node)
        for kind in dispatcher:
            execution = Execution(kind, batch, chunks, context, span)
            label = _label(name, kind, results)
            plans[label] = expert_plan
            results[label] = simulator.simulate(expert_plan, routing, shape, machine, execution)
    for label, expert_plan in plans.items():
        for note in expert_plan.notes():
            print(f"{label}: {note}")
    print(_totals(results))
    print(_by_layer(results))
    print(_by_rank(results))
    print(_links(results))
    for expert_plan in plans.values():
        if expert_plan.tier is not None and expert_plan.world_size == 1:
            print(_tiers(expert_plan, routing, shape, machine, batch or 1, context, tier_rules, decay, ahead))
    for label, result in results.items():
        print(json.dumps({"plan": label, "hardware": machine.name, **result.summary(), **plans[label].counts(),
                          **_arrays(result)}))  # fmt: skip
    if plot is not None:
        from mixtralkit.planning.simulation_plot import draw

        draw(results, plot)


def _load_plan(name: str, routing: RoutingTrace, world_size: int | None, ranks_per_node: int | None) -> ExpertPlan:
    if name.partition("+")[0] not in POLICIES:
        return load_plan(name, num_experts=routing.num_experts, world_size=world_size)
    if world_size is None:
        raise ValueError(f"--world_size is missing: plan {name} needs it")
    return make_plan(name, Given.of(routing, world_size, ranks_per_node=ranks_per_node))


def _one_rank(names: tuple[str, ...], routing: RoutingTrace) -> ExpertPlan:
    """The one plan of one rank that tiers are chosen for."""
    if len(names) > 1:
        raise ValueError(f"plan ({', '.join(names)}) must be one with gpu_memory_gb")
    plan = _load_plan(names[0], routing, 1, None)
    if plan.world_size != 1:
        raise ValueError(f"world_size ({plan.world_size}) must be 1 with gpu_memory_gb")
    return plan


def _tiers(
    plan: ExpertPlan, routing: RoutingTrace, shape: ModelShape, machine: Hardware, batch: int, context: int,
    rules: tuple[str, ...], decay: float, ahead: int,
) -> str:  # fmt: skip
    """The table of what each rule finds and costs, and a line of JSON."""
    host = machine.host or USUAL_HOST
    model = (TimeModel if machine.fused is None else FusedTimeModel)(shape, machine)
    found = simulate_tiers(plan, routing, model, host, batch, context, rules, decay, ahead)
    header = ["kept by", "found", "GB missing", "GB over the bus", "CPU ms", "ms/step", "tokens/s", "split"]
    header.append("ms bound")
    rows = [
        [
            rule, f"{one.hit_rate:.1%}", f"{one.missing_bytes / 1e9:.3f}", f"{one.bus_bytes / 1e9:.3f}",
            f"{one.cpu_s * 1e3:.2f}", f"{one.step_s * 1e3:.2f}", f"{batch / one.step_s:.1f}",
            f"{batch / one.split_step_s:.1f}", f"{one.bound_s * 1e3:.2f}",
        ]
        for rule, one in found.items()
    ]  # fmt: skip
    gpu_W, host_W = shape.rank_bytes(plan)
    resident = plan.num_layers * plan.num_experts - int(plan.on_host_LE.sum())
    note = (
        f"{resident} experts ({gpu_W[0] / 1e9:.2f} GB) in the GPU's memory, {host_W[0] / 1e9:.2f} GB in the host's; "
        f"bus {host.bus_bandwidth / 1e9:g} GB/s, CPU {host.cpu_bandwidth / 1e9:g} GB/s "
        f"({host.source or machine.name}); {routing.num_tokens} tokens"
    )
    facts = {rule: asdict(one) | {"tokens_per_s": batch / one.step_s} for rule, one in found.items()}
    return "\n".join([note, _table("Tiers, per step", header, rows), json.dumps({"tiers": facts, "batch": batch})])


def _label(name: str, dispatcher: str, taken: dict[str, Simulation]) -> str:
    stem = name if name.partition("+")[0] in POLICIES else Path(name).stem
    label = f"{stem}/{dispatcher}"
    return label if label not in taken else f"{name}/{dispatcher}"


def _totals(results: dict[str, Simulation]) -> str:
    header = ["plan/dispatcher", "ranks", "ms/step", *PHASES, "hidden", "max/mean", "mean/max"]
    header += ["MB inside", "MB across", "MB busiest link", "crossings", "of nodes", "dropped", "rerouted"]
    rows = []
    for label, result in results.items():
        inside, across = result.bytes_by_network
        parts = [*result.phases_LP.sum(0), result.hidden_L.sum()]
        rows.append([
            label, str(result.world_size), f"{result.step_s * 1e3:.3f}",
            *(f"{seconds / result.steps * 1e3:.3f}" for seconds in parts),
            f"{result.max_over_mean:.3f}", f"{result.mean_over_max:.3f}",
            *(f"{size / result.steps / 1e6:.3f}" for size in (inside, across, result.links_WW.max())),
            f"{result.crossings_per_token:.3f}", f"{result.node_crossings_per_token:.3f}",
            str(result.dropped_L.sum()), str(result.rerouted_L.sum()),
        ])  # fmt: skip
    return _table("Per step: ms of every phase (slowest rank), MB of the MoE layers; crossings per token", header, rows)


def _by_layer(results: dict[str, Simulation]) -> str:
    layers = max(len(result.seconds_L) for result in results.values())
    rows = [
        [str(layer)]
        + [f"{r.seconds_L[layer] / r.steps * 1e3:.4f} ({r.max_over_mean_L[layer]:.2f})" for r in results.values()]
        for layer in range(layers)
    ]
    return _table("Per layer: ms of a step (max/mean of the ranks' rows)", ["layer", *results], rows)


def _by_rank(results: dict[str, Simulation]) -> str:
    ranks = max(result.world_size for result in results.values())
    if ranks > _RANKS_SHOWN:
        rows = [
            [name, *(f"{pick(result.rows_LW.sum(0)):.0f}" for result in results.values())]
            for name, pick in (("least", np.min), ("median", np.median), ("most", np.max))
        ]
    else:
        rows = [
            [str(rank), *(f"{r.rows_LW[:, rank].sum():.0f}" if rank < r.world_size else "" for r in results.values())]
            for rank in range(ranks)
        ]
    return _table("Per rank: choices computed, all layers and steps", ["rank", *results], rows)


def _links(results: dict[str, Simulation]) -> str:
    """The matrix of each for few ranks, the busiest links otherwise."""
    parts = []
    for label, result in results.items():
        links_WW = result.links_WW / result.steps / 1e6
        if result.world_size <= 8:
            header = ["from \\ to", *map(str, range(result.world_size))]
            rows = [[str(rank), *(f"{size:.3f}" for size in sent)] for rank, sent in enumerate(links_WW)]
        else:
            header, busiest = ["from", "to", "MB"], np.argsort(-links_WW, axis=None, kind="stable")[:5]
            places = zip(*np.unravel_index(busiest, links_WW.shape), strict=True)
            rows = [[str(a), str(b), f"{links_WW[a, b]:.3f}"] for a, b in places]
        parts.append(_table(f"Links of {label}: MB per step", header, rows))
    return "\n".join(parts)


def _arrays(result: Simulation) -> dict[str, object]:
    few = result.world_size <= _RANKS_SHOWN
    return {
        "seconds_by_layer": result.seconds_L.tolist(),
        "max_over_mean_by_layer": result.max_over_mean_L.tolist(),
        "rows_by_rank": result.rows_LW.sum(0).tolist(),
        "link_bytes": result.links_WW.tolist() if few else None,
    }


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join([title, *lines, ""])
