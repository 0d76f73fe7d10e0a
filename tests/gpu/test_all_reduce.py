"""Sums over the ranks of a host, in and out of graphs, with ranks that come late. Run with ``pytest -m gpu``."""

from __future__ import annotations

import random

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.ops.all_reduce import EMPTY_WORDS, RowReducer
from tests.gpu.ranks import SHARED, run_on_gpus

pytestmark = pytest.mark.gpu
MOST_ROWS, EPS = 64, 1e-5
ROUNDS, REPLAYS = (2, 30) if SHARED else (10, 100)


def _exact(context: RankContext, part_TD: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
    """The parts in float32 in rank order, then the residual, rounded once: what the kernel promises to the bit."""
    total, *others = context.all_gather(part_TD).float()
    for other in others:
        total = total + other
    return (total + residual_TD.float()).type_as(residual_TD)


def _normed(x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    wide = x_TD.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight_D.float()


def _late(context: RankContext, dim: int, dtype: torch.dtype) -> None:
    """Calls of changing size back to back, each rank late at random; nothing but the calls synchronises the ranks."""
    from mixtralkit.ops.all_reduce.triton import sum_rows

    device, alike, own = context.device, random.Random(1), random.Random(context.rank)
    reducer = RowReducer.create(context, MOST_ROWS, dim, dtype)
    assert reducer.memory is not None
    weight_D = torch.linspace(0.5, 1.5, dim, device=device).to(dtype)
    for _ in range(ROUNDS):
        calls, found = [], []
        for number in range(60):
            rows, two_trips = alike.choice([1, 2, 7, MOST_ROWS]), alike.randint(0, 1)
            part_TD = torch.randn(rows, dim, device=device).to(dtype)
            part_TD[:, number % 8 :: 8] = -0.0
            residual_TD = torch.linspace(-1, 1, rows * dim, device=device).to(dtype).view(rows, dim)
            calls.append((part_TD, residual_TD, two_trips))
        torch.cuda.synchronize()
        for part_TD, residual_TD, two_trips in calls:
            if own.random() < 0.3:
                torch.cuda._sleep(own.randrange(200_000))
            settings = {"two_trips": two_trips, "num_warps": 8}
            found.append(sum_rows(part_TD, residual_TD, (weight_D, EPS), reducer.memory, settings))
        for (part_TD, residual_TD, _), (x_TD, normed_TD) in zip(calls, found, strict=True):
            assert torch.equal(x_TD, _exact(context, part_TD, residual_TD))
            torch.testing.assert_close(normed_TD.float(), _normed(x_TD, weight_D), rtol=2e-2, atol=2e-2)
    assert (reducer.memory.rows.own == EMPTY_WORDS[dtype.itemsize][1]).all()


@pytest.mark.parametrize(("dim", "dtype"), [(4096, torch.bfloat16), (6144, torch.float16), (40, torch.float32)])
def test_ranks_that_come_late_still_get_every_sum(dim, dtype):
    run_on_gpus(_late, dim, dtype)


def _graphs(context: RankContext) -> None:
    dim, device = 4096, context.device
    reducer = RowReducer.create(context, MOST_ROWS, dim, torch.bfloat16)
    weight_D = torch.linspace(0.5, 1.5, dim, device=device).bfloat16()
    graphs = []
    for rows, calls in [(1, 3), (64, 1), (5, 2)]:  # odd numbers of calls: turns go on where the last graph left them
        parts = [torch.empty(rows, dim, device=device, dtype=torch.bfloat16) for _ in range(calls)]
        residual_TD = torch.empty_like(parts[0])
        reducer.add_norm(parts[0], residual_TD, weight_D, EPS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = [reducer.add_norm(part_TD, residual_TD, weight_D, EPS)[0] for part_TD in parts]
        graphs.append((graph, parts, residual_TD, results))
    alike, own = random.Random(2), random.Random(context.rank)
    for _ in range(REPLAYS):
        graph, parts, residual_TD, results = alike.choice(graphs)
        for part_TD in parts:
            part_TD.normal_()
        residual_TD.fill_(alike.random())
        torch.cuda._sleep(own.randrange(100_000))
        graph.replay()
        for part_TD, x_TD in zip(parts, results, strict=True):
            assert torch.equal(x_TD, _exact(context, part_TD, residual_TD))
    many_TD = torch.randn(MOST_ROWS + 1, dim, device=device)
    torch.testing.assert_close(reducer.sum(many_TD.clone()), context.all_gather(many_TD).sum(0))


def test_graphs_may_be_replayed_in_any_order():
    run_on_gpus(_graphs)
