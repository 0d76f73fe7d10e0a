"""A whole Mixtral through the engine that users run: decode, prefill, memory, start.

    python -m benchmarks.model.bench_model --random_weights --batch 1,8,64,256 \
        --prompt_len 128 --new_tokens 256 --prefill 8x2048
    torchrun --standalone --nproc_per_node=4 -m benchmarks.model.bench_model … --attention tp --experts tp
    torchrun --standalone --nproc_per_node=4 -m benchmarks.model.bench_model … --attention dp --experts ep \
        --plan contiguous,balanced+2,everywhere,contiguous+shadow,contiguous+managed,hot_cold+capacity0.5

Prints one line of JSON a measurement on stdout, a table on stderr. docs/performance.md says what the fields mean.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch

from benchmarks.common.ceilings import Ceilings
from benchmarks.common.machine import describe_run
from benchmarks.common.profile_step import profiled
from benchmarks.model.bounds import choice_shares, computed_experts, decode_bytes, expected_experts, prefill_operations
from benchmarks.model.check import TOLERANCE, check
from benchmarks.model.peer_fields import peer_fields
from benchmarks.model.source import RandomWords, Source, random_requests
from benchmarks.model.variants import Variant, dispatchers_of, memory_by_rank, plan_fields
from benchmarks.model.watch import Watch, manager_fields, restore
from mixtralkit.checkpoint import open_checkpoint
from mixtralkit.cli.run import command, run_tool
from mixtralkit.config import EngineConfig, ModelConfig, MoEOptions, ParallelOptions, parse_dtype, shipped
from mixtralkit.config.engine import Dtype, Quantize, QuantizeAttention
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.requests import Request
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.replicas import SMALL_BATCH_CHOICES


@command
def bench_model(
    model: Path = Path("mixtral-8x7b"),
    random_weights: bool = False,
    ckpt: Path | None = None,
    batch: str = "1,8,64,256",
    prompt_len: int = 128,
    new_tokens: int = 256,
    prefill: str | None = None,
    layers: int | None = None,
    repeats: int = 3,
    check_layers: int = 2,
    profile: Path | None = None,
    profile_steps: int = 8,
    prefill_budget: int | None = None,
    update_step: int = 64,
    seed: int = 0,
    output: Path | None = None,
    quantize: Quantize | None = None,
    quantize_attention: QuantizeAttention | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    *,
    parallel: ParallelOptions,
    moe: MoEOptions,
) -> None:
    """Times a whole model: decode = (time of all new tokens - time of 1) / (new tokens - 1), and prefill.

    --plan takes auto, or plan files and names, several between commas: contiguous, hot_cold+N (N hot experts, 1 without
    +N), balanced+N (N slots a layer more than experts), everywhere. Behind a name, +capacityF cuts the rows of cold
    experts, +reroute offers them to other experts, +shadow copies hot experts, and +managed moves experts to balanced
    plans every update_step steps. Loads to plan by are those of --trace, or of random prompts that are run before.

    Args:
        model: architecture, a params.json or the name of one in configs/models; not read with --ckpt.
        random_weights: normal weights, made on the device.
        ckpt: folder of a checkpoint, instead of random weights.
        batch: numbers of sequences to decode, over all ranks, between commas.
        prompt_len: random tokens of each prompt.
        new_tokens: tokens to generate for each.
        prefill: prompts to time alone, as COUNTxLENGTH, several between commas.
        layers: blocks of the model, fewer than it has, with random weights.
        repeats: of each measurement; the median counts.
        check_layers: layers whose answers are compared with float32 before anything is timed; 0 for none.
        profile: where traces go, gzipped: NAME.json gives NAME-decode-8.json.gz and so on. Also prints tables.
        profile_steps: decode steps in a trace.
        prefill_budget: prompt tokens of one step; when not given, all prompts of a measurement are one step.
        update_step: steps between the plans of +managed.
        seed: of weights and prompts.
        output: file that takes the lines of JSON.
        quantize: format of the experts' weights; answers are then not compared with float32.
        quantize_attention: int8 or fp8, of attention's projections and the output matrix; the same.
        dtype: bfloat16, float16 or float32; left out, bfloat16 on a GPU and float32 on a CPU.
        device: cpu or cuda; left out, cuda where there is one.
    """
    import_s = seconds_since_start()
    batches, prompts = _numbers("batch", batch), _prefills(prefill or "")
    _check({"prompt_len": prompt_len, "new_tokens": new_tokens, "repeats": repeats}, random_weights, ckpt, layers)
    context = RankContext.start(device)
    kind = parse_dtype(dtype or ("bfloat16" if context.device.type == "cuda" else "float32"))
    reader = None if ckpt is None else open_checkpoint(ckpt)
    config = reader.config if reader is not None else _architecture(model, layers)
    formats = {"quantize": quantize, "quantize_attention": quantize_attention}
    engine = EngineConfig.of(parallel=parallel, moe=moe, dtype=dtype, **formats)
    most = max(batches + [count for count, _ in prompts])
    source = Source(config.with_limits(prompt_len + new_tokens, most), reader, context, kind, engine, seed)
    variants = [Variant()] if parallel.plan is None else [Variant.parse(name) for name in str(parallel.plan).split(",")]
    loads_LE, loads_from = source.loads(variants, prompt_len, new_tokens)
    common = {
        **describe_run(context),
        "model": (model if ckpt is None else ckpt).stem, "layers": config.n_layers,
        "dtype": str(kind).removeprefix("torch."), "weights": "random" if random_weights else "checkpoint",
        **{name: value for name, value in formats.items() if value is not None},
    }  # fmt: skip
    bench = Bench(RandomWords(config.vocab_size), context, seed, repeats, prefill_budget, common, output)
    traces = None if profile is None else Traces(profile, profile_steps)
    for number, variant in enumerate(variants):
        bench.release()
        model = source.build(variant, loads_LE)
        bench.use(model, variant, loads_from if variant.needs_loads else None)
        if "managed" in variant.extras:
            bench.make_manager = partial(source.manager, model, update_step)
        del model
        if number == 0:
            if loads_from != "random prompts":  # which ran before
                bench.start(import_s, prompt_len)
            bench.ceilings = Ceilings.measure(context, kind)
            bench.emit("ceilings", {})
        # what a capacity drops is no error, and float32 may drop other rows
        checked = check_layers > 0 and variant.capacity is None and not any(formats.values())
        for count in batches if checked else []:
            bench.check(check_layers, count)
        bench.measure(batches, prompt_len, new_tokens, prompts, traces)
    context.stop()


def _check(numbers: dict[str, int], random_weights: bool, ckpt: Path | None, layers: int | None) -> None:
    """ValueError for options that do not go together."""
    for name, value in numbers.items():
        least = 1 + (name == "new_tokens")
        if value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
    if random_weights == (ckpt is not None):
        raise ValueError("give either --random_weights or --ckpt, for the weights")
    if ckpt is not None and layers is not None:
        raise ValueError("layers works with random weights only")


def _architecture(model: Path, layers: int | None) -> ModelConfig:
    """A model's configuration, with fewer blocks if asked for."""
    config = ModelConfig.from_file(shipped("models", model))
    if layers is None:
        return config
    if not 1 <= layers <= config.n_layers:
        raise ValueError(f"layers ({layers}) must lie in 1 … {config.n_layers}")
    return replace(config, n_layers=layers)


