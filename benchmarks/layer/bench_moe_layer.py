"""One MoE layer over the ranks: every placement of experts and dispatcher of rows, on the same routing.

    torchrun --standalone --nproc_per_node=4 -m benchmarks.layer.bench_moe_layer --tokens 1,16,64,256 \\
        --routing uniform,skew:0.5,trace:FILE --plot timeline.png

Runs on CPUs (gloo) and GPUs (NCCL). Prints one line of JSON a measurement on stdout, a table on stderr. Times are
medians of the slowest rank, of the gate and all that follows. What a variant gives is compared with the loop over
experts first, and one that differs is not timed. docs/expert-parallel.md says what the fields mean.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.common.ceilings import Ceilings
from benchmarks.common.machine import describe_run
from benchmarks.layer.baselines import Unavailable, Variant, loop_over_experts
from benchmarks.layer.cases import INPUT_SETS, Bench, Case, RoutingKind
from benchmarks.layer.counts import summary
from benchmarks.layer.plot import Timeline, draw, require_matplotlib
from benchmarks.layer.timing import phases_ms, slowest, timeline, whole_ms
from benchmarks.layer.variants import ALL, BASELINES, NAMED_ONLY, check_name, variant_of
from mixtralkit.cli.run import run_tool
from mixtralkit.config import FasterOptions, ModelConfig, parse_dtype, shipped
from mixtralkit.distributed import RankContext
from mixtralkit.planning.hardware import Hardware

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of the norm of the difference


@torch.no_grad()
def bench_moe_layer(
    tokens: str = "1,16,64,256",
    routing: str = "uniform,skew:0.5",
    variants: str = "all",
    trace_layer: int | None = None,
    dim: int | None = None,
    hidden: int | None = None,
    num_experts: int = 8,
    top_k: int = 2,
    repeats: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    graphs: bool = True,
    hardware: Path | None = None,
    plot: Path | None = None,
    plot_variants: str = "contiguous,hot_cold",
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Times one MoE layer over the ranks, and its phases.

    Args:
        tokens: numbers of rows of each rank, between commas.
        routing: uniform; skew:S, one expert takes the share S of the routed rows; trace:FILE, a routing trace; or
            several between commas. Uniform is always among them.
        variants: names between commas, or all; fastmoe, the layer through the real library, must be named. A name is a
            plan (contiguous, hot_cold, balanced, everywhere), shadow, two_phase, coherent or tensor_parallel; behind
            it, +exact, +static or +symmetric force an exchange, and +schedule, +capacityF, +reroute add to it.
        trace_layer: layer of a trace, the middle one when not given.
        dim: model width; 4096 on CUDA, 512 on a CPU when not given.
        hidden: expert hidden width; 3.5 times dim when not given.
        num_experts: experts.
        top_k: experts per token.
        repeats: timed rounds of each variant, of four calls; 15 on CUDA, 5 on a CPU when not given.
        dtype: bfloat16 on CUDA, float32 on a CPU when not given.
        device: cpu or cuda.
        graphs: on CUDA, time variants whose dispatcher a CUDA graph can hold as replays of one.
        hardware: figures of the machine by which shadows and two phases choose copies: a file or the name of one in
            configs/hardware; when not given those of the variables FMOE_FASTER_GLBPLC_*.
        plot: picture of one call, the phases of every rank, of the last routing and number of rows.
        plot_variants: variants in the picture, between commas.
        seed: of weights, rows and routing.
        output: file that takes the lines of JSON.
    """
    names = [*ALL, *(name for name in BASELINES if name not in NAMED_ONLY)] if variants == "all" else _names(variants)
    pictured = _names(plot_variants) if plot is not None else []
    counts = _counts(tokens)
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats ({repeats}) must be at least 1")
    words = [word.strip() for word in routing.split(",")]
    words = words if "uniform" in words else ["uniform", *words]
    if pictured:
        require_matplotlib()
    context = RankContext.start(device)
    on_gpu = context.device.type == "cuda"
    kind = parse_dtype(dtype or ("bfloat16" if on_gpu else "float32"))
    config = _config(dim or (4096 if on_gpu else 512), hidden, num_experts, top_k, context.world_size)
    with context.agreed():
        routings = [RoutingKind.parse(word, num_experts, top_k, trace_layer) for word in words]
        faster = _faster(hardware)
        if output is not None and context.is_first:
            output.write_text("", encoding="utf-8")
    ceilings = Ceilings.measure(context, kind)
    bench = Bench.create(context, config, kind, max(counts), faster, graphs, seed)
    lines = Lines(bench, ceilings, repeats or (15 if on_gpu else 5), output)
    for kind_of_routing, count in product(routings, counts):
        case = Case.draw(bench, kind_of_routing, count)
        lines.measure(case, names)
    if pictured:
        _draw(case, pictured, lines.repeats, plot)
    if lines.refused:
        raise RuntimeError(f"not timed, since they differ from the loop over experts: {', '.join(lines.refused)}")
    context.stop()


