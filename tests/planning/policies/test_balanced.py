"""Balanced plans against a slow, plain form of EPLB's public algorithm, poured as the layer pours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.plans import eplb
from mixtralkit.planning.policies.balanced import balanced, rebalance_experts
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.joined import join
from mixtralkit.planning.policies.poured import pour
from mixtralkit.planning.policies.quality import measure
from mixtralkit.planning.replicas import pour_batches


def peak_as_run(on_gpus: list[list[int]], loads: np.ndarray) -> float:
    """Load of the busiest GPU when rows go to replicas as the running layer spreads them."""
    holds_WE = np.zeros((len(on_gpus), len(loads)), bool)
    for gpu, experts in enumerate(on_gpus):
        holds_WE[gpu, experts] = True
    rows_E = np.rint(loads * 1e6).astype(int)
    return pour_batches(rows_E[None], np.zeros((1, len(on_gpus)), int), holds_WE.T)[0].sum(0).max() / 1e6


def random_case(case: int) -> tuple[np.ndarray, int, int, int, int]:
    """Loads of 4 layers, replicas, groups, nodes, GPUs."""
    random = np.random.default_rng(case)
    experts, gpus = int(random.choice([8, 16, 32, 64])), int(random.choice([2, 4, 8]))
    nodes = int(random.choice([1, 2])) if gpus > 2 else 1
    groups = int(random.choice([1, nodes, 4, experts]))
    fewest = -(-experts // gpus)
    most = experts // (nodes if groups % nodes == 0 else 1)
    slots = int(random.integers(fewest, min(most, fewest + 4) + 1))
    return random.dirichlet(np.full(experts, random.choice([15, 4, 0.5])), 4), slots * gpus, groups, nodes, gpus


@pytest.mark.parametrize("case", range(200))
def test_poured_never_heavier_than_eplb_and_never_twice_on_a_rank(case):
    """Poured only: with equal parts, which no dispatcher here takes, the plan can be heavier than EPLB's.

    benchmarks/plans/bench_planning.py does the same for as many random matrices as asked for.
    """
    loads_LE, replicas, groups, nodes, gpus = random_case(case)
    ours = rebalance_experts(loads_LE, replicas, groups, nodes, gpus)[0].reshape(len(loads_LE), gpus, -1).tolist()
    for loads_E, of_layer in zip(loads_LE, ours, strict=True):
        assert all(len(set(experts)) == len(experts) for experts in of_layer)
        assert {expert for experts in of_layer for expert in experts} == set(range(len(loads_E)))
        public = eplb.rebalance(loads_E, replicas, groups, nodes, gpus)
        assert peak_as_run(of_layer, loads_E) <= peak_as_run(public, loads_E) * (1 + 1e-5)


def test_the_plan_that_equal_shares_missed():
    """Loads on which plans made even in equal shares, poured, were heavier than EPLB's."""
    loads = np.array([8071, 17578, 17262, 382, 687, 4221, 16755, 35047], float)
    public = [[7, 6], [7, 6], [7, 5], [7, 4], [0, 3], [1, 2], [1, 2], [1, 2]]
    ours = rebalance_experts(loads[None], 16, 4, 2, 8)[0].reshape(8, 2).tolist()
    assert peak_as_run(ours, loads) <= peak_as_run(public, loads) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_pouring_of_many_layers_is_the_least_peak(seed):
    """Against the layer's own pouring of whole rows."""
    random = np.random.default_rng(seed)
    loads_BE = random.dirichlet(np.full(16, 1.0), 5)
    slots_BWS = np.stack([np.sort(random.permutation(np.r_[np.arange(16), random.permutation(16)[:8]]).reshape(6, 4))
                          for _ in range(5)])  # fmt: skip
    for plan_WS in slots_BWS:  # an expert twice on a rank counts once
        for rank_S in plan_WS:
            rank_S[1:][rank_S[1:] == rank_S[:-1]] = -1
    peaks_B = pour(slots_BWS, loads_BE).sum(2).max(1)
    for slots_WS, loads_E, peak in zip(slots_BWS, loads_BE, peaks_B, strict=True):
        assert peak == pytest.approx(peak_as_run([rank[rank >= 0] for rank in slots_WS], loads_E), rel=2e-4)


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(256, 32, 9), (16, 8, 3), (8, 4, 3), (64, 16, 5)])
def test_a_slot_to_spare_on_each_rank_makes_all_ranks_even(experts, ranks, slots):
    loads_LE = np.random.default_rng(0).dirichlet(np.full(experts, 4), 4)
    lacks_LW = np.zeros((4, ranks), bool)
    found_LWS, part_LWS = join(loads_LE, np.ones_like(loads_LE, int), lacks_LW, slots, 0.0)
    for slots_WS, part_WS, loads_E in zip(found_LWS, part_LWS, loads_LE, strict=True):
        held = slots_WS >= 0
        np.testing.assert_allclose(np.bincount(slots_WS[held], part_WS[held], experts), loads_E)
        np.testing.assert_allclose(part_WS.sum(1), loads_E.sum() / ranks)
        assert (part_WS >= 0).all()


def test_joined_ranks_are_nearer_to_even_than_eplb_where_slots_are_few():
    """32 slots to spare on 144 ranks: EPLB leaves 3% on the busiest rank, twice what joining leaves."""
    loads_LE = np.random.default_rng(0).dirichlet(np.full(256, 4), 4)
    ours = rebalance_experts(loads_LE, 288, 1, 1, 144)[0].reshape(4, 144, 2).tolist()
    over = [
        [peak_as_run(plan, loads_E) * 144 - 1 for plan in (of_layer, eplb.rebalance(loads_E, 288, 1, 1, 144))]
        for of_layer, loads_E in zip(ours, loads_LE, strict=True)
    ]
    assert np.mean(over, 0)[0] < 0.6 * np.mean(over, 0)[1]


