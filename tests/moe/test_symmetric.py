"""Rows through other ranks' memory: the rows and slots that collectives bring, in pieces, with copies and drops."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from mixtralkit.config import FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch.exact import StaticDispatcher
from mixtralkit.moe.layer import MoELayer
from mixtralkit.moe.reference import moe_reference
from mixtralkit.ops.hidden import Hidden
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning import replicas
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import Whole, build, random_plan, run_layer, stack
from tests.ranks import run_ranks

UNIFORM = Whole()
HALF_SKEW = Whole(seed=1, skew={3: 2.0})
ALL_SKEW = Whole(seed=2, skew={3: 60.0})  # every row chooses expert 3
SIXTY = Whole(num_experts=60, top_k=6, seed=5)
ROWS = [9, 7, 0, 1]  # different on each rank, one of them empty
MOST = max(ROWS)


def _memory(context: RankContext, whole: Whole, rows: int) -> SymmetricExchange:
    return SymmetricExchange.create(context, rows, whole.dim, whole.top_k, torch.float32)


def _run(context: RankContext, cases: list[tuple[Whole, ExpertPlan]]) -> None:
    for whole, plan in cases:
        layer = build(whole, plan, context, symmetric=_memory(context, whole, MOST))
        x_TD = whole.rows(ROWS[context.rank], context.rank)
        _compare_rows(context, layer, x_TD)
        expected = moe_reference(x_TD, *whole.weights(), whole.top_k)
        for rows in (4, MOST):  # in pieces, and at once
            layer = build(whole, plan, context, symmetric=_memory(context, whole, rows))
            arrived = _watch(layer)
            y_TD, report = run_layer(layer, x_TD, per_rank=MOST)
            torch.testing.assert_close(y_TD, expected, rtol=1e-4, atol=1e-4)
            assert [len(routed.x_RD) for routed in arrived] == [
                min(rows, MOST - start) * context.world_size for start in range(0, MOST, rows)
            ]
            assert len(report.handles) == len(arrived)
    _valid_rows(context, *cases[0])
    _copies(context)


def _watch(layer: MoELayer) -> list:
    """What the layer's experts are given from now on."""
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    return seen


def _compare_rows(context: RankContext, layer: MoELayer, x_TD: torch.Tensor) -> None:
    """Row by row what both dispatchers bring here, replicas taking turns; collectives' rows come rank by rank."""
    with torch.no_grad(), patch.object(replicas, "SMALL_BATCH_CHOICES", 0):
        routing, hidden = layer.gate(Hidden(None, x_TD))
        cut = CutRouting.of(routing, layer.table.local_E, None, None, torch.zeros(()))
        found, (members_T, _) = layer.dispatchers.by_name["symmetric"].dispatch(hidden, cut, layer.table, MOST)
        wanted, _ = StaticDispatcher(context).dispatch(hidden, cut, layer.table, MOST)

    def by_row(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(0, (context.world_size, MOST)).transpose(0, 1).flatten(0, 1)

    slots_RK = by_row(wanted.slots_RK)
    assert torch.equal(found.slots_RK, slots_RK)
    here_RK = slots_RK >= 0
    assert torch.equal(found.weights_RK[here_RK], by_row(wanted.weights_RK)[here_RK])
    assert torch.equal(found.x_RD[here_RK.any(1)], by_row(wanted.x_RD)[here_RK.any(1)])
    ranks_TK, _ = layer.table.look_up(cut.experts_TK, small=False)
    assert members_T.tolist() == [sum(1 << rank for rank in {*row} - {-1}) for row in ranks_TK.tolist()]


def _valid_rows(context: RankContext, whole: Whole, plan: ExpertPlan) -> None:
    """A row without a sequence goes nowhere, neither this way nor by collectives."""
    x_TD = whole.rows(MOST, context.rank)
    valid_T = torch.tensor([3, -1, 0, 1, -1, -1, 2, 5, -1])
    for decode in (False, True):
        more = {} if decode else {"symmetric": _memory(context, whole, 5)}
        layer = build(whole, plan, context, **more)
        arrived = _watch(layer)
        y_TD, _ = run_layer(layer, x_TD, per_rank=MOST, decode=decode, valid_T=valid_T)
        expected = moe_reference(x_TD, *whole.weights(), whole.top_k).masked_fill((valid_T < 0)[:, None], 0.0)
        torch.testing.assert_close(y_TD, expected, rtol=1e-4, atol=1e-4)
        choices = sum(int((routed.slots_RK >= 0).sum()) for routed in arrived)
        wanted = whole.top_k * int((valid_T >= 0).sum()) * context.world_size
        assert sum(context.all_gather_objects(choices)) == wanted


def _copies(context: RankContext) -> None:
    """Copies of hot experts are found by both tables, of small batches and of large ones."""
    options = MoEOptions(FasterOptions(shadow=True))
    (layer,), shadows = stack([ALL_SKEW], contiguous(1, 8, context.world_size), context, options, 3,
                              symmetric=_memory(context, ALL_SKEW, 300))  # fmt: skip
    assert shadows.hint(0, [3, 5]) == (3, 5)
    for rows in (MOST, 300):
        x_TD = ALL_SKEW.rows(rows - context.rank, context.rank)
        arrived = _watch(layer)
        y_TD, report = run_layer(layer, x_TD, per_rank=rows)
        expected = moe_reference(x_TD, *ALL_SKEW.weights(), ALL_SKEW.top_k)
        torch.testing.assert_close(y_TD, expected, rtol=1e-4, atol=1e-4)
        assert report.shadows.experts == (3, 5)
    rows = int((arrived[-1].slots_RK >= 0).any(1).sum())
    assert rows >= len(x_TD), "in a large batch a row's choice of a copy stays"


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_and_sums_are_those_of_the_oracle_and_of_collectives(world_size):
    cases = [(whole, contiguous(1, 8, world_size)) for whole in (UNIFORM, HALF_SKEW, ALL_SKEW)]
    cases += [(whole, random_plan(whole.seed, 8, world_size)) for whole in (UNIFORM, HALF_SKEW, ALL_SKEW)]
    cases += [(UNIFORM, everywhere(1, 8, world_size)), (SIXTY, random_plan(5, 60, world_size))]
    run_ranks(_run, world_size, cases)


def _capacity(context: RankContext, rows: int) -> None:
    for overflow in ("drop", "reroute"):
        plan = replace(contiguous(1, 8, 2), cold_capacity_factor=0.5, overflow=overflow)
        x_TD = HALF_SKEW.rows(rows, context.rank)
        static_TD, static = run_layer(build(HALF_SKEW, plan, context), x_TD, per_rank=rows, decode=True)
        layer = build(HALF_SKEW, plan, context, symmetric=_memory(context, HALF_SKEW, rows))
        y_TD, report = run_layer(layer, x_TD, per_rank=rows, decode=True)
        assert int(report.dropped) == int(static.dropped)
        assert int(report.rerouted) == int(static.rerouted)
        assert int(report.dropped) + int(report.rerouted) > 0
        torch.testing.assert_close(y_TD, static_TD)


def test_cut_choices_go_nowhere():
    run_ranks(_capacity, 2, 40)