class Lines:
    """The lines of a run, on the first rank's streams and in ``output``; ``refused`` are variants that gave other sums.

    Collective.
    """

    def __init__(self, bench: Bench, ceilings: Ceilings, repeats: int, output: Path | None) -> None:
        config = bench.config
        self.ceilings, self.repeats, self.output = ceilings, repeats, output
        self.refused: list[str] = []
        self.common = {
            "dim": config.dim, "hidden": config.hidden_dim, "num_experts": config.num_experts,
            "top_k": config.num_experts_per_tok, "dtype": str(bench.dtype)[6:], "weight_sets": len(bench.weights),
            "repeats": repeats, "seed": bench.seed, "ceilings": ceilings.rounded(), **describe_run(bench.context),
        }  # fmt: skip

    def measure(self, case: Case, names: list[str]) -> None:
        """A line of each variant on the rows of one case."""
        facts, bound, is_first = case.facts(), case.bound(self.ceilings), case.bench.context.is_first
        if is_first:
            print(_title(facts, bound), file=sys.stderr, flush=True)
        for name in names:
            found = _measure(case, name, self.repeats, bound)
            if "refused" in found:
                self.refused.append(f"{name} ({case.kind.name}, {case.rows} rows)")
            if is_first:
                self._write({"measurement": "moe_layer_over_ranks", "variant": name, **facts, **found, **self.common})
                print(_row(name, found), file=sys.stderr, flush=True)

    def _write(self, found: dict[str, object]) -> None:
        line = json.dumps(found)
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _config(dim: int, hidden: int | None, num_experts: int, top_k: int, ranks: int) -> ModelConfig:
    """A model of a layer for each input, with next to no attention."""
    return ModelConfig(
        dim=dim, n_layers=INPUT_SETS, head_dim=2, hidden_dim=hidden or dim * 7 // 2, n_heads=ranks, n_kv_heads=ranks,
        vocab_size=ranks, num_experts=num_experts, num_experts_per_tok=top_k,
    )  # fmt: skip


def _counts(tokens: str) -> list[int]:
    if not all(count.strip().isdigit() and int(count) for count in tokens.split(",")):
        raise ValueError(f"tokens ({tokens!r}) must be whole numbers of at least 1 between commas")
    return [int(count) for count in tokens.split(",")]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        check_name(name)
    return names


def _faster(hardware: Path | None) -> FasterOptions:
    options = FasterOptions.of()
    if hardware is None:
        return options
    figures = Hardware.load(shipped("hardware", hardware))
    return replace(options, net_bandwidth=figures.inside.exchange.bandwidth, gpu_throughput=figures.peak_flops)


def _measure(case: Case, name: str, repeats: int, bound: tuple[float, str]) -> dict[str, object]:
    """Checks a variant, then times it whole and by phases; or why it was not timed. Collective."""
    context = case.bench.context
    try:
        found = _timed(case, variant_of(name, case), repeats, bound)
    except Unavailable as reason:
        found = {"skipped": str(reason)}
    # Graphs and copies of weights are gone before the next variant takes memory.
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
        torch.cuda.empty_cache()
    return found


