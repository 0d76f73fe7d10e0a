"""The table of replicas against brute force: one holder, the own node first, turns, and pouring."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from mixtralkit.planning.plan import contiguous, everywhere
from mixtralkit.planning.replicas import SLOT_BITS, TURNS, ReplicaTable, is_small, one_holder, pour_batches
from tests.moe.layers import random_plan


def fewest(holds_WE: np.ndarray) -> int:
    """The most experts of a rank, at best, by trying every choice."""
    holders = [np.flatnonzero(column) for column in holds_WE.T]
    return min(max(np.bincount(choice)) for choice in itertools.product(*holders))


@pytest.mark.parametrize("seed", range(20))
def test_every_expert_keeps_one_of_its_holders_and_ranks_are_as_even_as_can_be(seed):
    slots_WE = random_plan(seed, 6, 3).slot_of_LWE[0]
    kept_WE = one_holder(slots_WE)
    assert ((kept_WE >= 0).sum(0) == 1).all()
    assert (kept_WE[kept_WE >= 0] == slots_WE[kept_WE >= 0]).all()
    assert (kept_WE >= 0).sum(1).max() == fewest(slots_WE >= 0)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_plans_without_and_with_all_replicas(world):
    plain = contiguous(1, 8, world).slot_of_LWE[0]
    assert (one_holder(plain) == plain).all()
    assert (one_holder(everywhere(1, 8, world).slot_of_LWE[0]) >= 0).sum(1).tolist() == [8 // world] * world


def test_few_rows():
    assert is_small(512, 2, 8)
    assert not is_small(513, 2, 8)


def holders_of(table: ReplicaTable, expert: int, sender: int) -> list[int]:
    """The ranks that may compute an expert's rows of a sender, by the rule in words: itself, its node, all."""
    ranks = [int(rank) for rank in np.flatnonzero(table.slots_WE[:, expert] >= 0)]
    if table.rows_everywhere:
        return ranks
    if sender in ranks:
        return [sender]
    per_node = table.ranks_per_node or len(table.slots_WE)
    return [rank for rank in ranks if rank // per_node == sender // per_node] or ranks


def tables():
    for seed, world, per_node in ((0, 4, None), (1, 6, 3), (2, 6, 2), (3, 3, 1), (4, 8, 4), (5, 1, None)):
        for same_rows in (False, True):
            slots_WE = random_plan(seed, 8, world).slot_of_LWE[0]
            yield pytest.param(ReplicaTable(slots_WE, per_node, same_rows), id=f"{world}/{per_node}/{same_rows}")


@pytest.mark.parametrize("table", list(tables()))
def test_the_own_rank_then_the_own_node_then_all_take_turns(table):
    world, experts = table.slots_WE.shape
    for expert, sender in itertools.product(range(experts), range(world)):
        allowed = holders_of(table, expert, sender)
        rows = np.arange(2 * TURNS)
        found = table.ranks(np.full_like(rows, expert), np.full_like(rows, sender), rows, small=False)
        first = allowed.index(int(found[0]))
        wanted = [allowed[(first + row % TURNS) % len(allowed)] for row in rows]
        assert found.tolist() == wanted
        assert table.local_WE[sender, expert] == (
            len(allowed) == world == sum(table.holds_WE[:, expert]) if table.rows_everywhere else allowed == [sender]
        )
        few = table.ranks(np.full_like(rows, expert), np.full_like(rows, sender), rows, small=True)
        assert set(few) == {table.small_E[expert]}
        assert table.holds_WE[table.small_E[expert], expert]
    choices = [len(holders_of(table, e, s)) for e in range(experts) for s in range(world)]
    assert table.has_choice == (max(choices) > 1)
    assert table.ranks(np.array([-1]), np.array([0]), np.array([0]), False).tolist() == [-1]


@pytest.mark.parametrize("table", list(tables()))
@pytest.mark.parametrize("small", [False, True])
def test_places_are_the_ranks_and_their_slots(table, small):
    for rank in range(len(table.slots_WE)):
        places_EC = table.places_EC(rank, small)
        assert places_EC.shape == (8, TURNS)
        assert places_EC.dtype == np.int32
        ranks_EC, slots_EC = places_EC >> SLOT_BITS, places_EC & ((1 << SLOT_BITS) - 1)
        for expert in range(8):
            turns = np.arange(TURNS)
            wanted = table.ranks(np.full(TURNS, expert), np.full(TURNS, rank), turns, small)
            assert ranks_EC[expert].tolist() == wanted.tolist()
            assert slots_EC[expert].tolist() == table.slots_WE[wanted, expert].tolist()


def least_peak(counts_SE: np.ndarray, table: ReplicaTable) -> int:
    """Rows of the busiest rank at best, as a linear programme over (sender, expert, allowed rank)."""
    ways = [(s, e, w) for s, e in np.argwhere(counts_SE > 0) for w in holders_of(table, int(e), int(s))]
    cost = np.r_[np.zeros(len(ways)), 1]
    load, sums, wanted = np.zeros((len(table.slots_WE), len(ways) + 1)), [], []
    load[:, -1] = -1
    for column, (_, _, rank) in enumerate(ways):
        load[rank, column] = 1
    for sender, expert in np.argwhere(counts_SE > 0):
        sums.append([float(w[:2] == (sender, expert)) for w in ways] + [0.0])
        wanted.append(counts_SE[sender, expert])
    solved = linprog(cost, load, np.zeros(len(load)), np.array(sums), wanted)
    return int(np.ceil(solved.fun - 1e-6))


@pytest.mark.parametrize("table", list(tables()))
def test_pouring_is_the_best_within_the_groups(table):
    world, experts = table.slots_WE.shape
    counts_SE = np.random.default_rng(world).poisson(20, (1 if table.rows_everywhere else world, experts))
    rows_GW = table.pour(counts_SE)
    assert (rows_GW >= 0).all()
    assert not rows_GW[~table.group_holds_GW].any()
    group_SE = table.group_WE[: len(counts_SE)]
    for group, rows_W in enumerate(rows_GW):
        assert rows_W.sum() == counts_SE[group_SE == group].sum()
    local_W = np.zeros(world, int)
    local_W[: len(counts_SE)] = (counts_SE * (group_SE < 0)).sum(1)
    assert (rows_GW.sum(0) + local_W).max() == least_peak(counts_SE, table)
    # row by row the same shares
    senders, chosen = (np.repeat(x, counts_SE.ravel()) for x in np.indices(counts_SE.shape).reshape(2, -1))
    ranks = table.ranks_poured(chosen[:, None], senders, np.zeros(len(chosen), int), 1)[:, 0]
    assert np.bincount(ranks, minlength=world).tolist() == (rows_GW.sum(0) + local_W).tolist()
    assert all(rank in holders_of(table, e, s) for e, s, rank in zip(chosen, senders, ranks, strict=True))


def test_many_ranks():
    """144 ranks of two slots: every row goes to a holder and no rank has more than the bound by cuts allows."""
    rng = np.random.default_rng(0)
    slots = np.r_[np.arange(256), rng.choice(256, 32, replace=False)].reshape(2, 144).T
    holds_GW = (slots[:, :, None] == np.arange(256)).any(1).T
    counts_BG = rng.poisson(rng.gamma(2, 50, 256), (3, 256))
    rows_BGW = pour_batches(counts_BG, np.zeros((3, 144), int), holds_GW)
    assert (rows_BGW.sum(2) == counts_BG).all()
    assert not rows_BGW[:, ~holds_GW].any()
    for counts_G, rows_GW in zip(counts_BG, rows_BGW, strict=True):
        load_W = rows_GW.sum(0)
        reached = load_W == load_W.max()  # ranks from which rows could still be taken: none has two rows less
        for _ in range(144):
            reached |= holds_GW[(rows_GW[:, reached] > 0).any(1)].any(0)
        assert load_W[reached].min() >= load_W.max() - 1
        assert counts_G.sum() == load_W.sum()
