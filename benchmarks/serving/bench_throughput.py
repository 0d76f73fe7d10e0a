"""Many requests at once through one engine: throughput, latency under arrivals, shared beginnings, host time.

    python -m benchmarks.serving.bench_throughput --random_weights --output serving.json

Builds the model once. Prints one line of JSON a measurement, with the fields of vLLM's ``bench throughput`` and
``bench serve``, and a line with each goal at the end.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import numpy as np

from benchmarks.common.machine import describe_run
from benchmarks.model.check import GREEDY
from benchmarks.model.source import RandomWords
from benchmarks.serving.load import Record, poisson_starts, random_prompts, run, serve_fields, throughput_fields
from mixtralkit.cli.run import command, run_tool
from mixtralkit.config import EngineConfig, ModelConfig, ParallelOptions, parse_dtype, shipped
from mixtralkit.config.engine import Dtype, Quantize, QuantizeAttention
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.mixtral import choose_layout
from mixtralkit.model.transformer import Transformer

CASES = ("single", "fixed", "mixed", "uniform", "poisson", "prefix")


@command
def bench_throughput(
    model: Path = Path("mixtral-8x7b"),
    random_weights: bool = False,
    cases: str = ",".join(CASES),
    sequences: Count = 256,
    prompt_len: Count = 512,
    new_tokens: Count = 256,
    requests: Count = 512,
    shortest: Count = 100,
    longest: Count = 1024,
    shared: Count = 1500,
    sharing: Count = 64,
    load: float = 0.8,
    cache_tokens: Count = 300_000,
    page_size: Count = 128,
    prefill_budget: Count = 8192,
    mixed_budget: Count = 768,
    layers: Count | None = None,
    seed: int = 0,
    output: Path | None = None,
    quantize: Quantize | None = None,
    quantize_attention: QuantizeAttention | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    *,
    parallel: ParallelOptions,
) -> None:
    """Serves random requests to a whole model and says which of the goals for one H200 are met.

    Args:
        model: architecture, a params.json or the name of one in configs/models.
        random_weights: normal weights, made on the device; there are no others.
        cases: which, between commas: single, fixed, mixed, uniform, poisson, prefix.
        sequences: that run at a time, and requests of the case fixed.
        prompt_len: of single and fixed.
        new_tokens: of single and fixed.
        requests: of uniform; poisson has half of them.
        shortest: of a prompt, and of an answer, in uniform and poisson.
        longest: of a prompt, and of an answer, in uniform and poisson.
        shared: tokens that the prompts of prefix begin with.
        sharing: requests of prefix.
        load: of poisson, a share of the rate at which uniform was done.
        cache_tokens: room of the cache, over all ranks.
        page_size: of the cache.
        prefill_budget: most prompt tokens of a step.
        mixed_budget: most of them while most sequences decode.
        layers: blocks of the model, fewer than it has.
        seed: of weights and prompts.
        output: file that takes the lines of JSON.
        quantize: format of the experts' weights.
        quantize_attention: int8 or fp8, of attention's projections and the output matrix.
        dtype: bfloat16, float16 or float32; left out, bfloat16 on a GPU and float32 on a CPU.
        device: cpu or cuda; left out, cuda where there is one.
    """
    wanted = cases.split(",")
    if not random_weights:
        raise ValueError("give --random_weights: there are no others")
    if unknown := set(wanted) - set(CASES):
        raise ValueError(f"cases ({', '.join(sorted(unknown))}) must be some of {', '.join(CASES)}")
    if shortest > longest:
        raise ValueError(f"shortest ({shortest}) must be at most longest ({longest})")
    context = RankContext.start(device)
    kind = parse_dtype(dtype or ("bfloat16" if context.device.type == "cuda" else "float32"))
    config = ModelConfig.from_file(shipped("models", model))
    config = config if layers is None else replace(config, n_layers=layers)
    most = max(prompt_len + new_tokens, 2 * longest, shared + 64)
    formats = {"quantize": quantize, "quantize_attention": quantize_attention}
    options = EngineConfig.of(parallel=parallel, **formats)
    layout = choose_layout(config.with_limits(most, sequences), context, options)
    built = Transformer(layout, context, kind)
    built.initialize(seed)
    built.allocate_cache(page_size, max(1, cache_tokens // (built.ranks_with_own_sequences * page_size)))
    engine = Engine(built, RandomWords(config.vocab_size), prefill_budget=prefill_budget, mixed_budget=mixed_budget)
    about = {**describe_run(context), "model": model.stem, "layers": config.n_layers, "weights": "random",
             "dtype": str(kind).removeprefix("torch."), "sequences": sequences, "cache_tokens": cache_tokens,
             "page_size": page_size, "prefill_budget": prefill_budget, "mixed_budget": mixed_budget,
             **formats}  # fmt: skip
    bench = Bench(engine, config.vocab_size, about, output, seed)
    bench.warm_up(sequences, min(prompt_len, 64))
    if "single" in wanted:
        bench.single(prompt_len, new_tokens)
    if "fixed" in wanted:
        bench.fixed(sequences, prompt_len, new_tokens)
    if "mixed" in wanted:
        chunk = min(mixed_budget, most - 8)
        for size in (*(size for size in (256, 512) if size < chunk), chunk):
            bench.mixed(max(1, sequences - 8), size)
    if "uniform" in wanted or "poisson" in wanted:
        rate = bench.uniform(requests, shortest, longest, sequences)
        if "poisson" in wanted:
            bench.poisson(max(1, requests // 2), shortest, longest, load * rate)
    if "prefix" in wanted:
        bench.prefix(sharing, shared)
    bench.say({"measurement": "goals", **bench.goals})
    context.stop()


@dataclass
class Bench:
    """The measurements, one after the other on one engine. Ranks but the first follow."""

    engine: Engine
    vocab_size: int
    about: dict[str, object]
    output: Path | None
    seed: int
    drawn: int = 0
    goals: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.output is not None and self.engine.context.is_first:
            self.output.write_text("", encoding="utf-8")

    def requests(self, prompts: list[tuple[int, ...]], lengths: list[int]) -> list[Request]:
        pairs = enumerate(zip(prompts, lengths, strict=True))
        return [Request(i, prompt, length, GREEDY) for i, (prompt, length) in pairs]

    def prompts(self, lengths: list[int]) -> list[tuple[int, ...]]:
        """Random ones that never came before."""
        self.drawn += 1
        return random_prompts(lengths, self.vocab_size, 1000 * self.seed + self.drawn)

    def run(
        self, requests: list[Request], starts: list[float] | None = None, at_once: int | None = None
    ) -> Record | None:
        if self.engine.context.is_first:
            return run(self.engine, requests, starts, at_once)
        is_list = starts is None and at_once is None
        for _ in self.engine.run(requests) if is_list else self.engine.serve(None):
            pass
        return None

    def say(self, fields: dict[str, object]) -> None:
        if not self.engine.context.is_first:
            return
        line = json.dumps({**_rounded(fields), **self.about})
        print(json.dumps(_rounded(fields)), file=sys.stderr, flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:
            print(line, flush=True)

    def goal(self, name: str, value: float, bound: float, at_least: bool) -> None:
        met = value >= bound if at_least else value <= bound
        self.goals[name] = {"value": round(value, 4), "at_least" if at_least else "at_most": bound, "met": met}

    def warm_up(self, sequences: int, prompt_len: int) -> None:
        """Captures the graphs of all sizes and compiles what prompts need: answers of all lengths end one by one."""
        self.engine.warm_up()
        lengths = [2 + (i * 60) // sequences for i in range(sequences)]
        self.run(self.requests(self.prompts([prompt_len] * sequences), lengths))
        longest = self.engine.model.params.max_seq_len - 2
        self.run(self.requests(self.prompts([longest, longest // 2, longest // 2]), [2, 2, 2]))
        self.engine.forget_prefixes()
        gc.collect()
        gc.freeze()  # as a server does when it is ready

    def single(self, prompt_len: int, new_tokens: int) -> None:
        """One sequence, alone."""
        record = self.run(self.requests(self.prompts([prompt_len]), [new_tokens]))
        if record is not None:
            per_s = 1 / mean(record.gaps_s)
            self.say({"measurement": "single", "tokens_per_s": per_s, **serve_fields(record)})
            self.goal("single sequence, tokens/s", per_s, 157.5, True)

    def fixed(self, count: int, prompt_len: int, new_tokens: int) -> None:
        """As many requests as run at a time, all at once."""
        record = self.run(self.requests(self.prompts([prompt_len] * count), [new_tokens] * count))
        if record is not None:
            # the last half of the steps has all sequences and no prompt
            host_ms = 1e3 * median(record.host_s[len(record.host_s) // 2 : -2])
            self.say({"measurement": "fixed", "host_ms_per_step": host_ms, **throughput_fields(record),
                      "serve": serve_fields(record)})  # fmt: skip
            self.goal("fixed, output tokens/s", record.output_per_s, 5300, True)
            self.goal("host ms a step", host_ms, 1.0, False)

    def mixed(self, count: int, chunk: int) -> None:
        """A step of decodes and a chunk of a prompt, against the two one after the other."""
        prompts = self.prompts([32] * count + [chunk] * 8)
        together = self.run(self.requests(prompts, [64] * count + [1] * 8), at_once=count)
        chunks = [self.run(self.requests(self.prompts([chunk]), [1])) for _ in range(4)]
        if together is None:
            return
        full = [step for step in together.steps if step[1] == count]
        both = [s for kind, _, tokens, s in full if kind == "mixed" and tokens == chunk]
        decode = [s for kind, _, tokens, s in full if not tokens]
        alone = [record.first_s[0] for record in chunks[1:]]
        if both and decode:
            parts = median(decode) + median(alone)
            self.say({"measurement": "mixed", "decodes": count, "chunk": chunk, "decode_ms": 1e3 * median(decode),
                      "chunk_ms": 1e3 * median(alone), "both_ms": 1e3 * median(both)})  # fmt: skip
            self.goal("mixed step, of its two parts", median(both) / parts, 1.1, False)

    def uniform(self, count: int, shortest: int, longest: int, sequences: int) -> float:
        """Lengths drawn evenly, all at once, against fixed batches of the mean length; requests/s of the first."""
        middle = (shortest + longest) // 2
        equal = self.run(self.requests(self.prompts([middle] * sequences), [middle] * sequences))
        record = self.run(self._drawn(count, shortest, longest))
        if record is None:
            return self.engine.context.broadcast_object(None)
        share = record.output_per_s / equal.output_per_s
        self.say({"measurement": "equal", **throughput_fields(equal), "serve": serve_fields(equal)})
        self.say({"measurement": "uniform", "share_of_equal": share, **throughput_fields(record),
                  "serve": serve_fields(record), "preemptions": self.engine.snapshot().preemptions})  # fmt: skip
        self.goal("uniform lengths, share of equal ones", share, 0.85, True)
        return self.engine.context.broadcast_object(count / record.duration_s)

    def poisson(self, count: int, shortest: int, longest: int, per_s: float) -> None:
        """Requests that come at random, against the same number of sequences without arrivals."""
        record = self.run(self._drawn(count, shortest, longest), poisson_starts(count, per_s, self.seed))
        busy = (
            0 if record is None else round(mean(record.running[len(record.running) // 4 : -len(record.running) // 4]))
        )
        busy = max(1, self.engine.context.broadcast_object(busy))
        context_len = (shortest + longest) * 3 // 4  # the mean prompt, and half of the mean answer
        alone = self.run(self.requests(self.prompts([context_len] * busy), [40] * busy))
        if record is None:
            return
        gaps, quiet = record.gaps_s, [gap for times in alone.tokens_s.values() for gap in _gaps(times[8:])]
        ratio, tail = median(gaps) / median(quiet), float(np.percentile(gaps, 99)) / median(gaps)
        first_s = float(np.percentile(record.first_s, 99))
        self.say({"measurement": "poisson", **serve_fields(record, per_s), "mean_running": busy,
                  "quiet_median_itl_ms": 1e3 * median(quiet)})  # fmt: skip
        self.goal("arrivals, median time between tokens, of that without", ratio, 1.15, False)
        self.goal("arrivals, p99 time between tokens, of the median", tail, 2.5, False)
        self.goal("arrivals, p99 time to first token, s", first_s, 2.0, False)

    def prefix(self, count: int, shared: int) -> None:
        """Requests whose prompts begin alike, with reuse and without: until all have their first token."""
        times = {}
        for reuse in (False, True):
            common = self.prompts([shared])[0]
            prompts = [common + own for own in self.prompts([50] * count)]
            self.engine.prefix_reuse = reuse
            record = self.run(self.requests(prompts, [4] * count))
            if record is not None:
                times[reuse] = max(record.first_s)
                self.say({"measurement": "prefix", "reuse": reuse, "last_ttft_s": times[reuse], **serve_fields(record)})
        if times:
            share = times[True] / times[False]
            self.goal("shared beginning, time to first token, of that without reuse", share, 0.15, False)

    def _drawn(self, count: int, shortest: int, longest: int) -> list[Request]:
        rng = random.Random(self.seed)
        sizes = [(rng.randint(shortest, longest), rng.randint(shortest, longest)) for _ in range(count)]
        return self.requests(self.prompts([prompt for prompt, _ in sizes]), [answer for _, answer in sizes])


def _gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    run_tool(bench_throughput)
