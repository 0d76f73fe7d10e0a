"""``mixtralkit measure``: what the time model must know of a machine, as configs/hardware/NAME.json."""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lab.figures import Sizes, measure_fused
from mixtralkit.cli.run import command
from mixtralkit.config import parse_dtype
from mixtralkit.config.engine import Dtype
from mixtralkit.config.options import Count, Positive
from mixtralkit.distributed import RankContext
from mixtralkit.ops.runtime import has_triton
from mixtralkit.planning.hardware import Hardware, Link, Network
from mixtralkit.whole_file import check_free

ROWS = (1, 4, 16, 64, 256, 1024, 4096)


@command
def measure(
    name: str,
    output: Path | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    dim: Count | None = None,
    hidden: Count | None = None,
    message_mb: Positive | None = None,
    ranks_per_node: int | None = None,
    fused: bool | None = None,
    overwrite: bool = False,
) -> None:
    """Measures on all ranks at once, slowest rank and median of five, and writes a hardware file NAME.json.

    torchrun --standalone --nproc_per_node=4 tools/measure_hardware.py my-machine

    Args:
        name: what to call the machine.
        output: file to write; configs/hardware/NAME.json when not given.
        device: cpu or cuda; CUDA where there is one.
        dtype: of the products; bfloat16 on CUDA, float32 on a CPU.
        dim: width of the rows of the products; 4096 on CUDA, 1024 on a CPU.
        hidden: width of their results; 14336 on CUDA, 3584 on a CPU.
        message_mb: largest message, in 10^6 bytes; 256 on CUDA, 16 on a CPU.
        ranks_per_node: ranks of one machine, when there are several; measures across them too.
        fused: measure this project's kernels too; left out, where they run and all ranks are on one machine.
        overwrite: replace the file where it is there already.
    """
    path = output or Path("configs/hardware") / f"{name}.json"
    check_free(path, overwrite)
    context = RankContext.start(device)
    try:
        on_gpu = context.device.type == "cuda"
        if context.world_size < 2:
            raise ValueError("world size (1) must be at least 2, to measure links: start it with torchrun")
        per_node = context.world_size if ranks_per_node is None else ranks_per_node
        if not 2 <= per_node <= context.world_size or context.world_size % per_node:
            raise ValueError(
                f"ranks_per_node ({per_node}) must divide the {context.world_size} ranks, and be 2 or more"
            )
        kind = parse_dtype(dtype or ("bfloat16" if on_gpu else "float32"))
        shape = (hidden or (14336 if on_gpu else 3584), dim or (4096 if on_gpu else 1024))
        size = int((message_mb or (256 if on_gpu else 16)) * 1e6)
        if fused is None:
            fused = has_triton(context.device) and per_node == context.world_size
        figures = _figures(name, context, kind, shape, size, per_node)
        if fused:
            figures = _with_fused(figures, context, kind, shape, on_gpu)
        if context.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            figures.save(path)
            print(f"{path}: written")
    finally:
        context.stop()


def _figures(
    name: str, context: RankContext, dtype: torch.dtype, shape: tuple[int, int], size: int, per_node: int
) -> Hardware:
    clock = Clock(context)
    reading, copying = memory_bandwidths(clock)
    rates = tuple(matrix_rates(clock, dtype, shape))
    by_one_row = rates[0][1] / 2 * dtype.itemsize  # a processor may add up slower than it reads
    launch_s, sync_s = launch_and_sync(clock)
    if per_node == context.world_size:
        inside, across = network(clock, context, "inside", size), None
    else:
        between, within = context.split_nodes(per_node)
        inside, across = network(clock, within, "inside", size), network(clock, between, "across", size)
    return Hardware(
        name=name,
        date=datetime.date.today().isoformat(),
        machine=_machine(context, dtype),
        source=f"tools/measure_hardware.py: all ranks at once, products with weights of {shape[0]} x {shape[1]}, "
        f"messages up to {size / 1e6:g} MB; copying moves {copying / 1e9:.4g} GB/s, read and written",
        data_bytes=dtype.itemsize,
        memory_bandwidth=max(reading, by_one_row),
        matrix_rates=rates,
        launch_s=launch_s,
        sync_s=sync_s,
        overlaps=context.device.type == "cuda",
        inside=inside,
        across=across,
        gpu=torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else None,
    )


def _with_fused(
    figures: Hardware, context: RankContext, dtype: torch.dtype, shape: tuple[int, int], on_gpu: bool
) -> Hardware:
    """The figures with those of this project's kernels."""
    sizes = Sizes(dim=shape[1], hidden=shape[0], dtype=dtype)
    if not on_gpu:  # a CPU is slow, and runs the references
        few = (1, 16, 64)
        sizes = replace(sizes, rows=few, expert_rows=few, symmetric_rows=few, sequences=4, length=64)
    return replace(figures, fused=measure_fused(context, figures.memory_bandwidth, sizes, Clock(context).say))


