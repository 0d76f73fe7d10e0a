"""What rank 0's host does in a step besides waiting for the device, on any machine: nothing is computed here.

    python -m benchmarks.serving.bench_host

An engine with a small model plans, tells, fills and launches steps of many sequences and hands out their tokens; where
a graph would be replayed, every row gets token 0. So a figure has Python and the filling of tensors, and not what CUDA
takes to launch a graph and its copies. On a machine that does other work too, the fastest tenth says most.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.machine import describe_run
from benchmarks.model.source import RandomWords
from benchmarks.serving.load import Coming, random_prompts
from mixtralkit.cli.run import command, run_tool
from mixtralkit.config import EngineConfig, ModelConfig, shipped
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.graphs import Run
from mixtralkit.engine.requests import Request
from mixtralkit.engine.runner import Runner, _Answers
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.shapes import MOST_IN_GRAPH
from mixtralkit.mixtral import choose_layout
from mixtralkit.model.transformer import Transformer

LAYERS = 1  # the host plans no layer
CHUNK = 768  # prompt tokens beside decodes, the default of mixed_budget


@dataclass(frozen=True)
class Case:
    """Requests of one kind: ``served``, as a server's engine hands them to the thread that makes text, or as a list,
    whose text is made within the turn; ``draws`` at a temperature; some ``arrive`` while the others decode."""

    name: str
    served: bool = True
    draws: bool = False
    arrive: bool = False


CASES = (Case("served"), Case("served, drawn", draws=True), Case("served, prompts arrive", arrive=True),
         Case("list", served=False), Case("list, drawn", served=False, draws=True))  # fmt: skip


@command
def bench_host(
    sequences: Count = 256,
    steps: Count = 200,
    prompt_len: Count = 512,
    vocab_size: Count = 32_000,
    page_size: Count = 128,
    profile: bool = False,
    output: Path | None = None,
) -> None:
    """Times the host's part of steps.

    Args:
        sequences: that decode at a time.
        steps: of each case.
        prompt_len: most tokens of a prompt; the shortest has half of them.
        vocab_size: of the model.
        page_size: of the cache.
        profile: also list on stderr which functions take the time, which makes all slower.
        output: file that takes the lines of JSON.
    """
    torch.set_num_threads(1)
    context = RankContext.start("cpu")
    config = replace(ModelConfig.from_file(shipped("models", Path("tiny"))), vocab_size=vocab_size, n_layers=LAYERS)
    most, late = prompt_len + steps + 1, max(1, steps // 10)
    config = config.with_limits(max(most, CHUNK + 1), sequences + 1)
    model = Transformer(choose_layout(config, context, EngineConfig.of()), context)
    model.allocate_cache(page_size, (sequences + 1) * -(-most // page_size) + 4 * CHUNK // page_size)
    engine = ReplayedEngine(model, RandomWords(vocab_size), prefill_budget=MOST_IN_GRAPH, mixed_budget=CHUNK)
    lines = []
    for number, case in enumerate(CASES):
        sampling = SamplingOptions(temperature=0.6 if case.draws else 0.0)
        lengths = np.linspace(prompt_len // 2, prompt_len, sequences).astype(int).tolist()
        prompts = random_prompts([*lengths, *[CHUNK] * (late if case.arrive else 0)], vocab_size, number)
        requests = [Request(i, p, steps if i < sequences else 1, sampling) for i, p in enumerate(prompts)]
        profiler = cProfile.Profile() if profile else None
        found = engine.measured(requests, sequences, case.served, profiler)
        lines.append({"measurement": case.name, **found, "sequences": sequences, "page_size": page_size})
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
        if profiler is not None:
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(18)
    text = "".join(json.dumps({**line, **describe_run(context)}) + "\n" for line in lines)
    sys.stdout.write(text) if output is None else output.write_text(text, encoding="utf-8")
    context.stop()


class Replayed:
    """In the place of ``Graphs``: every run is a replay, and leaves what memory has."""

    is_on = True

    def __init__(self, runner: Runner) -> None:
        self._answers = _Answers([], runner._own.packed.unsqueeze(0), None)

    def run(
        self, key: Hashable, function: Callable[[], object], rehearse: Callable[[], object], may_capture: bool = True
    ) -> Run[_Answers]:
        return Run(self._answers, True)


class ReplayedEngine(Engine):
    """Its steps compute nothing; ``turns`` are kind, rows and seconds of each."""

    def _prepare(self) -> None:
        super()._prepare()
        if not isinstance(self._runner._graphs, Replayed):
            self._runner._graphs, self._runner._pads_prompts = Replayed(self._runner), True

    def _advance(self) -> None:
        newest = self._flights[-1] if self._flights else None
        started = time.perf_counter()
        super()._advance()
        took_s = time.perf_counter() - started
        if self._flights and self._flights[-1] is not newest:
            flight, planned = self._flights[-1]
            self.turns.append((flight.kind, len(planned.sampled[0]), took_s))

    def measured(
        self, requests: list[Request], sequences: int, served: bool, profiler: cProfile.Profile | None
    ) -> dict[str, float | int]:
        """Milliseconds of the turns in which all sequences decode; where requests come beside them, of those with their
        prompts: the tenth below which the fastest lie, the median, the worst."""
        self.turns: list[tuple[str, int, float]] = []
        self.forget_prefixes()
        events = self.tokens(Coming(requests, sequences)) if served else self.run(requests)
        if profiler is not None:
            profiler.enable()
        for _ in events:
            pass
        if profiler is not None:
            profiler.disable()
        wanted = "mixed" if len(requests) > sequences else "graph"
        ms = [1e3 * s for kind, rows, s in self.turns[4:] if kind == wanted and rows >= sequences]
        tenth, middle = np.quantile(ms, [0.1, 0.5]).round(4).tolist()
        return {"turns": len(ms), "tenth_ms": tenth, "median_ms": middle, "worst_ms": round(max(ms), 4)}


if __name__ == "__main__":
    run_tool(bench_host)
