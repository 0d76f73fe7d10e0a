"""Rows between the ranks of a host, in and out of graphs, with ranks that come late. Run with ``pytest -m gpu``."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.ops.norm import rms_norm_reference
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.ops.symmetric_exchange.types import EMPTY
from mixtralkit.planning.replicas import ReplicaTable
from tests.gpu.ranks import RANKS, SHARED, run_on_gpus

pytestmark = pytest.mark.gpu
MOST_ROWS, EXPERTS, TOP_K, EPS = 64, 8, 2, 1e-5
ROUNDS, REPLAYS = (2, 30) if SHARED else (10, 100)


class Layer:
    """Stands for a layer: expert e multiplies rows of small whole numbers by e + 1, so that every sum is exact."""

    def __init__(self, exchange: SymmetricExchange, seed: int) -> None:
        rng = np.random.default_rng(seed)
        holds = rng.random((RANKS, EXPERTS)) < 0.3
        holds[:, 0] = seed % 2 == 0
        holds[rng.integers(RANKS, size=EXPERTS), np.arange(EXPERTS)] = True
        rank, device = exchange.context.rank, exchange.context.device
        places_EC = ReplicaTable(np.where(holds, holds.cumsum(1) - 1, -1)).places_EC(rank, small=False)
        self.exchange, self.places_EC = exchange, torch.from_numpy(places_EC).to(device)
        self.factor_S = torch.tensor([0, *(np.flatnonzero(holds[rank]) + 1)], device=device, dtype=torch.float32)
        self.norm = (torch.linspace(0.5, 1.5, exchange.dim, device=device).to(exchange.dtype), EPS)

    def __call__(self, inputs, rows: int, valid_T=None, stays: bool = False) -> tuple[torch.Tensor, ...]:
        x_TD, experts_TK, weights_TK = inputs
        arrived = self.exchange.dispatch(x_TD, experts_TK, weights_TK, self.places_EC, rows, valid_T, stays)
        factor_R1 = (self.factor_S[arrived.slots_RK + 1] * arrived.weights_RK).sum(1, keepdim=True)
        y_RD = torch.mul(arrived.x_RD, factor_R1.to(x_TD.dtype), out=self.exchange.sum_buffer(rows))
        if stays:
            return self.exchange.combine_at_owner(y_RD, arrived, self.norm)
        return self.exchange.combine(y_RD, arrived.members_T, x_TD, self.norm)

    def check(self, inputs, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        x_TD, experts_TK, weights_TK = inputs
        factor_T1 = ((experts_TK + 1) * weights_TK).sum(1, keepdim=True)
        assert torch.equal(found[0], (x_TD.float() * (1 + factor_T1)).type_as(x_TD))
        torch.testing.assert_close(found[1], rms_norm_reference(found[0], *self.norm), rtol=2e-2, atol=2e-2)


def _draw(exchange: SymmetricExchange, own: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = exchange.context.device
    x_TD = torch.randint(-3, 4, (own, exchange.dim), device=device).to(exchange.dtype)
    experts_TK = torch.rand(own, EXPERTS, device=device).topk(TOP_K).indices
    experts_TK[torch.rand(own, TOP_K, device=device) < 0.1] = -1
    return x_TD, experts_TK, (experts_TK >= 0).float()


def _late(context: RankContext, dim: int, dtype: torch.dtype) -> None:
    """Calls of changing size and plan back to back, each rank late at random; only the calls synchronise the ranks."""
    alike, own = random.Random(1), random.Random(context.rank)
    exchange = SymmetricExchange.create(context, MOST_ROWS, dim, TOP_K, dtype)
    assert exchange.memory is not None
    layers = [Layer(exchange, seed) for seed in range(4)]
    for _ in range(ROUNDS):
        calls = []
        for _ in range(60):
            rows = alike.choice([1, 2, 7, MOST_ROWS])
            calls.append((alike.choice(layers), _draw(exchange, own.choice([rows, rows, 0, rows // 2])), rows))
        torch.cuda.synchronize()
        found = []
        for layer, inputs, rows in calls:
            if own.random() < 0.3:
                torch.cuda._sleep(own.randrange(200_000))
            found.append(layer(inputs, rows))
        for (layer, inputs, _), result in zip(calls, found, strict=True):
            layer.check(inputs, result)
    context.barrier()
    assert (exchange.memory.words.own[:-RANKS] == EMPTY).all()


@pytest.mark.parametrize(("dim", "dtype"), [(4096, torch.bfloat16), (6144, torch.float16), (40, torch.float32)])
def test_ranks_that_come_late_still_get_every_row_and_sum(dim, dtype):
    run_on_gpus(_late, dim, dtype)


def _graphs(context: RankContext) -> None:
    exchange = SymmetricExchange.create(context, MOST_ROWS, 4096, TOP_K, torch.bfloat16)
    layer, graphs = Layer(exchange, 0), []
    for rows, calls in [(1, 3), (64, 1), (5, 2)]:  # odd numbers of calls: turns go on where the last graph left them
        inputs = [_draw(exchange, rows) for _ in range(calls)]
        layer(inputs[0], rows)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = [layer(one, rows) for one in inputs]
        graphs.append((graph, inputs, results))
    alike, own = random.Random(2), random.Random(context.rank)
    for _ in range(REPLAYS):
        graph, inputs, results = alike.choice(graphs)
        for one in inputs:
            for old, new in zip(one, _draw(exchange, len(one[0])), strict=True):
                old.copy_(new)
        torch.cuda._sleep(own.randrange(100_000))
        graph.replay()
        for one, result in zip(inputs, results, strict=True):
            layer.check(one, result)


def test_graphs_may_be_replayed_in_any_order():
    run_on_gpus(_graphs)


def _stays(context: RankContext) -> None:
    """Layers back to back, each rank late at random: every row is on one rank, with the bits of one rank's own sums."""
    own, rows = random.Random(context.rank), 16
    exchange = SymmetricExchange.create(context, rows, 4096, TOP_K, torch.float32)
    layers = [Layer(exchange, seed) for seed in range(4)]
    for step in range(ROUNDS):
        torch.manual_seed(step)  # the same on every rank
        x_TD, _, _ = whole = _draw(exchange, rows)
        valid_T = torch.where(torch.arange(rows, device=x_TD.device) % RANKS == context.rank, 0, -1)
        found_TD, wanted_TD = x_TD, x_TD
        for layer in layers:
            whole = _draw(exchange, rows)
            torch.cuda._sleep(own.randrange(200_000))
            found_TD, _, valid_T = layer((found_TD, *whole[1:]), rows, valid_T, stays=True)
            wanted_TD = wanted_TD * (1 + ((whole[1] + 1) * whole[2]).sum(1, keepdim=True))
        owners_WT = context.all_gather(valid_T == 0)  # also keeps a new step's rows from the last one's
        assert (owners_WT.sum(0) == 1).all()
        mine_T = valid_T == 0
        torch.testing.assert_close(found_TD[mine_T], wanted_TD[mine_T])


def test_rows_stay_where_they_are_computed():
    run_on_gpus(_stays)