def _timed(case: Case, variant: Variant, repeats: int, bound: tuple[float, str]) -> dict[str, object]:
    context = case.bench.context
    error = _error(case, variant)
    if not error < TOLERANCE[case.bench.dtype]:
        return {"refused": f"differs from the loop over experts by {error:.2g} of the norm", "error": error}
    graph = case.bench.graphs and variant.captures
    ms, spread_ms = slowest(context, whole_ms(context, variant, repeats, graph))
    phases = phases_ms(context, variant, max(1, repeats // INPUT_SETS), graph)
    bound_s, limit = bound
    return {
        "ms": ms, "spread_ms": spread_ms, "dispatcher": variant.name, "graph": graph,
        "phases_ms": {phase: slowest(context, times)[0] for phase, times in phases.items()},
        "fused": [phase for phase in phases if "+" in phase],
        "bound_ms": round(1e3 * bound_s, 4), "bound": limit, "share_of_bound": round(1e3 * bound_s / ms, 4),
        **summary([variant.counts(number) for number in range(INPUT_SETS)]), "error": error,
    }  # fmt: skip


def _error(case: Case, variant: Variant) -> float:
    """Largest relative error over the ranks and the calls of a round."""
    errors = []
    for number in range(INPUT_SETS):
        y_TD = variant.finished(variant.call(number), number).float()
        weights = case.bench.weights[number % len(case.bench.weights)]
        expected_TD = loop_over_experts(case.inputs[number], variant.expected(number), *weights).float()
        # a capacity may leave a rank no choice at all
        errors.append(float((y_TD - expected_TD).norm() / expected_TD.norm().clamp(min=1e-6)))
    return max(case.bench.context.all_gather_objects(max(errors)))


def _draw(case: Case, names: list[str], repeats: int, path: Path) -> None:
    """The picture of the case's variants; those that cannot run are left out. Collective."""
    context, lines = case.bench.context, []
    for name in names:
        try:
            variant = variant_of(name, case)
        except Unavailable:
            continue
        graph = case.bench.graphs and variant.captures
        rounds = max(1, repeats // INPUT_SETS)
        ms = slowest(context, whole_ms(context, variant, rounds, graph))[0]
        lines.append(Timeline(name, timeline(context, variant, rounds, graph), ms))
    if lines and context.is_first:
        where = "CPU" if context.device.type == "cpu" else torch.cuda.get_device_name(context.device)
        title = f"{case.kind.name}, {case.rows} rows a rank, {context.world_size} x {where}"
        draw(lines, title, path)


def _title(facts: dict[str, object], bound: tuple[float, str]) -> str:
    skew = {"none": "even", "injected": "skew injected", "real": "real skew"}[str(facts["skew"])]
    return (
        f"\n{facts['routing']} ({skew}), {facts['tokens_per_rank']} rows a rank, experts' max/mean "
        f"{facts['experts_max_over_mean']:.2f}, bound {1e3 * bound[0]:.4g} ms ({bound[1]})\n"
        f"{'':24}{'ms':>9} {'bound':>6} {'sent, KB':>10} {'hot':>5} {'drop':>5} {'max/mean':>8}  phases, ms"
    )


def _row(name: str, found: dict[str, object]) -> str:
    if "ms" not in found:
        return f"{name:<24}{found.get('skipped', found.get('refused'))}"
    phases = "  ".join(f"{phase} {ms:.3f}" for phase, ms in found["phases_ms"].items())
    return (
        f"{name:<24}{found['ms']:>9.3f} {found['share_of_bound']:>6.1%} {found['bytes_sent'] / 1e3:>10.1f} "
        f"{found['hot_share']:>5.0%} {found['dropped_share']:>5.0%} {found['rows_max_over_mean']:>8.2f}  {phases}"
        f"{'  (graph)' if found['graph'] else ''}"
    )


if __name__ == "__main__":
    run_tool(bench_moe_layer)
