"""Two-phase scheduling over path lengths and thresholds, against no copies and copies by real counts (shadows).

    torchrun --standalone --nproc_per_node=2 -m benchmarks.plans.bench_two_phase --output FILE [--plots FOLDER]
    python -m benchmarks.plans.bench_two_phase draw FILE --plots FOLDER

A stack of MoE layers replays routing traces, a batch a step: one that the model in ckpts/ writes while it reads parts
of Python's library and its documentation, and a synthetic one whose sequences keep to a topic. Half of each trace's
sequences make the popularity profile, the other half runs. What the phases decide is the same on any machine. Times of
a step are medians of the slowest rank, the settings that are compared taking turns.
"""

from __future__ import annotations

import itertools
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import numpy as np
import torch

from benchmarks.common.machine import describe_run
from benchmarks.layer.cases import GivenGate
from benchmarks.plans.plot_two_phase import draw
from mixtralkit.cli.run import run_tool
from mixtralkit.config import EngineConfig, FasterOptions, ModelConfig, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.engine.recorder import RoutingRecorder
from mixtralkit.engine.statistics import PhaseStatistics
from mixtralkit.layout import RankLayout
from mixtralkit.mixtral import Mixtral
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.moe.dispatch import Dispatchers
from mixtralkit.moe.layer import MoELayer, MoEReport, StepRows
from mixtralkit.moe.router import Routing
from mixtralkit.moe.shadow import Shadows
from mixtralkit.moe.store import ExpertStore
from mixtralkit.moe.two_phase import TwoPhase
from mixtralkit.ops.counting import count_keys
from mixtralkit.ops.hidden import Hidden
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import contiguous
from mixtralkit.planning.popularity import LONGEST_PATH, PathPopularity
from mixtralkit.planning.synthetic import RoutingProcess
from mixtralkit.planning.trace import RoutingTrace

