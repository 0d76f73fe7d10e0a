"""The layer with ``SymmetricExchange``: the oracle's sums, and the very rows and slots of ``StaticDispatch``."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.dispatch import StaticDispatch
from mixtralkit.moe.peer import PeerDispatch
from mixtralkit.moe.reference import moe_reference
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning import replicas
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import Whole, build, random_plan
from tests.ranks import run_ranks

UNIFORM = Whole()
HALF_SKEW = Whole(seed=1, skew={3: 2.0})
ALL_SKEW = Whole(seed=2, skew={3: 60.0})  # every row chooses expert 3
SIXTY = Whole(num_experts=60, top_k=6, seed=5)
ROWS = [9, 7, 0, 1]  # different on each rank, one of them empty


def _run(context: RankContext, cases: list[tuple[Whole, ExpertPlan]]) -> None:
    most = max(ROWS)
    for whole, plan in cases:
        peers = SymmetricExchange.create(context, most, whole.dim, whole.top_k, torch.float32)
        layer = build(whole, plan, context)
        x_TD = whole.rows(ROWS[context.rank], context.rank)
        with torch.no_grad():
            static_TD, _ = layer(x_TD, rows_per_rank=most)
            layer.use_peers(peers)
            assert isinstance(layer.arrange(x_TD, layer.gate(x_TD), most)[0], PeerDispatch)
            y_TD, report = layer(x_TD, rows_per_rank=most)
            _compare_rows(context, layer, x_TD, most)
            assert isinstance(layer.arrange(x_TD, layer.gate(x_TD), most + 1)[0], StaticDispatch)
        assert isinstance(layer.arrange(x_TD, layer.gate(x_TD), most)[0], StaticDispatch)
        torch.testing.assert_close(y_TD, moe_reference(x_TD, *whole.weights(), whole.top_k), rtol=1e-4, atol=1e-4)
        if plan.cold_capacity_factor is None:
            torch.testing.assert_close(y_TD, static_TD)
            assert int(report.dropped) == 0


def _compare_rows(context: RankContext, layer, x_TD: torch.Tensor, most: int) -> None:
    """Row by row what both ways bring here, replicas taking turns; theirs come rank by rank, ours row by row."""
    with patch.object(replicas, "SMALL_BATCH_CHOICES", 0):
        way, home, cut = layer.arrange(x_TD, layer.gate(x_TD), most)
    found, members_T = way.dispatch(home.x_TD, cut, home.assigner)
    wanted, _ = StaticDispatch(context, most).dispatch(home.x_TD, cut, home.assigner)

    def by_row(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(0, (context.world_size, most)).transpose(0, 1).flatten(0, 1)

    slots_RK = by_row(wanted.slots_RK)
    assert torch.equal(found.slots_RK, slots_RK)
    here_RK = slots_RK >= 0
    assert torch.equal(found.weights_RK[here_RK], by_row(wanted.weights_RK)[here_RK])
    assert torch.equal(found.x_RD[here_RK.any(1)], by_row(wanted.x_RD)[here_RK.any(1)])
    ranks_TK = home.assigner.assign(cut, even=False).ranks_TK
    assert members_T.tolist() == [sum(1 << rank for rank in {*row} - {-1}) for row in ranks_TK.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_layer_equals_the_oracle_and_the_static_way(world_size):
    cases = [(whole, contiguous(1, 8, world_size)) for whole in (UNIFORM, HALF_SKEW, ALL_SKEW)]
    cases += [(whole, random_plan(whole.seed, 8, world_size)) for whole in (UNIFORM, HALF_SKEW, ALL_SKEW)]
    cases += [(UNIFORM, everywhere(1, 8, world_size)), (SIXTY, random_plan(5, 60, world_size))]
    run_ranks(_run, world_size, cases)


def _capacity(context: RankContext, plan: ExpertPlan, rows: int) -> None:
    layer = build(HALF_SKEW, plan, context)
    x_TD = HALF_SKEW.rows(rows, context.rank)
    with torch.no_grad():
        static_TD, static = layer(x_TD, rows_per_rank=rows)
        layer.use_peers(SymmetricExchange.create(context, rows, HALF_SKEW.dim, HALF_SKEW.top_k, torch.float32))
        y_TD, report = layer(x_TD, rows_per_rank=rows)
    assert int(report.dropped) == int(static.dropped) > 0
    torch.testing.assert_close(y_TD, static_TD)


def test_dropped_choices_go_nowhere():
    run_ranks(_capacity, 2, contiguous_with_capacity(), 40)


def contiguous_with_capacity() -> ExpertPlan:
    plan = contiguous(1, 8, 2)
    return ExpertPlan(plan.slots_LWS, 8, cold_capacity_factor=0.5)
