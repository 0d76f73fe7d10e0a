"""One MoE layer over the ranks: every way to place experts and to move rows, on the same rows and the same routing.

    torchrun --standalone --nproc_per_node=4 benchmarks/bench_moe_layer.py --tokens 1,16,64,256

Runs on CPUs (gloo) and GPUs (NCCL). Prints a line for each measurement and one JSON object at the end. Times are
medians over the repeats of the slowest rank. The result of every variant is compared with the loop over experts first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from baselines import PaddedAllGather, loop_over_experts
from machine import describe_run
from torch import nn

from mixtralkit.cli import run_tool
from mixtralkit.config import FasterOptions, ModelConfig, MoEOptions, ParallelConfig, parse_dtype
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.fmoe_backend import FastMoELayer
from mixtralkit.moe.gate import Routing
from mixtralkit.moe.layer import MoELayer
from mixtralkit.moe.shadow import ShadowCache
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of the norm of the difference
INPUT_SETS = 4  # inputs take turns, so that none stays in a cache


@dataclass(frozen=True)
class Variant:
    """A way to run the layer. ``hot`` of its experts, the busiest, are on every rank."""

    hot: int = 0
    attention: str = "dp"
    experts: str = "ep"
    capacity: float | None = None
    static: bool = False
    schedule: bool = False
    shadow: bool = False
    backend: str = "mixtralkit"


VARIANTS = {
    "contiguous": Variant(),
    "contiguous+schedule": Variant(schedule=True),
    "contiguous+static": Variant(static=True),
    "hot_cold": Variant(hot=1),
    "hot_cold+schedule": Variant(hot=1, schedule=True),
    "hot_cold+static": Variant(hot=1, static=True),
    "hot_cold+capacity1.0": Variant(hot=1, capacity=1.0),
    "hot_cold+capacity0.5": Variant(hot=1, capacity=0.5),
    "shadow": Variant(shadow=True),
    "shadow+schedule": Variant(shadow=True, schedule=True),
    "everywhere": Variant(hot=-1),
    "tensor_parallel": Variant(experts="tp"),
    "fastmoe": Variant(backend="fastmoe"),  # not among "all": the real library is seldom there
}
BASELINES = ("loop_over_experts", "padded_all_gather")


class GivenGate(nn.Module):
    """Routes the rows as a benchmark wants: one prepared routing after the other, in step with the inputs."""

    def __init__(self, routings: list[Routing], top_k: int) -> None:
        super().__init__()
        self.routings, self.top_k, self.turn = routings, top_k, 0

    def forward(self, x_TD: torch.Tensor) -> Routing:
        return self.routings[self.turn % len(self.routings)]


@dataclass(frozen=True)
class Case:
    """Rows and their routing on this rank, the whole layer's weights, and where it runs."""

    context: RankContext
    config: ModelConfig
    w13_EGD: torch.Tensor
    w2_EDF: torch.Tensor
    inputs: list[torch.Tensor]
    routings: list[Routing]

    @property
    def dtype(self) -> torch.dtype:
        return self.w13_EGD.dtype

    def plan(self, variant: Variant) -> ExpertPlan:
        """Contiguous, with the busiest experts of all ranks' rows on every rank; -1 is all of them."""
        config, world = self.config, self.context.world_size
        if variant.hot < 0:
            return everywhere(1, config.num_experts, world)
        counts = (
            torch.stack([r.experts_TK.flatten() for r in self.routings])
            .flatten()
            .bincount(minlength=config.num_experts)
        )
        busiest = self.context.all_reduce(counts).argsort(descending=True, stable=True)[: variant.hot].tolist()
        owned = contiguous(1, config.num_experts, world).slots_LWS[0].tolist()
        slots = [sorted({*busiest, *(e for e in rank if e >= 0)}) for rank in owned]
        width = max(map(len, slots))
        filled = np.array([[rank + [-1] * (width - len(rank)) for rank in slots]])
        policy = "hot_cold" if variant.hot else "contiguous"
        return ExpertPlan(filled, config.num_experts, policy=policy, cold_capacity_factor=variant.capacity)

    def layer(self, variant: Variant) -> MoELayer:
        """The layer of a variant with this case's weights."""
        layout = RankLayout(
            self.config, ParallelConfig(variant.attention, variant.experts), self.plan(variant), self.context.rank
        )
        options = MoEOptions(FasterOptions.from_env(), exchange="exact" if not variant.static else "static")
        faster = FasterOptions(**{**vars(options.faster), "schedule": variant.schedule, "shadow": variant.shadow})
        options = MoEOptions(faster, options.exchange, backend=variant.backend)
        cache = ShadowCache.for_model(layout, self.context, self.dtype, options)
        kind = FastMoELayer if variant.backend == "fastmoe" else MoELayer
        layer = kind(0, layout, self.context, self.dtype, options, shadow_cache=cache)
        mine, part = list(layout.experts(0)), slice(*layout.hidden)
        w1, w3 = self.w13_EGD[mine].chunk(2, dim=1)
        layer.experts.w13.copy_(torch.cat([w1[:, part], w3[:, part]], dim=1))
        layer.experts.w2.copy_(self.w2_EDF[mine][:, :, part])
        layer.gate = GivenGate(self.routings, self.config.num_experts_per_tok)
        return layer


