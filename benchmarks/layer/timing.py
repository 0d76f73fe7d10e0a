"""How long a layer over the ranks takes: whole, by phases, and as a timeline; eager or as replays of CUDA graphs.

All ranks start every figure together: the hosts meet at a barrier, then the devices at a small all-reduce.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from benchmarks.layer.baselines import Phase, Unavailable, Variant
from benchmarks.layer.cases import INPUT_SETS
from lab.timing import GRAPH_MS
from mixtralkit.distributed import RankContext

AHEAD_CYCLES = 400_000  # some 200 us: the device idles so long while the host queues what is timed
MOST_TURNS = 8

Marks = list[tuple[str, float, float]]  # name, start and end of each phase, ms


def whole_ms(context: RankContext, variant: Variant, repeats: int, graph: bool) -> list[float]:
    """Milliseconds of a call, the mean over a round of calls on different inputs; a figure a repeat. Collective."""

    def run(turns: int = 1) -> None:
        for _ in range(turns):
            for number in range(INPUT_SETS):
                variant.call(number)

    run()  # compiles
    turns, timed = 1, run
    if graph:
        round_ms = max(context.all_gather_objects(_timed(context, run)))
        turns = min(MOST_TURNS, max(1, math.ceil(GRAPH_MS / round_ms)))  # the same on every rank
        timed = captured(context, lambda: run(turns), run)
    _timed(context, timed, graph)
    return [_timed(context, timed, graph) / (turns * INPUT_SETS) for _ in range(repeats)]


def phases_ms(context: RankContext, variant: Variant, rounds: int, graph: bool) -> dict[str, list[float]]:
    """Milliseconds of each phase by itself, the ranks meeting before each. Collective."""
    times: dict[str, list[float]] = {}
    phases_of = _phases(context, variant, graph)
    for number in list(range(INPUT_SETS)) * (rounds + 1):
        for name, function in phases_of(number):
            times.setdefault(name, []).append(_timed(context, function, graph))
    return {name: found[INPUT_SETS:] for name, found in times.items()}  # without the first round


def timeline(context: RankContext, variant: Variant, rounds: int, graph: bool) -> list[Marks]:
    """The phases of one call on every rank, one after the other without meeting in between. Collective.

    The call is the one of median length (of the slowest rank). On GPUs the ranks' clocks start at the end of one
    all-reduce, so to within some microseconds; on CPUs they are the host's, and start with the first rank.
    """
    steps: list[tuple[float, Marks]] = []
    phases_of = _phases(context, variant, graph)
    for number in list(range(INPUT_SETS)) * (rounds + 1):
        steps.append(_marked(context, phases_of(number), graph))
    # call 0 has no estimate in a flight of two phases
    kept = [step for index, step in enumerate(steps[INPUT_SETS:]) if index % INPUT_SETS]
    calls = [_on_one_clock(ranks) for ranks in zip(*context.all_gather_objects(kept), strict=True)]
    calls.sort(key=lambda ranks: max(marks[-1][2] for marks in ranks))
    return calls[len(calls) // 2]


def _on_one_clock(ranks: tuple[tuple[float, Marks], ...]) -> list[Marks]:
    """Each rank's marks from when the first one began."""
    first = min(began for began, _ in ranks)
    shifts = [began - first for began, _ in ranks]
    return [
        [(name, start + shift, end + shift) for name, start, end in marks]
        for shift, (_, marks) in zip(shifts, ranks, strict=True)
    ]


def slowest(context: RankContext, times_ms: list[float]) -> tuple[float, list[float]]:
    """Of the rank with the largest median: the median, and the tenth and ninetieth percentile."""
    ranks = context.all_gather_objects((median(times_ms), *np.percentile(times_ms, [10, 90])))
    worst = max(ranks)
    return round(worst[0], 4), [round(float(value), 4) for value in worst[1:]]


def captured(
    context: RankContext, function: Callable[[], object], rehearse: Callable[[], object]
) -> Callable[[], object]:
    """The replay of a CUDA graph of ``function``; ``rehearse`` runs before, on a stream of its own. Collective.

    Raises:
        Unavailable, on every rank: a rank could not capture it.
    """
    device = context.device
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        rehearse()
    current.wait_stream(stream)
    torch.cuda.synchronize(device)
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    try:
        gc.disable()  # freeing an older graph would spoil the capture
        # Other threads, such as NCCL's watchdog, go on with calls that a capture does not allow.
        with context.agreed(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
    except RuntimeError as error:
        raise Unavailable(f"cannot be captured in a CUDA graph: {error}") from error
    finally:
        if collects:
            gc.enable()
    return graph.replay


def _phases(context: RankContext, variant: Variant, graph: bool) -> Callable[[int], list[Phase]]:
    """The phases of a call by its number, each a graph of its own if ``graph``."""
    if not graph:
        return variant.phases
    found = []
    for number in range(INPUT_SETS):
        phases = variant.phases(number)
        for _, function in phases:
            function()
        # What a phase leaves for the next lies where its own graph writes it, so each is captured after the last.
        found.append([(name, captured(context, function, _nothing)) for name, function in phases])
    return found.__getitem__


def _nothing() -> None:
    """The whole call was rehearsed: a dispatch without its combine would spoil the next one."""


def _timed(context: RankContext, function: Callable[[], object], ahead: bool = False) -> float:
    """Milliseconds of one run that all ranks start together, on this rank's device.

    ``ahead``: of a graph, whose launch by the host must not count.
    """
    return _marked(context, [("", function)], ahead)[1][0][2]


def _marked(context: RankContext, phases: list[Phase], ahead: bool) -> tuple[float, Marks]:
    """Runs the phases in turn, once all ranks are there: this rank's start (ms) and, from it, each phase's times.

    The start is the host's clock on a CPU and 0 on a GPU, where all start at once.
    """
    context.barrier()
    if context.device.type != "cuda":
        moments = [time.perf_counter()]
        for _, function in phases:
            function()
            moments.append(time.perf_counter())
        return 1e3 * moments[0], _bars(phases, [1e3 * (moment - moments[0]) for moment in moments])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
    token = torch.zeros(1, device=context.device)
    torch.cuda.synchronize(context.device)
    if ahead:
        torch.cuda._sleep(AHEAD_CYCLES)
    context.all_reduce(token)  # the barrier lets hosts go some 100 us apart, this lets devices go together
    events[0].record()
    for event, (_, function) in zip(events[1:], phases, strict=True):
        function()
        event.record()
    torch.cuda.synchronize(context.device)
    return 0.0, _bars(phases, [events[0].elapsed_time(event) for event in events])


def _bars(phases: list[Phase], moments: list[float]) -> Marks:
    return [(name, *bounds) for (name, _), bounds in zip(phases, itertools.pairwise(moments), strict=True)]
