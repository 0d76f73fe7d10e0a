"""Balanced plans against a slow, plain form of EPLB's public algorithm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtralkit.planning.policies.balanced import balanced, rebalance_experts
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.quality import measure
from mixtralkit.planning.replicas import spread_rows


def packed(loads: list[float], packs: int) -> list[list[int]]:
    """Heaviest first to the lightest pack that has room, equally many in each; in order where one goes in each."""
    room = len(loads) // packs
    if room == 1:
        return [[item] for item in range(len(loads))]
    found: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        open_packs = [pack for pack in found if len(pack) < room]
        min(open_packs, key=lambda pack: sum(loads[i] for i in pack)).append(item)
    return found


def public_algorithm(loads: list[float], replicas: int, groups: int, nodes: int, gpus: int) -> list[list[int]]:
    """Experts of each GPU as EPLB's published steps give them; an expert may be twice on one."""
    if groups % nodes:
        groups = nodes = 1
    size = len(loads) // groups
    on_gpus = []
    for own_groups in packed([sum(loads[g * size : (g + 1) * size]) for g in range(groups)], nodes):
        experts = [group * size + i for group in own_groups for i in range(size)]
        slots = list(experts)
        while len(slots) < replicas // nodes:
            slots.append(max(experts, key=lambda e: loads[e] / slots.count(e)))
        packs = packed([loads[e] / slots.count(e) for e in slots], gpus // nodes)
        on_gpus += [[slots[i] for i in pack] for pack in packs]
    return on_gpus


def peak(on_gpus: list[list[int]], loads: np.ndarray) -> float:
    """Load of the busiest GPU when replicas share an expert's load equally."""
    copies = np.bincount(np.concatenate(on_gpus), minlength=len(loads))
    return max(sum(loads[e] / copies[e] for e in experts) for experts in on_gpus)


def peak_as_run(on_gpus: list[list[int]], loads: np.ndarray) -> float:
    """Load of the busiest GPU when rows go to replicas as the running layer spreads them."""
    holds_WE = np.zeros((len(on_gpus), len(loads)), bool)
    for gpu, experts in enumerate(on_gpus):
        holds_WE[gpu, experts] = True
    rows_E = np.rint(loads * 1e6).astype(int)
    return spread_rows(rows_E, np.zeros(len(on_gpus), int), holds_WE).sum(0).max() / 1e6


def random_case(case: int) -> tuple[np.ndarray, int, int, int, int]:
    """Loads, replicas, groups, nodes, GPUs."""
    random = np.random.default_rng(case)
    experts, gpus = int(random.choice([8, 16, 32, 64])), int(random.choice([2, 4, 8]))
    nodes = int(random.choice([1, 2])) if gpus > 2 else 1
    groups = int(random.choice([1, nodes, 4, experts]))
    fewest = -(-experts // gpus)
    most = experts // (nodes if groups % nodes == 0 else 1)
    slots = int(random.integers(fewest, min(most, fewest + 4) + 1))
    return random.dirichlet(np.full(experts, random.choice([15, 4, 0.5]))), slots * gpus, groups, nodes, gpus


@pytest.mark.parametrize("case", range(200))
def test_never_worse_than_the_public_algorithm_and_never_twice_on_a_rank(case):
    """Rows as the layer spreads them, always; equal shares, wherever the public plan has no duplicate on a GPU.

    A duplicate gives its GPU two shares of three, say, which a plan without duplicates cannot copy in equal shares.
    """
    loads, replicas, groups, nodes, gpus = random_case(case)
    public = public_algorithm(loads.tolist(), replicas, groups, nodes, gpus)
    ours = rebalance_experts(loads[None], replicas, groups, nodes, gpus)[0].reshape(gpus, -1).tolist()
    assert all(len(set(experts)) == len(experts) for experts in ours)
    assert {expert for experts in ours for expert in experts} == set(range(len(loads)))
    assert peak_as_run(ours, loads) <= peak(public, loads) * (1 + 2e-4)
    if all(len(set(experts)) == len(experts) for experts in public):
        assert peak(ours, loads) <= peak(public, loads) * (1 + 1e-9)


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
    assert plan.hot_LE.all()


def test_uneven_counts_and_loads_of_nothing():
    plan = balanced(np.zeros((2, 8)), 3)
    assert plan.slots_LWS.shape == (2, 3, 3)


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
