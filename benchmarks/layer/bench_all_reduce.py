"""Sums of rows over the ranks with residual and norm, as tensor parallel needs twice a layer: ours, torch's, NCCL's.

    torchrun --standalone --nproc_per_node=4 -m benchmarks.layer.bench_all_reduce --tokens 1,8,16,64,256,16384

Each measurement is a CUDA graph of a chain of calls: a product makes this rank's part of the rows out of the last
call's normalised rows, and the part is summed over the ranks, added to the residual and normalised. The time of a
chain without sums is taken off, so ``us`` is what a call adds. ``bus_gb_s`` is the bytes that an all-reduce must send,
2·(W-1)/W of the rows, over that time. Prints one JSON line a measurement, of the slowest rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.common.machine import describe_run
from mixtralkit.cli.run import run_tool
from mixtralkit.config import parse_dtype
from mixtralkit.distributed import RankContext
from mixtralkit.ops.all_reduce import RowReducer, add_norm_reference
from mixtralkit.ops.all_reduce.triton import candidates, sum_rows

EPS = 1e-5
REPLAYS = 4  # of a graph between two events
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the norm of the difference
Reduce = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """Ranks, rows [T, D] and the norm's weight. ``reducer`` has room for the rows, or goes through NCCL."""

    context: RankContext
    reducer: RowReducer
    rows: int
    dim: int
    dtype: torch.dtype
    weight_D: torch.Tensor
    symmetric: dict[int, torch.Tensor] = field(default_factory=dict)

    def random(self, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.context.device).manual_seed(seed)
        like = {"dtype": self.dtype, "device": self.context.device, "generator": generator}
        return torch.randn(self.rows, self.dim, **like)


def bench_all_reduce(
    tokens: str = "1,8,16,64,256",
    variants: str = "ours,sweep,torch_one_shot,torch_two_shot,nccl",
    dim: int = 4096,
    dtype: str = "bfloat16",
    calls: int = 64,
    repeats: int = 10,
    output: Path | None = None,
) -> None:
    """Times sums over the ranks, fused with residual and norm or followed by them.

    Args:
        tokens: numbers of rows, between commas.
        variants: names between commas: ours, as chosen for the rows; sweep, every setting of ours; torch_one_shot and
            torch_two_shot, torch's kernels over symmetric memory; nccl. All but ours end in one kernel for both.
        dim: width of a row.
        dtype: of the rows.
        calls: sums of one graph; 4 from 1024 rows on.
        repeats: timed replays.
        output: JSON file for the measurements.
    """
    context = RankContext.start("cuda")
    if context.world_size == 1:
        raise ValueError("sums over the ranks need two ranks at least: start this with torchrun")
    torch.set_grad_enabled(False)
    torch_dtype, found = parse_dtype(dtype), []
    counts = [int(count) for count in tokens.split(",")]
    reducer = RowReducer.create(context, max(counts), dim, torch_dtype)
    weight_D = torch.rand(dim, dtype=torch_dtype, device=context.device) + 0.5
    dist.broadcast(weight_D, 0, group=context.group)
    for rows in counts:
        case = Case(context, reducer, rows, dim, torch_dtype, weight_D)
        for name, settings, reduce in _variants(case, variants.split(",")):
            entry = {"variant": name, "tokens": rows, **settings}
            try:
                entry |= _measure(case, reduce, calls if rows < 1024 else 4, repeats, "torch" not in name)
            except RuntimeError as error:  # the other variants still count
                entry["failed"] = str(error).splitlines()[0]
            found.append(entry)
            if context.is_first:
                print(json.dumps(entry), flush=True)
    if context.is_first and output is not None:
        summary = {**describe_run(context), "dim": dim, "dtype": dtype, "repeats": repeats, "results": found}
        output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    context.stop()