@pytest.mark.parametrize("ranks_per_node", [None, 4])
def test_more_ranks_than_experts_and_slots_left_out_evenly(ranks_per_node):
    """Nodes of which one lacked all its slots left no plan."""
    loads_LE = np.random.default_rng(0).dirichlet(np.full(4, 4), 3)
    plan = balanced(loads_LE, 8, Budget(slots_per_rank=1), ranks_per_node, 4, extra=0)
    assert (plan.copies_LWE.sum(1) == 1).all()
    assert (plan.holds_LWE.sum((1, 2)) == 4).all()


def test_without_a_budget_there_are_no_replicas():
    """8 experts on 3 ranks had one, and could not be written as ExFlow's CSV."""
    plan = balanced(np.random.default_rng(0).random((4, 8)), 3)
    assert (plan.copies_LWE.sum(1) == 1).all()
    assert sorted(plan.holds_LWE[0].sum(1)) == [2, 3, 3]


def test_equal_shares_are_what_other_engines_need():
    """Where EPLB has no expert twice on a rank, its plan; made for pouring, the busiest rank has more."""
    loads_LE = np.random.default_rng(0).dirichlet(np.full(256, 4), 3)
    peaks = []
    for shares in ("equal", "poured"):
        plan = balanced(loads_LE, 32, Budget(9), shares=shares)
        each_LE = loads_LE / plan.copies_LWE.sum(1)
        peaks.append(np.einsum("lwe,le->lw", plan.holds_LWE, each_LE).max(1))
    public = [eplb.rebalance(loads_E, 288, 1, 1, 32) for loads_E in loads_LE]
    unlike = [any(len(set(gpu)) < 9 for gpu in plan) for plan in public]
    theirs = [
        (x / np.bincount(np.ravel(p), minlength=256))[np.array(p)].sum(1).max()
        for x, p in zip(loads_LE, public, strict=True)
    ]
    assert not all(unlike)
    for equal, poured, public_peak, differs in zip(*peaks, theirs, unlike, strict=True):
        assert equal < poured
        assert differs or equal == pytest.approx(public_peak)
    with pytest.raises(ValueError, match=r"shares \('even'\) must be 'poured' or 'equal'"):
        balanced(loads_LE, 32, Budget(9), shares="even")


def test_groups_stay_on_one_node():
    loads = np.random.default_rng(0).dirichlet(np.full(16, 2), size=5)
    phy2log = rebalance_experts(loads, 24, 8, 2, 4)[0]
    for layer in phy2log.reshape(5, 2, 12):
        groups = [set((node // 2).tolist()) for node in layer]
        assert not groups[0] & groups[1]
        assert [len(g) for g in groups] == [4, 4]


def test_results_agree_with_each_other():
    """log2phy and logcnt say what phy2log says; the shapes are EPLB's; a tensor is taken too."""
    loads = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    phy2log, log2phy, logcnt = rebalance_experts(loads, 16, 4, 2, 8)
    assert phy2log.shape == (3, 16)
    assert log2phy.shape == (3, 12, logcnt.max())
    for layer, expert in np.ndindex(3, 12):
        slots = log2phy[layer, expert]
        assert (phy2log[layer, slots[slots >= 0]] == expert).all()
        assert (slots >= 0).sum() == logcnt[layer, expert] == (phy2log[layer] == expert).sum()


def test_more_slots_are_better_on_loads_like_mixtrals():
    loads = np.random.default_rng(0).dirichlet(np.full(8, 15), size=32)
    balance = [measure(balanced(loads, 4, Budget(s)), loads).balancedness_mean_over_max for s in (2, 3, 4)]
    assert balance == sorted(balance)
    assert balance[0] > 0.93
    assert balance[1] > 0.965
    assert balance[2] > 0.986


def test_all_slots_put_everything_everywhere():
    plan = balanced(np.ones((2, 8)), 4, Budget(slots_per_rank=99))
    assert plan.holds_LWE.all()


def test_uneven_counts_and_loads_of_nothing():
    plan = balanced(np.zeros((2, 8)), 3)
    assert plan.slots_LWS.shape == (2, 3, 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("slots", [2, 3])
def test_a_node_that_nobody_chooses(slots):
    """Loads were divided by its own sum, 0, and what came of it counted as empty slots."""
    loads_LE = np.array([[5.0, 0, 0, 0, 0, 0, 0, 0], [3, 1, 1, 1, 0, 0, 0, 0]])
    plan = balanced(loads_LE, 4, Budget(slots), ranks_per_node=2, num_groups=8)
    assert (plan.copies_LWE.sum(1) >= 1).all()
    peak_L = (pour(plan.slots_LWS, loads_LE).sum(2).max(1) / loads_LE.sum(1)).tolist()
    assert peak_L == pytest.approx([1, 0.5] if slots == 2 else [0.5, 0.25])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((np.ones((1, 8)), 9, 1, 1, 4), r"num_replicas \(9\) must be a multiple of num_gpus \(4\)"),
        ((np.ones((1, 8)), 4, 1, 1, 4), r"num_replicas \(4\) must be at least num_experts \(8\)"),
        ((np.ones((1, 8)), 36, 1, 1, 4), "at most 32: no rank holds an expert twice"),
        ((np.ones((1, 8)), 8, 3, 1, 4), r"num_experts \(8\) must be a multiple of num_groups \(3\)"),
        (([[1.0, float("nan")]], 2, 1, 1, 2), "layer 0, expert 1 has nan"),
        (([1.0, 2.0], 2, 1, 1, 2), r"loads \(shape \(2,\)\) must be"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        rebalance_experts(*arguments)
