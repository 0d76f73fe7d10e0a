"""Copies of experts read from the owner's memory while other work goes on. Run with ``pytest -m gpu``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixtralkit.config import FasterOptions, ModelConfig, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.layer import StepRows
from mixtralkit.moe.reference import moe_reference
from mixtralkit.moe.store import ExpertStore
from mixtralkit.moe.two_phase import Move, TwoPhase
from mixtralkit.ops.hidden import Hidden
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.popularity import PathPopularity
from mixtralkit.planning.trace import RoutingTrace
from tests.gpu.ranks import RANKS, run_on_gpus
from tests.moe.layers import Whole, random_plan, stack

pytestmark = pytest.mark.gpu
LAYERS, EXPERTS, DIM, HIDDEN = 3, 8, 512, 1024
PLANS = {"even": lambda: contiguous(LAYERS, EXPERTS, RANKS), "uneven": lambda: _random(3)}


def _random(seed: int) -> ExpertPlan:
    plan = random_plan(seed, EXPERTS, RANKS)
    return replace(plan, slots_LWS=np.concatenate([np.roll(plan.slots_LWS, shift, 1) for shift in range(LAYERS)]))


def _value(layer: int, expert: int, version: int) -> float:
    return float(100 * version + 10 * layer + expert)


def _fill(store: ExpertStore, version: int = 0) -> None:
    for layer in store.layers:
        for slot, expert in enumerate(store.layout.experts(layer)):
            for weights in (store.experts[layer].w13, store.experts[layer].w2):
                weights[slot].fill_(_value(layer, expert, version))


def _assert_copied(store: ExpertStore, version: int = 0) -> None:
    for (layer, expert), copy in store.copies.items():
        owner, _ = store.owner(layer, expert)
        for storage in store.experts[layer].storage[:2]:
            if store.context.rank != owner:
                assert (storage[copy.place] == _value(layer, expert, version)).all(), (layer, expert)


@torch.no_grad()
def _copies(context: RankContext, name: str) -> None:
    """In stream order and beside it, from weights that have just changed, in places that are taken over."""
    config = ModelConfig(dim=DIM, n_layers=LAYERS, head_dim=64, hidden_dim=HIDDEN, n_heads=8, n_kv_heads=8,
                         vocab_size=64, num_experts=EXPERTS, num_experts_per_tok=2)  # fmt: skip
    layout = RankLayout(config, ParallelConfig("dp", "ep"), PLANS[name](), context.rank)
    store = ExpertStore(layout, context, torch.bfloat16, room=4)
    assert store._memories is not None
    stream = torch.cuda.Stream(context.device)
    for version in range(12):
        _fill(store, version)
        store.drop(list(store.copies))
        wanted = [(version % LAYERS, expert) for expert in range(version % 4, version % 4 + 4)]
        if version % 2:
            store._memories[0].meet()
            move = Move(context.group, stream)
            for key in wanted:
                store.fetch(*key, move.carry)
            assert move
            move.finish()
        else:
            for key in wanted:
                store.fetch(*key)
        _assert_copied(store, version)
        store._memories[0].meet()  # before weights change again
    context.barrier()


@pytest.mark.parametrize("name", list(PLANS))
def test_copies_are_the_owners_weights(name):
    run_on_gpus(_copies, name)


def _next(x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
    x_TD = torch.nn.functional.normalize((x_TD + y_TD)[:, :-1]) * 4
    return torch.cat([x_TD, torch.ones_like(x_TD[:, :1])], dim=1)


@torch.no_grad()
def _two_phases(context: RankContext) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    wholes = [Whole(64, 128, seed=seed, skew={(3 * seed) % EXPERTS: 3.0}) for seed in range(LAYERS)]
    chosen = np.random.default_rng(0).integers(0, EXPERTS, (200, LAYERS, 2)).astype(np.int16)
    chosen[..., 1] = (chosen[..., 0] + 1) % EXPERTS
    popularity = PathPopularity.fit(RoutingTrace(chosen, EXPERTS), 1)
    eager = FasterOptions(net_bandwidth=1e13, gpu_throughput=1e9)  # any lead pays
    exchange = SymmetricExchange.create(context, 64, wholes[0].dim, wholes[0].top_k, torch.float32)
    plan = contiguous(LAYERS, EXPERTS, RANKS)
    layers, shadows = stack(wholes, plan, context, MoEOptions(eager), symmetric=exchange)
    phases, moved = TwoPhase(shadows, popularity), 0
    for step in range(4):
        x_TD = wholes[0].rows(64, context.rank + RANKS * step)
        expected, rows_TD = x_TD, x_TD.to(context.device)
        flight = phases.begin()
        for layer, whole in zip(layers, wholes, strict=True):
            hidden, report = layer(Hidden(None, rows_TD), StepRows(per_rank=64, flight=flight))
            rows_TD = _next(rows_TD, hidden.rows_TD)
            expected = _next(expected, moe_reference(expected, *whole.weights(), whole.top_k))
            moved += 0 if report.shadows.phases is None else report.shadows.phases.bytes_ahead
        torch.testing.assert_close(rows_TD.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert moved


def test_two_phases_change_nothing():
    run_on_gpus(_two_phases)
