"""How long calls take on a device: CUDA graph replays between events, or a clock on a CPU."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch

GRAPH_MS = 2.0  # how long a replay takes at least: its launch, some µs, must not count

Calls = Sequence[Callable[[], object]]


def times_ms(calls: Calls, device: torch.device, repeats: int = 15, graph: bool = True) -> list[float]:
    """Milliseconds of one call: the mean over a round of all of them, a figure a repeat.

    Args:
        calls: the same work on different inputs, which take turns so that the caches do not hold what comes next.
        graph: capture a CUDA graph and replay it, so that launches by the host do not count. Results of the calls
            must not be needed afterwards.
    """
    if device.type != "cuda":
        return [_clocked_ms(calls) for _ in range(repeats)]
    _run(calls, 1)  # compiles
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    _run(calls, 1)
    end.record()
    end.synchronize()
    turns = min(16, max(1, math.ceil(GRAPH_MS / start.elapsed_time(end))))
    replay = captured(calls, turns, device) if graph else lambda: _run(calls, turns)
    for _ in range(2):
        replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:  # the device always has the next replay before it ends this one
        replay()
        mark.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / (turns * len(calls)) for start, end in itertools.pairwise(marks)]


def captured(calls: Calls, turns: int, device: torch.device) -> Callable[[], None]:
    """A CUDA graph of ``turns`` rounds of the calls, which run once before on a stream of their own; its replay."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        _run(calls, 1)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(calls, turns)
    return graph.replay


def _run(calls: Calls, turns: int) -> None:
    for _ in range(turns):
        for call in calls:
            call()


def _clocked_ms(calls: Calls) -> float:
    start = time.perf_counter()
    _run(calls, 1)
    return 1e3 * (time.perf_counter() - start) / len(calls)