def _variants(case: Case, names: list[str]) -> list[tuple[str, dict[str, int], Reduce]]:
    memory = case.reducer.memory
    fits = memory is not None and case.rows <= case.reducer.max_rows
    norm, group = (case.weight_D, EPS), case.context.group
    found: list[tuple[str, dict[str, int], Reduce]] = []
    for name in names:
        if name == "ours" and fits:
            found.append((name, {}, lambda part, residual: case.reducer.add_norm(part, residual, *norm)))
        elif name == "sweep" and fits:
            for settings in candidates(case.rows, case.dim, case.context.world_size):
                found.append(
                    (name, settings, lambda part, residual, s=settings: sum_rows(part, residual, norm, memory, s))
                )
        elif name == "nccl":
            found.append((name, {}, lambda part, residual: sum_rows(case.context.all_reduce(part), residual, norm)))
        elif name == "torch_one_shot":

            def one_shot(part: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return sum_rows(torch.ops.symm_mem.one_shot_all_reduce(part, "sum", group.group_name), residual, norm)

            found.append((name, {}, one_shot))
        elif name == "torch_two_shot":

            def two_shot(part: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return sum_rows(torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", group.group_name), residual, norm)

            found.append((name, {}, two_shot))
    return found


def _measure(case: Case, reduce: Reduce, calls: int, repeats: int, anywhere: bool) -> dict:
    """Checks a variant against float32 sums, then times its chains; ``anywhere`` is where its part may lie."""
    part_TD = _symmetric(case)
    error, alike = _check(case, reduce, part_TD)
    if not error < TOLERANCE[case.dtype]:
        raise RuntimeError(f"differs from float32 by {error:.2g} of the norm")
    share = 0.5 + 0.1 * case.context.rank  # what every rank adds differs
    normed_TD = case.random(7)

    def chain() -> None:
        x, normed = normed_TD, normed_TD
        for _ in range(calls):
            x, normed = reduce(torch.mul(normed, share, out=part_TD), x)

    def bare() -> None:
        for _ in range(calls):
            torch.mul(normed_TD, share, out=part_TD)

    def direct() -> None:
        x, normed = reduce(normed_TD.clone(), normed_TD)
        for _ in range(calls - 1):
            x, normed = reduce(normed, x)

    times, floor = (_replays(case, function, repeats) for function in (chain, bare))
    us = _slowest(case, median(times) - median(floor), calls)
    spread = [round(1e3 * (value - median(floor)) / calls, 2) for value in (min(times), max(times))]
    sent = 2 * (case.context.world_size - 1) / case.context.world_size * part_TD.nbytes
    found = {"us": us, "spread_us": spread, "bus_gb_s": round(sent / us / 1e3, 1)}
    if anywhere:
        found["us_direct"] = _slowest(case, median(_replays(case, direct, repeats)), calls)
    return found | {"error": error, "same_bits": alike}


def _slowest(case: Case, chain_ms: float, calls: int) -> float:
    return round(max(case.context.all_gather_objects(1e3 * chain_ms / calls)), 2)


def _symmetric(case: Case) -> torch.Tensor:
    """This rank's part, in memory that torch's own kernels over symmetric memory take too."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    if case.rows not in case.symmetric:
        part_TD = symmetric_memory.empty(case.rows, case.dim, dtype=case.dtype, device=case.context.device)
        symmetric_memory.rendezvous(part_TD, case.context.group)
        case.symmetric[case.rows] = part_TD
    return case.symmetric[case.rows]


def _check(case: Case, reduce: Reduce, part_TD: torch.Tensor) -> tuple[float, bool]:
    """The larger relative error of both results over the ranks, and whether all ranks have the same bits."""
    residual_TD = case.random(3)
    part_TD.copy_(case.random(100 + case.context.rank))
    total_TD = sum(part.float() for part in case.context.all_gather(part_TD))
    wanted = add_norm_reference(RankContext(), total_TD, residual_TD.float(), case.weight_D.float(), EPS)
    found = reduce(part_TD, residual_TD)
    errors = [float((got.float() - want).norm() / want.norm()) for got, want in zip(found, wanted, strict=True)]
    alike = all(bool((every == got).all()) for got in found for every in case.context.all_gather(got))
    return max(case.context.all_gather_objects(max(errors))), all(case.context.all_gather_objects(alike))


def _replays(case: Case, function: Callable[[], None], repeats: int) -> list[float]:
    """Milliseconds of the function's graph, replayed ``REPLAYS`` times for each figure."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    times, token = [], torch.zeros(1, device=case.context.device)
    for number in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        case.context.barrier()
        case.context.all_reduce(token)  # the barrier lets hosts go some 100 us apart, this lets devices go together
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(end) / REPLAYS)
    return times


if __name__ == "__main__":
    run_tool(bench_all_reduce)