class Clock:
    """Seconds of a piece of work that all ranks do at the same time: the slowest rank's, the median of five."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def __call__(self, work: Callable[[], object], at_least_s: float = 0.05) -> float:
        for _ in range(3):
            work()
        once = self._run(work, 1)
        times = max(1, min(500, int(at_least_s / max(once, 1e-7))))
        return statistics.median(self._run(work, times) for _ in range(5))

    def say(self, what: str, value: float, unit: str) -> None:
        """Prints one figure, on the first rank."""
        if self.context.is_first:
            print(f"{what:<42} {value:>12.4g} {unit}", flush=True)

    def _run(self, work: Callable[[], object], times: int) -> float:
        self._wait()
        self.context.barrier()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self._wait()
        seconds = (time.perf_counter() - start) / times
        return max(self.context.all_gather_objects(seconds))

    def _wait(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)


def memory_bandwidths(clock: Clock) -> tuple[float, float]:
    """Bytes/s of reading a buffer that no cache holds, and of copying it (read and written)."""
    device = clock.context.device
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    reading = size / clock(source.sum)
    copying = 2 * size / clock(lambda: target.copy_(source))
    clock.say("memory, read", reading / 1e9, "GB/s")
    clock.say("memory, copy (read + written)", copying / 1e9, "GB/s")
    return reading, copying


def matrix_rates(clock: Clock, dtype: torch.dtype, shape: tuple[int, int]) -> list[tuple[int, float]]:
    """FLOP/s of products of 1 … 4096 rows with weights that take turns, so that no cache holds the next ones."""
    device = clock.context.device
    beyond_caches = 2**29 if device.type == "cuda" else 2**27
    count = max(2, beyond_caches // (shape[0] * shape[1] * dtype.itemsize))
    weights = [torch.randn(shape, dtype=dtype, device=device) * 0.02 for _ in range(count)]
    rates, turn = [], 0
    for rows in ROWS:
        x = torch.randn(rows, shape[1], dtype=dtype, device=device)

        def product(x: torch.Tensor = x) -> None:
            nonlocal turn
            turn = (turn + 1) % count
            torch.nn.functional.linear(x, weights[turn])

        rates.append((rows, 2.0 * rows * shape[0] * shape[1] / clock(product)))
        clock.say(f"product of {rows} rows", rates[-1][1] / 1e12, "TFLOP/s")
    return rates


def launch_and_sync(clock: Clock) -> tuple[float, float]:
    """Seconds of a small kernel among many, and of waiting for a number."""
    one = torch.zeros(1, device=clock.context.device)
    launch_s = clock(lambda: one.add_(1))
    sync_s = max(clock(lambda: one.add_(1).item()) - launch_s, 0.0)
    clock.say("small kernel", launch_s * 1e6, "us")
    clock.say("waiting for a number", sync_s * 1e6, "us")
    return launch_s, sync_s


def network(clock: Clock, members: RankContext, name: str, size: int) -> Network:
    """Latency and bandwidth of the collectives among ``members``, messages up to ``size`` bytes."""
    world, device, group = members.world_size, members.device, members.group
    room = torch.zeros(2, size // (4 * world) * world, device=device)
    root = dist.get_global_rank(group, 0)

    def link(kind: str, collective: Callable[[int], object], share: float) -> Link:
        small, large = world, room.shape[1]
        latency = clock(lambda: collective(small))
        wire = share * 4 * large / max(clock(lambda: collective(large)) - latency, 1e-9)
        clock.say(f"{name}, {kind} among {world}: latency", latency * 1e6, "us")
        clock.say(f"{name}, {kind}: out of each rank", wire / 1e9, "GB/s")
        return Link(latency, wire)

    return Network(
        members=world,
        exchange=link(
            "exchange", lambda n: dist.all_to_all_single(room[0, :n], room[1, :n], group=group), (world - 1) / world
        ),
        all_reduce=link("all-reduce", lambda n: dist.all_reduce(room[0, :n], group=group), 2 * (world - 1) / world),
        broadcast=link("broadcast", lambda n: dist.broadcast(room[0, :n], src=root, group=group), 1.0),
    )


def _machine(context: RankContext, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    common = f"{context.world_size} ranks, torch {torch.__version__}, {kind}"
    if context.device.type == "cuda":
        return f"{torch.cuda.get_device_name(context.device)}, CUDA {torch.version.cuda}, NCCL, {common}"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads a rank, gloo, {common}"