def bench_moe_layer(
    tokens: str = "1,16,64,256",
    routing: str = "uniform,skew:0.5",
    variants: str = "all",
    dim: int | None = None,
    hidden: int | None = None,
    num_experts: int = 8,
    top_k: int = 2,
    repeats: int = 15,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Times one MoE layer over the ranks, and its phases.

    Args:
        tokens: numbers of rows of each rank, between commas.
        routing: uniform; skew:S, one expert takes the share S of the routed rows; trace:FILE, a routing trace; or
            several between commas.
        variants: names between commas, or all; fastmoe, the layer through the real library, must be named.
        dim: model width; 4096 on CUDA, 512 on a CPU when not given.
        hidden: expert hidden width; 3.5 times dim when not given.
        num_experts: experts.
        top_k: experts per token.
        repeats: timed forwards of each variant.
        dtype: bfloat16 on CUDA, float32 on a CPU when not given.
        device: cpu or cuda.
        seed: of weights, rows and routing.
        output: JSON file for the results.
    """
    usual = [name for name, variant in VARIANTS.items() if variant.backend == "mixtralkit"]
    names = [*usual, *BASELINES] if variants == "all" else variants.split(",")
    if not all(count.isdigit() and int(count) for count in tokens.split(",")):
        raise ValueError(f"tokens ({tokens!r}) must be whole numbers of at least 1 between commas")
    unknown = sorted(set(names) - set(VARIANTS) - set(BASELINES))
    if unknown:
        raise ValueError(f"variants ({', '.join(unknown)}) must be among {', '.join([*VARIANTS, *BASELINES])}")
    context = RankContext.start(device)
    on_gpu = context.device.type == "cuda"
    dim = dim or (4096 if on_gpu else 512)
    torch_dtype = parse_dtype(dtype or ("bfloat16" if on_gpu else "float32"))
    config = ModelConfig(
        dim=dim, n_layers=1, head_dim=2, hidden_dim=hidden or dim * 7 // 2, n_heads=context.world_size,
        n_kv_heads=context.world_size, vocab_size=context.world_size, num_experts=num_experts,
        num_experts_per_tok=top_k,
    )  # fmt: skip
    torch.set_grad_enabled(False)
    weights = _weights(config, torch_dtype, context.device, seed)
    results = []
    for kind in routing.split(","):
        for count in map(int, tokens.split(",")):
            case = _case(context, config, weights, count, kind, seed)
            for name in names:
                results.append(
                    {"variant": name, "routing": kind, "tokens_per_rank": count, **_measure(case, name, repeats)}
                )
                if context.is_first:
                    print(_line(results[-1]), flush=True)
    if context.is_first:
        summary = {**describe_run(context), "dim": dim, "hidden": config.hidden_dim, "num_experts": num_experts,
                   "top_k": top_k, "dtype": str(torch_dtype), "repeats": repeats, "results": results}  # fmt: skip
        if output is not None:
            output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(summary))
    context.stop()


def _weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int):
    generator = torch.Generator(device).manual_seed(seed)
    like = {"dtype": dtype, "device": device, "generator": generator}
    experts, dim, hidden = config.num_experts, config.dim, config.hidden_dim
    return torch.randn(experts, 2 * hidden, dim, **like) * dim**-0.5, torch.randn(
        experts, dim, hidden, **like
    ) * hidden**-0.5


def _case(context: RankContext, config: ModelConfig, weights, count: int, kind: str, seed: int) -> Case:
    generator = torch.Generator().manual_seed(1000 * seed + context.rank)
    inputs, routings = [], []
    for number in range(INPUT_SETS):
        x_TD = torch.randn(count, config.dim, generator=generator)
        inputs.append(x_TD.to(weights[0].dtype).to(context.device))
        experts_TK = _choices(kind, count, config, generator, number * context.world_size + context.rank)
        weights_TK = torch.rand(count, config.num_experts_per_tok, generator=generator).softmax(-1)
        logits_TE = torch.zeros(count, config.num_experts).scatter_(1, experts_TK, weights_TK.log() + 5)
        routings.append(Routing(*(t.to(context.device) for t in (experts_TK, weights_TK, logits_TE))))
    return Case(context, config, *weights, inputs, routings)


def _choices(kind: str, count: int, config: ModelConfig, generator: torch.Generator, part: int) -> torch.Tensor:
    """Experts int64 [T, K] of a rank's rows; no row has an expert twice."""
    experts, top_k = config.num_experts, config.num_experts_per_tok
    if kind.startswith("trace:"):
        from mixtralkit.planning.trace import RoutingTrace

        trace = RoutingTrace.load(kind.removeprefix("trace:"))
        rows = (np.arange(count) + part * count) % trace.num_tokens
        return torch.from_numpy(trace.experts[rows, trace.num_layers // 2].astype(np.int64))
    scores_TE = torch.rand(count, experts, generator=generator)
    if kind.startswith("skew:"):
        share = float(kind.removeprefix("skew:"))
        if not 0 <= share * top_k <= 1:
            raise ValueError(f"routing ({kind!r}): a share above 1/top_k = {1 / top_k:g} is not possible")
        scores_TE[:, 0] = torch.where(torch.rand(count, generator=generator) < share * top_k, 2.0, -1.0)
    elif kind != "uniform":
        raise ValueError(f"routing ({kind!r}) must be uniform, skew:SHARE or trace:FILE")
    return scores_TE.topk(top_k, dim=1).indices


def _measure(case: Case, name: str, repeats: int) -> dict:
    """Checks a variant against the loop over experts, then times it whole and by phases."""
    if name in BASELINES:
        run, layer = _baseline(case, name), None
    else:
        layer = case.layer(VARIANTS[name])
        rows_per_rank = len(case.inputs[0]) if VARIANTS[name].static else None

        def run(number: int) -> torch.Tensor:
            layer.gate.turn = number
            return layer(case.inputs[number % INPUT_SETS], rows_per_rank)[0]

    error = _relative_error(run(1), case, 1)
    cut = name in VARIANTS and VARIANTS[name].capacity is not None
    with case.context.agreed():
        if not cut and not error < TOLERANCE[case.dtype]:
            raise RuntimeError(f"variant {name}: differs from the loop over experts by {error:.2g} of the norm")
    for number in range(3):
        run(number)
    whole = [_timed(case, lambda: run(number)) for number in range(repeats)]  # noqa: B023
    found = {"ms": _slowest(case, whole), "spread_ms": _spread(case, whole), "error": error}
    if isinstance(layer, MoELayer):
        found |= _phases(case, layer, repeats) | _counts(case, layer)
    return found


def _baseline(case: Case, name: str) -> Callable[[int], torch.Tensor]:
    if name == "loop_over_experts":
        function = lambda x, r: loop_over_experts(x, r, case.w13_EGD, case.w2_EDF)  # noqa: E731
    else:
        mine = list(contiguous(1, case.config.num_experts, case.context.world_size).experts_of(0, case.context.rank))
        function = PaddedAllGather(case.context, case.w13_EGD[mine], case.w2_EDF[mine], mine[0])
    return lambda number: function(case.inputs[number % INPUT_SETS], case.routings[number % INPUT_SETS])


def _relative_error(y_TD: torch.Tensor, case: Case, number: int) -> float:
    expected = loop_over_experts(case.inputs[number], case.routings[number], case.w13_EGD, case.w2_EDF).float()
    return float((y_TD.float() - expected).norm() / expected.norm())


def _timed(case: Case, function: Callable[[], object]) -> float:
    """Milliseconds of one call that all ranks start together, on this rank's device."""
    case.context.barrier()
    _synchronize(case)
    start = time.perf_counter()
    function()
    _synchronize(case)
    return 1e3 * (time.perf_counter() - start)


def _synchronize(case: Case) -> None:
    if case.context.device.type == "cuda":
        torch.cuda.synchronize(case.context.device)


def _slowest(case: Case, times_ms: list[float]) -> float:
    return round(max(case.context.all_gather_objects(median(times_ms))), 4)


def _spread(case: Case, times_ms: list[float]) -> list[float]:
    """Tenth and ninetieth percentile of the slowest rank."""
    ranks = case.context.all_gather_objects((median(times_ms), *np.percentile(times_ms, [10, 90])))
    return [round(float(value), 4) for value in max(ranks)[1:]]


def _phases(case: Case, layer: MoELayer, repeats: int) -> dict:
    """Each phase by itself, between barriers: arrange and dispatch, experts, combine; the gate is given."""
    rows_per_rank = len(case.inputs[0]) if layer.options.exchange == "static" else None
    times: dict[str, list[float]] = {"dispatch_ms": [], "experts_ms": [], "combine_ms": []}
    for number in range(repeats):
        stages = _Stages(layer, case.inputs[number % INPUT_SETS], case.routings[number % INPUT_SETS], rows_per_rank)
        for phase, function in zip(times, (stages.dispatch, stages.experts, stages.combine), strict=True):
            times[phase].append(_timed(case, function))
    return {phase: _slowest(case, values) for phase, values in times.items()}


class _Stages:
    """One forward taken apart; each stage leaves what the next one needs."""

    def __init__(self, layer: MoELayer, x_TD: torch.Tensor, routing: Routing, rows_per_rank: int | None) -> None:
        self.layer, self.start = layer, (x_TD, routing, rows_per_rank)

    def dispatch(self) -> None:
        self.way, self.home, cut = self.layer.arrange(*self.start)
        self.rows, self.handle = self.way.dispatch(self.home.x_TD, cut, self.home.assigner)

    def experts(self) -> None:
        self.y_RD = self.home.experts(self.rows)

    def combine(self) -> None:
        self.way.combine(self.y_RD, self.handle)


def _counts(case: Case, layer: MoELayer) -> dict:
    """Of one forward: rows sent by the rank that sends most, and choices dropped by all."""
    layer.gate.turn = 0
    rows_per_rank = len(case.inputs[0]) if layer.options.exchange == "static" else None
    _, report = layer(case.inputs[0], rows_per_rank)
    sent = sum(sum(handle.send) for handle in report.handles if hasattr(handle, "send"))
    dropped = case.context.all_gather_objects(int(report.dropped))
    shadowed = list(report.shadows.experts) if report.shadows is not None else []
    return {"rows_sent": max(case.context.all_gather_objects(sent)), "dropped": sum(dropped), "shadowed": shadowed}


def _line(found: dict) -> str:
    names = [name for name in ("dispatch_ms", "experts_ms", "combine_ms") if name in found]
    phases = "  ".join(f"{name.removesuffix('_ms')} {found[name]:.3f}" for name in names)
    what = f"{found['routing']:>10} {found['tokens_per_rank']:>6}  {found['variant']:<22}"
    return f"{what} {found['ms']:>9.3f} ms  {phases}"


if __name__ == "__main__":
    run_tool(bench_moe_layer)
