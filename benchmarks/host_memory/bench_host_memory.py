"""Mixtral on a GPU that is held to a budget, its cold experts in host memory: what the machine can, then steps.

    python -m benchmarks.host_memory.bench_host_memory --quantize int4:128 fp8 none --trace routing.npy \
        --output host-memory.json

For each format of the experts first the rates of the machine: reading the GPU's memory, pinned copies, an expert's
product on the CPU, and the last two at once. Then steps of one sequence at each budget, with choices drawn evenly and
with those of ``--trace`` (int8 [tokens, layers, K], as docs/traces.md reads them), in place of the random model's
router. Its first half says which experts the budget keeps on the GPU, the second is run. Last, larger batches and
prompts. What would begin after ``--within`` seconds is left out.

``bound_ms`` of a line is the larger of reading what is resident and a step needs, at the rate of the GPU's memory, and
of missing bytes at the rate of pinned copies and the rate of the CPU's product, each measured alone, added.
``bound_together_ms`` takes the rates of both at once instead, which is what the machine can. A prompt's ``resident_ms``
is its time with all experts on the GPU. All rates are of the same run. One line of JSON a measurement on stdout;
``plot_host_memory`` makes docs/host-memory.md's tables and picture of them.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common.ceilings import Ceilings
from benchmarks.common.machine import describe_run
from benchmarks.host_memory.rates import Rates, rounded
from benchmarks.model.check import GREEDY
from benchmarks.model.source import RandomWords
from mixtralkit.cli.run import command, run_tool
from mixtralkit.config import EngineConfig, ModelConfig, TierOptions, parse_dtype, shipped
from mixtralkit.config.engine import Dtype
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.router import Router, Routing
from mixtralkit.moe.tiers import TierSetup, gpu_setup, tier_setup
from mixtralkit.moe.tiers.warm import measure
from mixtralkit.moe.weights import parse_weights
from mixtralkit.ops.hidden import Hidden
from mixtralkit.planning.plan import contiguous

UNTIMED = 8  # steps in front of those that are timed: captures, first uses
AHEAD = 4  # steps behind them, since the engine launches before it tells


@command
def bench_host_memory(
    model: Path = Path("mixtral-8x7b"),
    quantize: tuple[str, ...] = ("int4:128",),
    budgets: tuple[float, ...] = (24.0, 16.0, 12.0, 8.0),
    trace: Path | None = None,
    context: Count = 2048,
    steps: Count = 96,
    batches: tuple[str, ...] = ("8x2048", "64x256"),
    prompt: Count = 2048,
    misses: str = "auto",
    expert_cache: str = "lru",
    layers: int | None = None,
    places: int | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    seconds: float = 3.0,
    within: float = 240.0,
    profile: bool = False,
    output: Path | None = None,
) -> None:
    """Times steps of a random model whose experts are in host memory but for what a budget holds.

    Args:
        model: architecture, a params.json or the name of one in configs/models.
        quantize: formats of the experts, one after the other; none is the model's dtype.
        budgets: 10^9 bytes of GPU memory for everything, the largest first.
        trace: choices to replay, int8 [tokens, layers, K] of this model's numbers; left out, only even ones.
        context: tokens in front of the steps of one sequence.
        steps: timed steps, at most.
        batches: sequences and their context, at the first budget.
        prompt: tokens of the prompt that is timed, at the first budget.
        misses: as the engine's option.
        expert_cache: as the engine's option.
        layers: blocks, fewer than the model's.
        places: experts that the GPU holds, instead of what a budget leaves; for machines without a GPU.
        dtype: left out, bfloat16 on a GPU and float32 on a CPU.
        device: cpu or cuda; left out, cuda where there is one.
        seconds: no more steps are timed after so many seconds and 8 steps.
        within: seconds after which no measurement begins.
        profile: say where the host's time of a step went.
        output: file that takes the lines of JSON.
    """
    ranks = RankContext.start(device)
    kind = parse_dtype(dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    config = ModelConfig.from_file(shipped("models", model))
    config = replace(config, n_layers=layers or config.n_layers)
    options = TierOptions(misses=misses, expert_cache=expert_cache)
    routings = {"even": even_routing(config, 2 * (steps + 2 * UNTIMED))}
    if trace is not None:
        routings["trace"] = read_routing(trace, config)
    log, ends = Log(output), time.perf_counter() + within
    log.emit("machine", describe_run(ranks) | {"model": model.stem, "quantize": list(quantize), "misses": misses})
    for name in quantize:
        log.format = name
        bench = Bench(ranks, config, kind, None if name == "none" else name, options, log, profile, seconds, places)
        last, choices_SLK = next(reversed(routings.items()))
        work = [(bench.decode, budget, *of, 1, context, steps) for budget in budgets for of in routings.items()]
        for batch in batches:
            count, length = map(int, batch.split("x"))
            work.append((bench.decode, budgets[0], last, choices_SLK, count, length, min(steps, 24)))
        work.append((bench.prompt, budgets[0], prompt))
        for measure_it, budget, *given in [(bench.build, max(budgets)), *work]:
            if time.perf_counter() > ends:
                log.emit("left out", {"budget_gb": budget})
                continue
            try:
                measure_it(budget, *given)
            except ValueError as error:  # too small a budget for the format
                log.emit("refused", {"budget_gb": budget, "why": str(error)})
                if bench.model is None:
                    break
        bench.model = None
        del bench, work, measure_it
        gc.collect()


@dataclass
class Log:
    """Lines of JSON, on stdout and in a file."""

    output: Path | None
    format: str | None = None

    def emit(self, name: str, values: dict[str, Any]) -> None:
        """A line of a measurement, which names the format that it is of."""
        line = json.dumps({"measured": name, **({"quantize": self.format} if self.format else {}), **values})
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("w" if name == "machine" else "a", encoding="utf-8") as file:
                file.write(line + "\n")


def even_routing(config: ModelConfig, steps: int) -> np.ndarray:
    """int64 [steps, L, K]: experts drawn evenly, no row one of them twice."""
    rng = np.random.default_rng(0)
    drawn = rng.random((steps, config.n_layers, config.num_experts)).argsort(-1)
    return drawn[..., : config.num_experts_per_tok].astype(np.int64)


def read_routing(path: Path, config: ModelConfig) -> np.ndarray:
    """int64 [tokens, L, K] of a file; ValueError where it does not fit the model."""
    choices = np.load(path)
    wanted = (config.num_experts_per_tok,)
    if choices.ndim != 3 or choices.shape[2:] != wanted or choices.shape[1] < config.n_layers:
        raise ValueError(f"trace ({path}): shape {choices.shape} must be [tokens, {config.n_layers}, {wanted[0]}]")
    return choices[:, : config.n_layers].astype(np.int64)


class ReplayedRouter(nn.Module):
    """Choices that are given, in steps of so many rows; in others the router's own."""

    def __init__(self, router: Router, layer: int, rows: int, choices_SLK: np.ndarray, step: torch.Tensor) -> None:
        """``step`` int64 [1] on the device says which choices; the first layer counts it up."""
        super().__init__()
        self.router, self.layer, self.rows, self.step = router, layer, rows, step
        self.weight, steps = router.weight, len(choices_SLK)
        turned = [np.roll(choices_SLK[:, layer], -row * (steps // rows), 0) for row in range(rows)]
        self.choices_STK = torch.from_numpy(np.stack(turned, 1)).to(step.device)

    def forward(self, hidden: Hidden) -> tuple[Routing, Hidden]:
        routing, hidden = self.router(hidden)
        if len(hidden) == self.rows:
            if self.layer == 0:
                self.step.add_(1).remainder_(len(self.choices_STK))
            routing = replace(routing, experts_TK=self.choices_STK.index_select(0, self.step)[0])
        return routing, hidden


@dataclass
class Bench:
    """One model, its budgets and what was measured."""

    ranks: RankContext
    config: ModelConfig
    dtype: torch.dtype
    quantize: str | None
    options: TierOptions
    log: Log
    profile: bool
    seconds: float
    places: int | None
    model: Transformer | None = None

    def build(self, budget: float) -> None:
        """A model of random weights, every expert the same, and the machine's rates."""
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        started = time.perf_counter()
        setup = self._setup(budget, 1, 64)
        self.model = Transformer(self._layout(1, 64), self.ranks, self.dtype, tiers=setup)
        built = time.perf_counter()
        for tensor in self.model.named_tensors().values():
            if tensor.device == self.ranks.device and tensor.is_floating_point() and tensor.data_ptr() != 0:
                tensor.normal_(0.0, 0.02) if tensor.dim() > 1 else tensor.fill_(1.0)
        self._fill_experts()
        tiers = self.model.store.tiers
        tiers.costs = measure(tiers)
        self.rates = Rates.measure(tiers, Ceilings.measure(self.ranks, self.dtype).read)
        seconds = {"memory_s": round(built - started, 1), "fill_and_measure_s": round(time.perf_counter() - built, 1)}
        self.log.emit("rates", self.rates.rounded() | seconds | {"expert_mb": round(tiers.expert_bytes / 1e6, 4)})

    def _fill_experts(self) -> None:
        (dim, hidden), device = self.model.store.tiers.columns, self.ranks.device
        weights = self.model.layout.weights
        shapes = ((2, hidden, dim), (1, dim, hidden))
        plain = [torch.randn(shape, device=device).mul_(0.02).to(self.dtype) for shape in shapes]
        if weights.is_plain:
            parts = [w.flatten(0, 1) for w in plain]
        else:
            packed = [weights.quantize(w).tensors for w in plain]
            parts = [part.flatten(0, 1) for tensors in packed for part in tensors]
        del plain
        for host in self.model.store.tiers.hosts.values():
            for tensor, part in zip(host.tensors, parts, strict=True):
                for slot in range(len(tensor)):
                    tensor[slot].copy_(part, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def _layout(self, batch: int, length: int, tier: tuple | None = None) -> RankLayout:
        config = self.config.with_limits(length, batch)
        single = RankLayout.single(config)
        plan = replace(contiguous(config.n_layers, config.num_experts, 1), tier=tier)
        return replace(single, plan=plan, weights=parse_weights(self.quantize))

    def _setup(self, budget: float, batch: int, length: int) -> TierSetup:
        if self.places is not None:
            return TierSetup(self.places, self.options)
        engine = EngineConfig.of(
            tiers=replace(self.options, gpu_memory_gb=budget), quantize=self.quantize,
            prefill_budget=max(2048, min(length, 2048)),
        )  # fmt: skip
        of = tier_setup if self.model is None else gpu_setup  # the host has the experts by then
        setup = of(self._layout(batch, length), self.ranks, engine, self.dtype)
        return setup or TierSetup(self.config.n_layers * self.config.num_experts, self.options)

    def _use(self, setup: TierSetup, choices_SLK: np.ndarray | None, batch: int, length: int) -> Engine:
        """The model with so many places, and keys and values for the batch."""
        model, tier = self.model, None
        model.cache = None
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if choices_SLK is not None:
            tier = popular_tiers(choices_SLK[: len(choices_SLK) // 2], self.config.num_experts, setup.places)
        model.layout = self._layout(batch, length, tier)
        model.store.retier(setup, model.layout)
        model.store.tiers.routers.clear()  # which guess what the replayed choices are not
        model.allocate_cache()
        return Engine(model, RandomWords(self.config.vocab_size), prefill_budget=2048, mixed_budget=None)

    def decode(self, budget: float, name: str, choices_SLK: np.ndarray, batch: int, context: int, steps: int) -> None:
        """Steps of a batch behind a context of random tokens."""
        tokens = UNTIMED + steps + AHEAD + batch  # whose prompt came first is so far ahead; none may end in between
        length = context + tokens + 2
        engine = self._use(self._setup(budget, batch, length), choices_SLK, batch, length)
        model, own = self.model, [block.feed_forward.gate for block in self.model.layers]
        half = choices_SLK[len(choices_SLK) // 2 :]
        step = torch.zeros(1, dtype=torch.int64, device=self.ranks.device)
        for layer, block in enumerate(model.layers):
            block.feed_forward.gate = ReplayedRouter(own[layer], layer, batch, half, step)
        tiers, rng = model.store.tiers, np.random.default_rng(1)
        clock = Clock(tiers) if self.profile else None
        prompts = rng.integers(0, self.config.vocab_size, (batch, context)).tolist()
        requests = [Request(i, tuple(ids), tokens, GREEDY) for i, ids in enumerate(prompts)]
        times = []
        for _ in steps_of(engine, requests, batch):
            times.append(time.perf_counter())
            if len(times) == UNTIMED:
                before = asdict(tiers.counts)
                if clock is not None:
                    clock.clear()
            timed = len(times) - UNTIMED
            if timed == steps or (timed >= min(steps, 8) and times[-1] - times[UNTIMED - 1] > self.seconds):
                break
        steps = timed
        found = {key: value - before[key] for key, value in asdict(tiers.counts).items()}
        for block, router in zip(model.layers, own, strict=True):
            block.feed_forward.gate = router
        timed_ms = 1e3 * np.diff(times[UNTIMED - 1 :])
        self.log.emit("decode", {
            "budget_gb": budget, "routing": name, "batch": batch, "context": context, "steps": steps,
            "places": tiers.setup.places, "step_ms": rounded(float(timed_ms.mean())),
            "median_ms": rounded(float(np.median(timed_ms))),
            **self._bound(found, batch, context, steps, float(timed_ms.mean())),
            **{key: round(value / steps, 3) for key, value in found.items()}, **self._memory(),
            **({} if clock is None else {"host_ms": clock.per_step(steps)}),
        })  # fmt: skip

    def _bound(self, found: dict[str, int], batch: int, context: int, steps: int, step_ms: float) -> dict[str, float]:
        """The larger of both bounds, and the step's time in it."""
        tiers, config = self.model.store.tiers, self.config
        fixed = sum(
            p.nbytes for name, p in self.model.named_tensors().items() if ".w13" not in name and ".w2" not in name
        )
        fixed -= self.model.tok_embeddings.weight.nbytes
        cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * context * batch * self.dtype.itemsize
        choices = (found["hits"] + found["misses"]) / steps
        rows = batch * config.n_layers * config.num_experts_per_tok / max(choices, 1)
        resident_ms = 1e3 * (fixed + cache + found["hits"] / steps * tiers.expert_bytes) / self.rates.read
        missing_ms = 1e3 * found["misses"] / steps * tiers.expert_bytes / (self.rates.bus + self.rates.cpu(rows))
        together_ms = missing_ms * (self.rates.bus + self.rates.cpu(rows)) / self.rates.together(rows)
        bound_ms = max(resident_ms, missing_ms)
        values = {
            "bound_ms": bound_ms,
            "bound_together_ms": max(resident_ms, together_ms),
            "resident_ms": resident_ms,
            "missing_ms": missing_ms,
        }
        values |= {"of_bound": step_ms / bound_ms, "hit_rate": found["hits"] / max(found["hits"] + found["misses"], 1)}
        return {key: rounded(value) for key, value in values.items()}

    def prompt(self, budget: float, length: int) -> None:
        """A prompt by itself, the third of three; and with all experts on the GPU, if it has the memory."""
        setup = self._setup(budget, 1, length + 2)
        most = self.config.n_layers * self.config.num_experts + self.config.num_experts_per_tok
        resident = self._prompt(replace(setup, places=most), length)[0]
        seconds, found, places = self._prompt(setup, length)
        bus_s = found["fetched_bytes"] / self.rates.bus
        self.log.emit("prompt", {
            "budget_gb": budget, "tokens": length, "ms": round(1e3 * seconds, 2), "places": places,
            "resident_ms": round(1e3 * resident, 2), "bus_ms": round(1e3 * bus_s, 2),
            "of_bound": rounded(seconds / max(resident, bus_s)), **found, **self._memory(),
        })  # fmt: skip

    def _prompt(self, setup: TierSetup, length: int) -> tuple[float, dict[str, int], int]:
        """Seconds, what was counted, and the places."""
        engine = self._use(setup, None, 1, length + 2)
        rng, tiers = np.random.default_rng(2), self.model.store.tiers
        for number in range(3):
            before = replace(tiers.counts)
            ids = tuple(rng.integers(0, self.config.vocab_size, length).tolist())
            started = time.perf_counter()
            engine.complete([Request(number, ids, 1, GREEDY)])
            seconds = time.perf_counter() - started
        return seconds, {k: v - getattr(before, k) for k, v in asdict(tiers.counts).items()}, tiers.setup.places

    def _memory(self) -> dict[str, float]:
        if self.ranks.device.type != "cuda":
            return {}
        return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)}


def popular_tiers(choices_SLK: np.ndarray, experts: int, places: int) -> tuple[tuple[str, ...], ...]:
    """[L][E] of a plan: so many experts on the GPU as there are places, those that were chosen most."""
    layers = choices_SLK.shape[1]
    counts_LE = np.stack([np.bincount(choices_SLK[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    order = np.argsort(-counts_LE, axis=None, kind="stable")[:places]
    on_gpu = np.zeros(counts_LE.size, bool)
    on_gpu[order] = True
    return tuple(tuple("gpu" if here else "host" for here in row) for row in on_gpu.reshape(counts_LE.shape))


def steps_of(engine: Engine, requests: list[Request], batch: int) -> Iterator[None]:
    """Once each decode step of the whole batch."""
    seen = dict.fromkeys((request.id for request in requests), 0)
    done = 0
    for event in engine.run(requests):
        seen[event.id] += 1
        if min(seen.values()) > done:
            done += 1
            if done > 1:  # the first token is the prompt's
                yield


class Clock:
    """Where the host's time of a step goes: in the tiers' calls."""

    NAMES = ("ask", "compute", "product_on_cpu", "balance", "found", "look_ahead", "take_in")

    def __init__(self, tiers: Any) -> None:
        self.seconds = dict.fromkeys(self.NAMES, 0.0)
        for name in self.NAMES:
            setattr(tiers, name, self._timed(name, getattr(type(tiers), name).__get__(tiers)))

    def _timed(self, name: str, call: Any) -> Any:
        def timed(*args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **more)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed

    def clear(self) -> None:
        self.seconds.update(dict.fromkeys(self.NAMES, 0.0))

    def per_step(self, steps: int) -> dict[str, float]:
        return {name: round(1e3 * seconds / steps, 3) for name, seconds in self.seconds.items()}


if __name__ == "__main__":
    if "--help" not in sys.argv:
        torch.manual_seed(0)
    run_tool(bench_host_memory)