@dataclass(frozen=True)
class Traces:
    """Where traces go, and the decode steps in one."""

    path: Path
    steps: int


@dataclass
class Bench:
    """The measurements of one model after the other; collective, like their engines."""

    tokenizer: RandomWords
    context: RankContext
    seed: int
    repeats: int
    prefill_budget: int | None
    about: dict[str, object]
    output: Path | None
    model: Transformer | None = None
    ceilings: Ceilings | None = None
    make_manager: Callable[[], PlanManager] | None = None

    def __post_init__(self) -> None:
        self.drawn, self.common = 0, self.about
        if self.output is not None and self.context.is_first:
            self.output.write_text("", encoding="utf-8")

    def release(self) -> None:
        """Gives back the model's memory, before another takes as much."""
        self.model = self.make_manager = None
        self._collect()

    def use(self, model: Transformer, variant: Variant, loads_from: str | None) -> None:
        """Measures this model from now on; ``loads_from`` says what its plan was made from, where that counts."""
        self.model, self.first_plan = model, model.layout.plan
        self.common = self.about | {
            **asdict(model.layout.parallel),
            "plan": plan_fields(model.layout.plan, loads_from), "with": variant.extras, **dispatchers_of(model),
            "small_batch_choices": SMALL_BATCH_CHOICES,
        }  # fmt: skip

    def engine(self, count: int, length: int, budget: int) -> Engine:
        """A new engine on the same weights, with room for ``count`` sequences of ``length`` tokens and no more."""
        self.model.cache = None
        self._collect()  # the last engine's graphs and cache
        if self.context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        layout = replace(self.model.layout, config=self.model.params.with_limits(length, count))
        self.model.layout = self.model.store.layout = layout
        engine = Engine(self.model, self.tokenizer, prefill_budget=self.prefill_budget or budget)
        if self.make_manager is not None:
            restore(self.model, self.first_plan)
            engine.plan_manager = self.make_manager()
        return engine

    def _collect(self) -> None:
        gc.collect()
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()

    def requests(self, count: int, length: int, new_tokens: int) -> list[Request]:
        """Prompts that never came before, the same on every rank."""
        self.drawn += 1
        return random_requests(self.tokenizer, count, length, new_tokens, 1000 * self.seed + self.drawn)

    def timed(self, engine: Engine, requests: list[Request]) -> float:
        """Seconds until every rank has all answers."""
        self._wait()
        self.context.barrier()
        start = time.perf_counter()
        engine.complete(requests)
        self._wait()
        return max(self.context.all_gather_objects(time.perf_counter() - start))

    def start(self, import_s: float, prompt_len: int) -> None:
        """From the process's start: weights in place, first token, and a few more, for which decode must be ready."""
        self._wait()
        ready_s = seconds_since_start()
        engine = self.engine(1, prompt_len + 4, prompt_len)
        first_s = self.timed(engine, self.requests(1, prompt_len, 1))
        first_token_s = seconds_since_start()
        decode_s = self.timed(engine, self.requests(1, prompt_len, 4))
        found = {"import_s": import_s, "weights_s": ready_s - import_s, "ready_s": ready_s, "first_answer_s": first_s,
                 "first_token_s": first_token_s, "first_decode_s": decode_s,
                 "decoding_s": seconds_since_start()}  # fmt: skip
        self.emit("start", {name: round(value, 3) for name, value in found.items()})

    def check(self, layers: int, count: int) -> None:
        """Refuses to go on where the engine's answers are not the model's."""
        found = check(self.model, self.tokenizer, layers, count, self.seed)
        self.emit(
            "check", {"batch": count, "against": "float32", "tolerance": TOLERANCE[self.model.dtype], **asdict(found)}
        )
        with self.context.agreed():
            if not found.passes(self.model.dtype):
                raise RuntimeError(f"the engine's answers differ from float32 by more than rounding: {found}")

    def measure(
        self, batches: list[int], prompt_len: int, new_tokens: int, prompts: list[tuple[int, int]],
        traces: Traces | None,
    ) -> None:  # fmt: skip
        """Every batch's decode steps and every set of prompts, profiled as well where ``traces`` says."""
        for count in batches:
            self.decode(count, prompt_len, new_tokens)
            if traces is not None:
                self.profile_decode(count, prompt_len, traces.steps, traces.path)
        for count, length in prompts:
            self.prefill(count, length)
            if traces is not None:
                self.profile_prefill(count, length, traces.path)

    def decode(self, count: int, prompt_len: int, new_tokens: int) -> None:
        """Milliseconds of a decode step with ``count`` sequences, and the share of its bound."""
        engine = self.engine(count, prompt_len + new_tokens, count * prompt_len)
        warm_s = self.timed(engine, self.requests(count, prompt_len, min(new_tokens, 8)))
        pairs = []
        for _ in range(self.repeats):
            first, watch = self.timed(engine, self.requests(count, prompt_len, 1)), Watch()
            with watch.on():
                pairs.append((first, self.timed(engine, self.requests(count, prompt_len, new_tokens))))
        steps_s = [(whole - first) / (new_tokens - 1) for first, whole in pairs]
        step_s, first_s, whole_s = median(steps_s), median(p[0] for p in pairs), median(p[1] for p in pairs)
        sizes, source = self._step_bytes(engine, count, prompt_len, new_tokens)
        bound_s, bound = self.ceilings.bound_s(sum(sizes.values()), 0.0)
        self.emit("decode", {
            "batch": count, "prompt_len": prompt_len, "new_tokens": new_tokens,
            "tokens_per_s": round(count / step_s, 2), "ms_per_step": round(1e3 * step_s, 4),
            "ms_per_step_all": [round(1e3 * value, 4) for value in steps_s],
            "time_to_first_token_s": round(first_s, 4), "warm_up_s": round(warm_s, 3),
            "steps": dict(Counter(watch.kinds)),
            **({} if engine.plan_manager is None else manager_fields(engine.plan_manager, self.context)),
            "bound_ms": round(1e3 * bound_s, 4), "bound": bound, "share_of_bound": round(bound_s / step_s, 4),
            "gb_per_step": {part: round(size / 1e9, 4) for part, size in sizes.items()}, "experts_from": source,
            **self._memory(), "memory_by_rank": memory_by_rank(self.model),
            **peer_fields(count, prompt_len, new_tokens, first_s, step_s, whole_s),
        })  # fmt: skip

    def prefill(self, count: int, length: int) -> None:
        """Tokens/s of ``count`` prompts, until each has its first new token."""
        engine = self.engine(count, length + 1, count * length)
        warm_s = self.timed(engine, self.requests(count, length, 1))
        times_s = [self.timed(engine, self.requests(count, length, 1)) for _ in range(self.repeats)]
        seconds = median(times_s)
        own = [length] * -(-count // self.model.ranks_with_own_sequences)
        operations = prefill_operations(self.model.layout, own, count * length)
        bound_s, bound = self.ceilings.bound_s(0.0, operations)
        self.emit("prefill", {
            "batch": count, "prompt_len": length, "tokens_per_s": round(count * length / seconds, 1),
            "time_to_first_token_s": round(seconds, 5), "seconds_all": [round(value, 5) for value in times_s],
            "warm_up_s": round(warm_s, 3), "tflops": round(operations / seconds / 1e12, 2),
            "bound_ms": round(1e3 * bound_s, 3), "bound": bound, "share_of_bound": round(bound_s / seconds, 4),
            **self._memory(), "memory_by_rank": memory_by_rank(self.model),
            **peer_fields(count, length, 1, seconds, None, seconds),
        })  # fmt: skip

    def profile_decode(self, count: int, prompt_len: int, steps: int, path: Path) -> None:
        """Profiles some steps in the middle of an answer, on rank 0."""
        new_tokens = steps + 8
        engine = self.engine(count, prompt_len + new_tokens, count * prompt_len)
        engine.complete(self.requests(count, prompt_len, new_tokens))
        events = iter(engine.run(self.requests(count, prompt_len, new_tokens)))
        _take(events, 4 * count)

        def run() -> int:
            _take(events, steps * count)
            return steps

        sizes, _ = self._step_bytes(engine, count, prompt_len, 8, observe=False)
        self._profile(run, path, f"decode-{count}", sizes)
        _take(events, None)

    def profile_prefill(self, count: int, length: int, path: Path) -> None:
        """Profiles one step of prompts, on rank 0."""
        engine = self.engine(count, length + 1, count * length)
        engine.complete(self.requests(count, length, 1))
        requests = self.requests(count, length, 1)
        self._profile(lambda: len(engine.complete(requests)) and 1, path, f"prefill-{count}x{length}", {})

    def _profile(self, run: Callable[[], int], path: Path, name: str, sizes: dict[str, float]) -> None:
        if not self.context.is_first:
            run()
            return
        trace = path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.json')}-{name}.json.gz")
        found = profiled(run, self.context.device, trace)
        if found is None:
            print(f"profile of {name}: needs a GPU", file=sys.stderr)
            return
        print(f"\n{name}\n{found.table(sizes, self.ceilings.read)}\n", file=sys.stderr, flush=True)
        parts = {part: round(us, 1) for part, us in found.parts().items()}
        self.emit("profile", {"of": name, "step_us": round(found.whole_us, 1), "idle_us": round(found.idle_us, 1),
                              "us_by_part": parts})  # fmt: skip

    def _step_bytes(
        self, engine: Engine, count: int, prompt_len: int, new_tokens: int, observe: bool = True
    ) -> tuple[dict[str, float], str]:
        """Bytes a decode step must read on the rank that reads most, and whether its experts were counted."""
        layout, params = self.model.layout, self.model.params
        own = -(-count // self.model.ranks_with_own_sequences)
        contexts = [prompt_len + new_tokens / 2] * own
        touched_L = self._touched(engine, count, prompt_len) if observe else None
        source = "expected, uniform" if touched_L is None else "counted"
        if touched_L is None:
            touched_L = [
                sum(
                    expected_experts(params.num_experts, params.num_experts_per_tok, count * share) / params.num_experts
                    for share in choice_shares(layout, layer, count)
                )
                for layer in range(params.n_layers)
            ]
        sizes = decode_bytes(layout, touched_L, contexts, self.model.dtype.itemsize)
        return max(self.context.all_gather_objects(sizes), key=lambda parts: sum(parts.values())), source

    def _touched(self, engine: Engine, count: int, prompt_len: int) -> list[float] | None:
        """This rank's experts that a decode step touches, by layer: the mean of a few steps that are not timed."""
        if self.model.ranks_with_own_sequences > 1:
            return None  # rows of other ranks come here too, which the reports of one rank do not tell
        seen: list[list[float]] = []

        def observe(batch, reports) -> None:
            if len(batch.tokens_T) == count and batch.is_decode:
                chosen = [report.routing.experts_TK.cpu().numpy() for report in reports]
                seen.append([float(computed_experts(self.model.layout, *one)) for one in enumerate(chosen)])

        engine.observe = observe
        try:
            engine.complete(self.requests(count, prompt_len, 6))
        finally:
            engine.observe = None
        return [mean(layer) for layer in zip(*seen, strict=True)] if seen else None

    def emit(self, measurement: str, found: dict[str, object]) -> None:
        """One line of JSON, on the first rank."""
        ceilings = {} if self.ceilings is None else {"ceilings": self.ceilings.rounded()}
        if not self.context.is_first:
            return
        line = json.dumps({"measurement": measurement, **found, **ceilings, **self.common})
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        print(_row(measurement, found or ceilings["ceilings"]), file=sys.stderr, flush=True)

    def _memory(self) -> dict[str, float]:
        if self.context.device.type != "cuda":
            return {}
        taken = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved())
        most = [max(values) for values in zip(*self.context.all_gather_objects(taken), strict=True)]
        names = ("memory_gb", "peak_memory_gb", "reserved_memory_gb")
        return {name: round(value / 1e9, 3) for name, value in zip(names, most, strict=True)}

    def _wait(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)


def seconds_since_start() -> float:
    """Seconds since the operating system started this process: Python's own start and imports count."""
    if not hasattr(time, "CLOCK_BOOTTIME"):  # only Linux says when a process started without another package
        return time.perf_counter() - _IMPORTED
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


_IMPORTED = time.perf_counter()


def _row(measurement: str, found: dict[str, object]) -> str:
    shown = {name: value for name, value in found.items() if isinstance(value, int | float | str)}
    return f"{measurement:<9} " + "  ".join(f"{name} {value}" for name, value in shown.items())


def _numbers(name: str, text: str) -> list[int]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise ValueError(f"{name} ({text!r}) must be whole numbers of at least 1 between commas")
    return [int(part) for part in text.split(",")]


def _prefills(text: str) -> list[tuple[int, int]]:
    found = []
    for part in filter(None, text.split(",")):
        count, _, length = part.partition("x")
        if not (count.isdigit() and length.isdigit() and int(count) and int(length)):
            raise ValueError(f"prefill ({part!r}) must be COUNTxLENGTH, such as 8x2048")
        found.append((int(count), int(length)))
    return found


def _take(events: Iterator, count: int | None) -> None:
    """Takes so many events, which are the steps' tokens; None takes all."""
    for number, _ in enumerate(events, 1):
        if number == count:
            return


if __name__ == "__main__":
    run_tool(bench_model)
