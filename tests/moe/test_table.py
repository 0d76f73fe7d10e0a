"""Which replica computes a row: the table on the device says what planning says, and pouring is as even as can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from mixtralkit.distributed import RankContext
from mixtralkit.moe.table import LayerTable
from mixtralkit.planning.plan import contiguous, everywhere
from mixtralkit.planning.replicas import ReplicaTable, pour_batches
from tests.moe.layers import random_plan
from tests.ranks import run_ranks


def _least_maximum(counts_E: np.ndarray, fixed_W: np.ndarray, holds_WE: np.ndarray) -> int:
    """The least possible load of the busiest rank in whole rows (the flow's matrix is totally unimodular)."""
    world, experts = holds_WE.shape
    pairs = np.argwhere(holds_WE)
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1
    load = np.zeros((world, len(pairs) + 1))
    load[pairs[:, 0], np.arange(len(pairs))] = 1
    load[:, -1] = -1
    sums = np.zeros((experts, len(pairs) + 1))
    sums[pairs[:, 1], np.arange(len(pairs))] = 1
    solved = linprog(cost, A_ub=load, b_ub=-fixed_W, A_eq=sums, b_eq=counts_E)
    return int(np.ceil(solved.fun - 1e-6))


@pytest.mark.parametrize("seed", range(60))
def test_busiest_rank_is_as_light_as_can_be(seed):
    rng = np.random.default_rng(seed)
    world, experts = int(rng.integers(1, 9)), int(rng.integers(1, 20))
    holds_WE = rng.random((world, experts)) < rng.choice([0.2, 0.4, 0.8])
    for expert in range(experts):
        holds_WE[rng.integers(world), expert] = True
    counts_E = rng.integers(0, 1 + int(rng.choice([1, 5, 400])), experts) * (rng.random(experts) < 0.8)
    fixed_W = rng.integers(0, 50, world) * int(rng.integers(0, 2))
    rows_EW = pour_batches(counts_E[None], fixed_W[None], holds_WE.T)[0]
    assert (rows_EW >= 0).all()
    assert (rows_EW[~holds_WE.T] == 0).all()
    assert (rows_EW.sum(1) == counts_E).all()
    assert (fixed_W + rows_EW.sum(0)).max() == _least_maximum(counts_E, fixed_W, holds_WE)


def _choices(rank: int, rows: int = 150) -> torch.Tensor:
    experts_TK = torch.rand(rows, 8, generator=torch.Generator().manual_seed(rank)).topk(2).indices
    experts_TK[3, 1] = -1
    return experts_TK


@pytest.mark.parametrize("rows_everywhere", [False, True])
@pytest.mark.parametrize("per_node", [None, 2])
def test_look_ups_are_the_replicas_choices(per_node, rows_everywhere):
    """Of own rows each rank finds one place for each choice; of rows that all have, one rank finds itself."""
    for seed in range(6):
        plan = random_plan(seed, 8, 4, ranks_per_node=per_node)
        replicas = ReplicaTable.of(plan, 0, rows_everywhere)
        for small in (False, True):
            served = 0
            for rank in range(4):
                experts_TK = _choices(0 if rows_everywhere else rank)
                context = RankContext(rank, 4)
                table, turning = LayerTable(replicas, context), LayerTable(replicas, context, turns_always=True)
                ranks_TK, slots_TK = table.look_up(experts_TK, small)
                row_TK = np.arange(len(experts_TK))[:, None].repeat(2, 1)
                wanted_TK = replicas.ranks(experts_TK.numpy(), np.full_like(row_TK, rank), row_TK, small)
                assert ranks_TK.tolist() == wanted_TK.tolist()
                lost_TK = experts_TK.numpy() < 0
                assert np.where(lost_TK, -1, plan.slot_of_LWE[0][wanted_TK, experts_TK.numpy()]).tolist() == (
                    slots_TK.tolist()
                )
                assert all(map(torch.equal, turning.look_up(experts_TK, small), (ranks_TK, slots_TK)))
                own_TK = table.own_slots(experts_TK, small).masked_fill(experts_TK < 0, -1)
                assert torch.equal(own_TK, slots_TK.masked_fill(ranks_TK != rank, -1))
                served += (own_TK >= 0).int()
                assert table.local_E.tolist() == replicas.local_WE[rank].tolist()
            if rows_everywhere:
                assert torch.equal(served, (experts_TK >= 0).int())


def test_a_table_is_written_over_where_it_lies():
    plans, context, experts_TK = [contiguous(1, 8, 2), everywhere(1, 8, 2)], RankContext(1, 2), _choices(0)
    plain, copied = (ReplicaTable.of(plan, 0) for plan in plans)
    table = LayerTable(plain, context)
    addresses = [t.data_ptr() for t in (table.local_E, table.places_2EC)]
    assert not table.update(plain)
    for replicas in (copied, plain):
        table.update(replicas)
        fresh = LayerTable(replicas, context)
        assert [t.data_ptr() for t in (table.local_E, table.places_2EC)] == addresses
        assert torch.equal(table.local_E, fresh.local_E)
        for small in (False, True):
            assert torch.equal(table.own_slots(experts_TK, small), fresh.own_slots(experts_TK, small))
    one = LayerTable(ReplicaTable(np.arange(8)[None]), RankContext())
    assert one.is_identity
    assert one.update(ReplicaTable(np.arange(8)[None, ::-1].copy())), "a graph that took experts for slots is void"


def _pour(context: RankContext):
    plan = random_plan(11, 8, context.world_size)
    experts_TK = _choices(context.rank, 50)
    table = LayerTable(ReplicaTable.of(plan, 0), context)
    return experts_TK, *table.pour(experts_TK), plan


def test_poured_choices_go_where_the_expert_is_and_the_ranks_are_even():
    results = run_ranks(_pour, 4)
    plan = results[0][3]
    counts_SE, load_W = np.zeros((4, 8), int), np.zeros(4, int)
    for rank, (experts_TK, ranks_TK, slots_TK, _) in enumerate(results):
        for expert, to, slot in zip(
            experts_TK.flatten().tolist(), ranks_TK.flatten().tolist(), slots_TK.flatten().tolist(), strict=True
        ):
            if expert < 0:
                assert (to, slot) == (-1, -1)
                continue
            assert plan.experts_of(0, to)[slot] == expert
            assert to == rank or rank not in np.flatnonzero(plan.holds_LWE[0][:, expert])
            counts_SE[rank, expert] += 1
            load_W[to] += 1
    fixed_W = (counts_SE * plan.holds_LWE[0]).sum(1)
    free_E = (counts_SE * ~plan.holds_LWE[0]).sum(0)
    assert load_W.max() == _least_maximum(free_E, fixed_W, plan.holds_LWE[0])