ROOT = Path(__file__).resolve().parents[2]
THRESHOLDS = (None, 0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
TIMED_LENGTH = 3  # Lina's, at which two phases are timed against the others


@dataclass(frozen=True)
class Setting:
    """How a stack runs: ``"none"`` copies nothing, ``"shadow"`` by real counts, ``"two_phase"`` ahead."""

    kind: str
    popularity: PathPopularity | None = None
    threshold: float | None = None


class Stack:
    """MoE layers of one size over the ranks, the trace in place of their gates."""

    def __init__(
        self, context: RankContext, config: ModelConfig, dtype: torch.dtype, faster: FasterOptions, places: int
    ) -> None:
        self.context, self.config, self.dtype, self.faster, self.places = context, config, dtype, faster, places
        plan = contiguous(config.n_layers, config.num_experts, context.world_size)
        self.layout = RankLayout(config, ParallelConfig("dp", "ep"), plan, context.rank)

    @property
    def params(self) -> ModelConfig:
        return self.config

    def run(self, setting: Setting, batches: list[list[Routing]], x_TD: torch.Tensor) -> dict[str, object]:
        """Every batch once; figures per step, by the second half of the steps where they are times."""
        layers, shadows, phases = self._layers(setting, batches)
        statistics, seconds, moved = PhaseStatistics(self), [], 0
        for step in range(len(batches)):
            for layer in layers:
                layer.gate.turn = step
            self.context.barrier()
            start = time.perf_counter()
            flight = None if phases is None else phases.begin()
            reports = [layer(Hidden(None, x_TD), StepRows(flight=flight))[1] for layer in layers]
            if setting.kind == "shadow":
                shadows.between_steps(self._counts_LE(reports))
            if x_TD.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            statistics(ForwardBatch.build([], x_TD.device), reports)
            moved += sum(report.shadows.bytes_broadcast for report in reports if report.shadows)
        own_N = torch.tensor(seconds, dtype=torch.float64, device=x_TD.device)
        slowest = self.context.all_gather(own_N).amax(0).tolist()
        found = {"kind": setting.kind, "step_ms": 1e3 * median(slowest[len(slowest) // 2 :])}
        found |= {"bytes": moved / len(batches), **_sums(statistics, len(batches))}
        if setting.popularity is not None:
            found |= {"path_length": setting.popularity.path_length, "threshold": setting.threshold}
        return found

    def _counts_LE(self, reports: list[MoEReport]) -> np.ndarray:
        """Choices of each expert by the rows of all ranks."""
        counts = [count_keys(report.routing.experts_TK, self.config.num_experts) for report in reports]
        return self.context.all_reduce(torch.stack(counts)).cpu().numpy()

    def _layers(
        self, setting: Setting, batches: list[list[Routing]]
    ) -> tuple[list[MoELayer], Shadows | None, TwoPhase | None]:
        config, room = self.config, 0 if setting.kind == "none" else self.places
        store = ExpertStore(self.layout, self.context, self.dtype, room)
        shadows = Shadows(store, self.faster) if room else None
        options = MoEOptions(self.faster, "exact")
        dispatchers, layers = Dispatchers.create(self.layout, self.context, options), []
        for number in range(config.n_layers):
            layer = MoELayer(number, self.context, store, dispatchers, options, shadows)
            for weights in (layer.experts.w13, layer.experts.w2):
                weights.normal_(0, weights.shape[-1] ** -0.5)
            layer.gate = GivenGate([routings[number] for routings in batches], config.num_experts_per_tok)
            layers.append(layer)
        phases = TwoPhase(shadows, setting.popularity, setting.threshold) if setting.kind == "two_phase" else None
        return layers, shadows, phases


def _sums(statistics: PhaseStatistics, steps: int) -> dict[str, float]:
    totals = statistics.totals()
    if not totals:
        return {}
    estimates = sum(layer.estimates for layer in totals)
    return {
        "right": sum(layer.right for layer in totals) / estimates,
        "corrected": sum(layer.corrections for layer in totals) / estimates,
        "bytes_ahead": sum(layer.bytes_ahead for layer in totals) / steps,
        "hidden_ms": sum(layer.hidden_ms for layer in totals) / steps,
        "waited_ms": sum(layer.waited_ms for layer in totals) / steps,
    }


def bench_two_phase(
    rows: int = 256,
    steps: int = 16,
    repeats: int = 5,
    dim: int = 256,
    hidden: int = 512,
    places: int = 6,
    model: Path = ROOT / "ckpts",
    hardware: Path = ROOT / "configs" / "hardware" / "cpu-2core.json",
    device: str = "cpu",
    sweep: bool = True,
    seed: int = 0,
    output: Path | None = None,
    plots: Path | None = None,
) -> None:
    """Sweeps path lengths and thresholds on two traces.

    Args:
        rows: tokens of each rank in a step.
        steps: batches of a run, at most; as many as the trace has.
        repeats: runs of each of the settings that are timed against one another.
        dim: width of the layers that are timed.
        hidden: width of their experts.
        places: copies that a rank has room for, over all layers.
        model: the checkpoint whose routing is recorded.
        hardware: figures of the machine, for the choice of copies.
        device: cpu, in float32, or cuda, in bfloat16.
        sweep: also run every path length and threshold.
        seed: of the synthetic trace and the weights.
        output: JSON file for the results.
        plots: folder for the pictures.
    """
    context = RankContext.start(device)
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    figures = Hardware.load(hardware)
    faster = FasterOptions(net_bandwidth=figures.inside.exchange.bandwidth, gpu_throughput=figures.peak_flops)
    results = []
    for name, trace in (("shipped", _recorded(context, model)), ("synthetic", _synthetic(seed))):
        counted, tried = trace.split(0.5, seed)
        config = ModelConfig(
            dim=dim, n_layers=trace.num_layers, head_dim=2, hidden_dim=hidden, n_heads=2, n_kv_heads=2, vocab_size=8,
            num_experts=trace.num_experts, num_experts_per_tok=trace.top_k,
        )  # fmt: skip
        batches = _batches(tried, rows, steps, context)
        dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
        stack, x_TD = Stack(context, config, dtype, faster, places), torch.randn(rows, dim).to(context.device, dtype)
        swept = _swept(stack, counted, batches, x_TD) if sweep else ()
        for found in itertools.chain(_timed(stack, counted, batches, x_TD, repeats), swept):
            results.append({"trace": name, "steps": len(batches), **found})
            if context.is_first:
                print(_line(results[-1]), flush=True)
    if context.is_first:
        sizes = {"rows": rows, "dim": dim, "hidden": hidden, "places": places, "seed": seed}
        summary = {**describe_run(context), **sizes, "results": results}
        if output is not None:
            output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        if plots is not None:
            draw(summary, plots)
        print(json.dumps(summary))
    context.stop()


def draw_file(results: Path, plots: Path) -> None:
    """Draws the pictures of a result again.

    Args:
        results: JSON file of a run.
        plots: folder for the pictures.
    """
    draw(json.loads(results.read_text(encoding="utf-8")), plots)


def _timed(
    stack: Stack, counted: RoutingTrace, batches: list[list[Routing]], x_TD: torch.Tensor, repeats: int
) -> Iterator[dict[str, object]]:
    """Steps without copies, with shadows and with two phases, in turn; the median run of each."""
    profile = PathPopularity.fit(counted, TIMED_LENGTH)
    settings = (Setting("none"), Setting("shadow"), Setting("two_phase", profile))
    rounds = [[stack.run(setting, batches, x_TD) for setting in settings] for _ in range(repeats)]
    for runs in zip(*rounds, strict=True):
        yield {**sorted(runs, key=lambda run: run["step_ms"])[repeats // 2], "timed": True}


def _swept(
    stack: Stack, counted: RoutingTrace, batches: list[list[Routing]], x_TD: torch.Tensor
) -> Iterator[dict[str, object]]:
    """Two phases over path lengths and thresholds; their times are of one run each, and left out."""
    for length in range(LONGEST_PATH + 1):
        profile = PathPopularity.fit(counted, length)
        for threshold in THRESHOLDS:
            found = stack.run(Setting("two_phase", profile, threshold), batches, x_TD)
            yield {key: value for key, value in found.items() if key != "step_ms"}


def _batches(trace: RoutingTrace, rows: int, steps: int, context: RankContext) -> list[list[Routing]]:
    """This rank's routing of every step and layer: runs of the trace, rank by rank."""
    steps = min(steps, trace.num_tokens // (rows * context.world_size))
    found = []
    for step in range(steps):
        start = (step * context.world_size + context.rank) * rows
        experts_LTK = torch.from_numpy(trace.experts[start : start + rows].astype(np.int64)).transpose(0, 1)
        weights_TK = torch.full(experts_LTK.shape[1:], 1 / trace.top_k)
        on_device = [part.to(context.device) for part in (experts_LTK, weights_TK)]
        found.append([Routing(experts_TK, on_device[1], on_device[1][:0]) for experts_TK in on_device[0]])
    return found


def _recorded(context: RankContext, model: Path) -> RoutingTrace:
    """What the checkpoint's gates choose for parts of Python's library and documentation, in turn."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    code = [path.read_text(encoding="utf-8", errors="replace")[:800] for path in library]
    texts = [text for pair in zip(code, (t[:800] for t in topics.values()), strict=False) for text in pair if text]
    mixtral = Mixtral.load(
        EngineConfig.of(
            model=model, max_seq_len=1024, max_batch_size=16, dtype="float32", attention="dp",
            moe=MoEOptions(exchange="exact"),
        ),
        context,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(context.broadcast_object(folder)) / "trace.npz"
        with RoutingRecorder(mixtral.model, path) as mixtral.engine.observe:
            mixtral.complete(texts, 1, temperature=0)
        trace = RoutingTrace.load(path)
        context.barrier()
    return trace.take(np.lexsort((trace.position, trace.sequence)))


def _synthetic(seed: int) -> RoutingTrace:
    """Sequences whose tokens enter by the same expert, so that batches differ; each layer depends on the last two."""
    process = RoutingProcess.random(
        6, 8, concentration=4.0, affinity=1.0, memory=2, repetition=[0.99, 0, 0, 0, 0, 0], seed=seed
    )
    return process.trace(40_000, sequence_length=512, seed=seed)


def _line(result: dict[str, object]) -> str:
    words = [f"{result['trace']:>9} {result['kind']:>9}"]
    if "right" in result:
        words.append(f"l={result['path_length']} threshold={result['threshold']}")
        words.append(f"right {result['right']:.0%} corrected {result['corrected']:.0%}")
        words.append(f"hidden {result['hidden_ms']:.2f} ms waited {result['waited_ms']:.2f} ms")
    words.append(f"{result['bytes'] / 1e6:.2f} MB a step")
    if "step_ms" in result:
        words.append(f"of {result['step_ms']:.1f} ms")
    return "  ".join(words)


if __name__ == "__main__":
    run_tool({"bench": bench_two_phase, "draw": draw_file}, default="bench")
