"""The choice of replicas is as even as it can be: linear programming says what can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from mixtralkit.distributed import RankContext
from mixtralkit.moe.assignment import Assigner
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.planning.replicas import spread_rows
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
    rows_EW = spread_rows(counts_E, fixed_W, holds_WE)
    assert (rows_EW >= 0).all()
    assert (rows_EW[~holds_WE.T] == 0).all()
    assert (rows_EW.sum(1) == counts_E).all()
    assert (fixed_W + rows_EW.sum(0)).max() == _least_maximum(counts_E, fixed_W, holds_WE)


def _assign(context: RankContext, everywhere: bool):
    plan = random_plan(11, 8, context.world_size)
    assigner = Assigner(plan.slot_of_LWE[0], context, everywhere)
    generator = torch.Generator().manual_seed(0 if everywhere else context.rank)
    experts_TK = torch.rand(50, 8, generator=generator).topk(2).indices
    experts_TK[3, 1] = -1
    nothing = torch.zeros((), dtype=torch.int64)
    to = assigner.assign(CutRouting(experts_TK, torch.ones(50, 2), nothing, nothing))
    return experts_TK, to.ranks_TK, to.slots_TK, plan


@pytest.mark.parametrize("everywhere", [True, False])
def test_choices_go_where_the_expert_is_and_the_ranks_are_even(everywhere):
    results = run_ranks(_assign, 4, everywhere)
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
            assert everywhere or to == rank or rank not in np.flatnonzero(plan.holds_LWE[0][:, expert])
            counts_SE[rank, expert] += 1
            load_W[to] += 1
    if everywhere:
        assert all(torch.equal(r[1], results[0][1]) for r in results)
        counts_SE, load_W = counts_SE[:1], load_W // 4
        fixed_W = np.zeros(4, int)
        free_E = counts_SE.sum(0)
    else:
        fixed_W = (counts_SE * plan.holds_LWE[0]).sum(1)
        free_E = (counts_SE * ~plan.holds_LWE[0]).sum(0)
    assert load_W.max() == _least_maximum(free_E, fixed_W, plan.holds_LWE[0])
