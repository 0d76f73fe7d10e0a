"""Affinity against all placements, against a general solver's model, and at the sizes it is for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies import affinity as policy
from mixtralkit.planning.policies.affinity import affinity
from mixtralkit.planning.policies.affinity_replicas import crossings as count_crossings
from mixtralkit.planning.policies.affinity_replicas import with_replicas
from mixtralkit.planning.policies.chain import solve_exactly, stays
from mixtralkit.planning.policies.chain_bound import kind_of_bound, upper_bound
from mixtralkit.planning.policies.chain_search import search
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.quality import crossings_J, measure
from mixtralkit.planning.synthetic import RoutingProcess

SIZES = [(4, 2), (4, 4), (6, 3), (6, 2), (3, 3), (8, 4), (8, 2), (5, 1)]


def random_transitions(random: np.random.Generator, layers: int, experts: int, evenness: float = 0.5) -> np.ndarray:
    return random.dirichlet(np.full(experts, evenness), size=(layers - 1, experts)) / experts


def all_placements(experts: int, world_size: int) -> np.ndarray:
    """Rank of each expert, every way to put equally many on each rank."""
    every = itertools.product(range(world_size), repeat=experts)
    return np.array([p for p in every if all(p.count(w) == experts // world_size for w in range(world_size))])


def fewest_crossings(
    weights: np.ndarray, world_size: int, shares_LE: np.ndarray | None = None, cap: float = np.inf
) -> float:
    """Over every placement of every layer, those above ``cap`` left out."""
    places_PE = all_placements(weights.shape[1], world_size)
    one_hot = np.eye(world_size)[places_PE]
    least_P = np.zeros(len(places_PE))
    for layer in range(len(weights) + 1):
        if layer:
            stay_PQ = np.einsum("pew,ef,qfw->pq", one_hot, weights[layer - 1], one_hot, optimize=True)
            least_P = (least_P[:, None] + weights[layer - 1].sum() - stay_PQ).min(0)
        if shares_LE is not None:
            over_P = np.einsum("pew,e->pw", one_hot, shares_LE[layer]).max(1) > cap * (1 + 1e-9)
            least_P = np.where(over_P, np.inf, least_P)
    return float(least_P.min())


def crossings(plan: ExpertPlan, weights: np.ndarray) -> float:
    """Counted pair by pair."""
    rank_LE = plan.holds_LWE.argmax(1)
    experts = range(plan.num_experts)
    return sum(
        weights[layer, a, b]
        for layer, a, b in itertools.product(range(len(weights)), experts, experts)
        if rank_LE[layer, a] != rank_LE[layer + 1, b]
    )


@pytest.mark.parametrize("case", range(100))
def test_equals_brute_force(case):
    random = np.random.default_rng(case)
    experts, world_size = SIZES[case % len(SIZES)]
    layers = 2 if experts == 8 and world_size == 4 else int(random.integers(2, 5))
    weights = random_transitions(random, layers, experts)
    plan = affinity(weights, world_size)
    assert crossings(plan, weights) == pytest.approx(fewest_crossings(weights, world_size), abs=1e-9)
    assert plan.meta["exact"]
    assert plan.meta["crossings_bound"] == pytest.approx(crossings(plan, weights), abs=1e-9)
    assert measure(plan, np.ones((layers, experts)), weights).crossings_per_token == pytest.approx(
        crossings(plan, weights)
    )


@pytest.mark.parametrize("case", range(12))
def test_capped_equals_brute_force_of_those_under_the_cap(case):
    random = np.random.default_rng(case)
    experts, world_size = [(6, 3), (8, 2), (6, 2)][case % 3]
    weights = random_transitions(random, 3, experts)
    loads_LE = random.dirichlet(np.full(experts, 4), size=3)
    shares_LE = loads_LE * world_size
    one_hot = np.eye(world_size)[all_placements(experts, world_size)]
    least = np.einsum("pew,le->lpw", one_hot, shares_LE).max(2).min(1).max()
    cap = float(least * 1.05)
    plan = affinity(weights, world_size, loads_LE=loads_LE, load_cap=cap)
    assert np.einsum("le,lwe->lw", shares_LE, plan.holds_LWE).max() <= cap * (1 + 1e-9)
    assert crossings(plan, weights) == pytest.approx(fewest_crossings(weights, world_size, shares_LE, cap))
    with pytest.raises(ValueError, match=r"load_cap .* must be at least"):
        affinity(weights, world_size, loads_LE=loads_LE, load_cap=float(least * 0.99))


def test_nodes_come_first_and_ranks_within_them():
    random = np.random.default_rng(1)
    for layers, world_size, per_node in ((3, 4, 2), (4, 6, 3), (3, 6, 2)):
        experts = world_size
        weights = random_transitions(random, layers, experts)
        plan = affinity(weights, world_size, ranks_per_node=per_node)
        fewest = fewest_crossings(weights, world_size // per_node)
        assert crossings_J(plan, weights, per_node).sum() == pytest.approx(fewest)
        # inside every node: no exchange of two ranks' experts from some layer on lowers the crossings
        for node, layer in itertools.product(range(world_size // per_node), range(layers)):
            for a, b in itertools.combinations(range(node * per_node, (node + 1) * per_node), 2):
                slots = plan.slots_LWS.copy()
                slots[layer:, [a, b]] = slots[layer:, [b, a]]
                other = ExpertPlan(slots, experts, ranks_per_node=per_node)
                assert crossings(plan, weights) <= crossings(other, weights) + 1e-9


def test_load_cap_with_nodes_keeps_every_rank_under_it():
    random = np.random.default_rng(2)
    weights, loads_LE = random_transitions(random, 4, 8), random.dirichlet(np.full(8, 6), size=4)
    plan = affinity(weights, 4, ranks_per_node=2, loads_LE=loads_LE, load_cap=1.5)
    assert np.einsum("le,lwe->lw", loads_LE * 4, plan.holds_LWE).max() <= 1.5 * (1 + 1e-9)


def test_32_layers_on_4_gpus():
    """Better than steepest-descent swaps from 20 random placements, which is what general local search does."""
    trace = RoutingProcess.random(32, 8, affinity=1.0, seed=3).trace(50_000, seed=4)
    weights = trace.transitions_LEE()
    plan = affinity(weights, 4)
    assert plan.meta["exact"]
    ours = measure(plan, trace.loads_LE(), weights).crossings_per_token
    assert ours < 0.9 * 31 * 0.75
    others = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        ranks_LE = np.array([random.permutation(8) % 4 for _ in range(32)])
        others.append(31 - swaps(weights / weights.sum((1, 2), keepdims=True), ranks_LE))
    assert ours <= min(others) + 1e-9


def swaps(weights: np.ndarray, ranks_LE: np.ndarray) -> float:
    improved = True
    while improved:
        improved = False
        for layer, a, b in itertools.product(range(len(ranks_LE)), range(8), range(8)):
            trial = ranks_LE.copy()
            trial[layer, [a, b]] = trial[layer, [b, a]]
            near = slice(max(layer - 1, 0), layer + 2)
            w = weights[near.start : layer + 1]
            if a < b and stays(w, trial[near]) > stays(w, ranks_LE[near]) + 1e-12:
                ranks_LE, improved = trial, True
    return stays(weights, ranks_LE)


def test_8_gpus_of_one_expert_each_are_exact():
    weights = random_transitions(np.random.default_rng(0), 32, 8)
    plan = affinity(weights, 8)
    assert plan.meta["exact"]
    assert plan.meta["crossings_bound"] == pytest.approx(crossings(plan, weights))
    pairs = [linear_sum_assignment(weight_EE, maximize=True) for weight_EE in weights]
    kept = sum(weight_EE[pair].sum() for weight_EE, pair in zip(weights, pairs, strict=True))
    assert crossings(plan, weights) == pytest.approx(31 - kept)


@pytest.mark.parametrize("case", range(10))
def test_search_and_bound_enclose_the_optimum(case):
    random = np.random.default_rng(case)
    experts, parts = [(8, 4), (6, 3), (8, 2), (10, 2), (4, 4)][case % 5]
    weights = random_transitions(random, 6, experts)
    best = stays(weights, solve_exactly(weights, 6, parts))
    found = search(weights, 6, parts, np.ones((6, experts)))
    assert all(np.bincount(labels_N).tolist() == [experts // parts] * parts for labels_N in found)
    assert best * 0.995 <= stays(weights, found) <= best + 1e-9
    bound = upper_bound(weights, parts)
    assert bound >= best - 1e-8
    assert weights.sum() - bound >= 0.9 * (weights.sum() - best)


def planted(random: np.random.Generator, layers: int, experts: int, parts: int, inside: float) -> np.ndarray:
    """Tokens stay in their part with probability ``inside``, under labels nobody is told."""
    labels_LE = np.array([random.permutation(experts) % parts for _ in range(layers)])
    weights = random.dirichlet(np.full(experts, 1.1), size=(layers - 1, experts))
    same = labels_LE[:-1, :, None] == labels_LE[1:, None, :]
    within = weights * same * (inside / (weights * same).sum(2, keepdims=True))
    without = weights * ~same * ((1 - inside) / (weights * ~same).sum(2, keepdims=True))
    return (within + without) / experts


@pytest.mark.parametrize(("experts", "world_size", "inside", "gap"), [(16, 4, 0.8, 0.02), (64, 8, 0.4, 0.02)])
def test_large_sizes_find_planted_parts_within_two_percent_of_the_bound(experts, world_size, inside, gap):
    weights = planted(np.random.default_rng(0), 12, experts, world_size, inside)
    plan = affinity(weights, world_size)
    ours = crossings(plan, weights)
    assert not plan.meta["exact"]
    assert ours <= 11 * (1 - inside) + 1e-9
    assert plan.meta["crossings_bound"] <= ours <= plan.meta["crossings_bound"] * (1 + gap)


def heavy_chains(parts: int, experts: int, inside: float) -> np.ndarray:
    """Parts of very different weight, a few experts with most of the tokens, as in traces of Switch."""
    random = np.random.default_rng(1)
    labels_LE = np.array([random.permutation(experts) % parts for _ in range(6)])
    shares_LE = random.dirichlet(np.full(experts, 0.15), 6) + 1e-6
    weights = []
    for labels, shares in zip(itertools.pairwise(labels_LE), itertools.pairwise(shares_LE), strict=True):
        products_EE, same_EE = np.outer(*shares), labels[0][:, None] == labels[1]
        weight_EE = np.zeros((experts, experts))
        for part in range(parts):
            of_part = np.ix_(*(label_E == part for label_E in labels))
            block = products_EE[of_part] * random.gamma(0.5, 1, products_EE[of_part].shape)
            weight_EE[of_part] = block / block.sum() / (part + 1)
        across_EE = products_EE * ~same_EE * random.gamma(0.3, 1, same_EE.shape)
        weights.append(inside * weight_EE / weight_EE.sum() + (1 - inside) * across_EE / across_EE.sum())
    return np.array(weights)


def test_heavy_chains_are_found_and_the_bound_is_near():
    """ExFlow's placement of 128 experts had 0.643 crossings where swaps of single experts, hot to cold, came to 0.786;
    and of 64 experts the bound was 29% below the placement."""
    weights = heavy_chains(8, 32, inside=0.9)
    plan = affinity(weights, 8)
    ours = count_crossings(weights, plan.holds_LWE)
    assert ours < 0.95 * 5 * (1 - 0.9)
    assert 0.93 * ours <= plan.meta["crossings_bound"] <= ours + 1e-9
    assert "semidefinite" in plan.meta["bound"]


def test_large_sizes_keep_the_cap():
    random = np.random.default_rng(0)
    weights, loads_LE = random_transitions(random, 4, 16), random.dirichlet(np.full(16, 8), size=4)
    free = affinity(weights, 4)
    capped = affinity(weights, 4, loads_LE=loads_LE, load_cap=1.05)
    peak = {p: np.einsum("le,lwe->lw", loads_LE * 4, p.holds_LWE).max() for p in (free, capped)}
    assert peak[capped] <= 1.05 * (1 + 1e-9) < peak[free]
    assert crossings(capped, weights) <= 3 * 0.75  # and not worse than any placement


@pytest.mark.parametrize("case", range(6))
def test_replicas_and_placement_together_beat_one_after_the_other(case):
    """And are counted as ``crossings_J`` counts them."""
    random = np.random.default_rng(case)
    experts, world = [(8, 4), (16, 4), (16, 8)][case % 3]
    weights = random_transitions(random, 6, experts, 0.2)
    weights /= weights.sum((1, 2), keepdims=True)
    alone = affinity(weights, world, bound=0)
    slots = experts // world + 1
    after = with_replicas(weights, alone.holds_LWE, slots, may_move=False)
    plan = affinity(weights, world, budget=Budget(slots_per_rank=slots), bound=0)
    joint = count_crossings(weights, plan.holds_LWE)
    assert plan.holds_LWE.sum(2).max() <= slots
    assert joint <= count_crossings(weights, after) + 1e-12 < count_crossings(weights, alone.holds_LWE)
    assert joint == pytest.approx(crossings_J(plan, weights).sum())


def test_under_a_cap_replicas_are_added_and_nothing_moves():
    random = np.random.default_rng(0)
    weights, loads_LE = random_transitions(random, 4, 8), random.dirichlet(np.full(8, 8), size=4)
    options = {"loads_LE": loads_LE, "load_cap": 1.6}
    plain = affinity(weights, 4, **options)
    more = affinity(weights, 4, budget=Budget(slots_per_rank=3), **options)
    assert (more.holds_LWE | ~plain.holds_LWE).all()
    assert more.holds_LWE.sum() > plain.holds_LWE.sum()


@pytest.mark.parametrize(("pairs", "experts", "kind"), [(11, 128, "a semidefinite"), (57, 256, "largest entries")])
def test_a_bound_says_which_it_is(pairs, experts, kind):
    assert kind_of_bound(pairs, experts).startswith(kind)
    if experts == 256:  # quick: and it is a bound
        weights = random_transitions(np.random.default_rng(0), pairs + 1, experts)
        labels_LN = np.tile(np.arange(experts) % 32, (pairs + 1, 1))
        assert stays(weights, labels_LN) <= upper_bound(weights, 32) < weights.sum()


def test_more_work_gives_a_higher_bound_and_none_gives_none():
    weights = random_transitions(np.random.default_rng(0), 3, 12)
    bounds = [affinity(weights, 3, bound=work).meta["crossings_bound"] for work in (0.1, 1, 4)]
    plan = affinity(weights, 3, bound=0)
    assert (
        bounds[0]
        < bounds[1]
        <= bounds[2]
        <= count_crossings(weights / weights.sum((1, 2), keepdims=True), plan.holds_LWE)
    )
    assert plan.meta["crossings_bound"] is plan.meta["bound"] is None


def test_plans_of_several_budgets_share_one_placement(monkeypatch):
    calls, place = [], policy._place
    monkeypatch.setattr(policy, "_place", lambda *given: calls.append(given) or place(*given))
    policy._placed.cache_clear()
    weights = random_transitions(np.random.default_rng(5), 3, 8)
    shared = [affinity(weights, 4, budget=Budget(slots_per_rank=slots)) for slots in (2, 3, 4)]
    assert len(calls) == 1
    for plan in shared:
        policy._placed.cache_clear()
        alone = affinity(weights, 4, budget=Budget(slots_per_rank=plan.holds_LWE.sum(2).max()))
        assert (alone.slots_LWS == plan.slots_LWS).all()
    assert len(calls) == 4
    affinity(weights, 2)
    assert len(calls) == 5  # other ranks, another placement


def test_same_input_same_plan():
    weights = random_transitions(np.random.default_rng(0), 3, 12)
    plans = [affinity(weights.copy(), 3, bound=0) for _ in range(2)]
    assert not plans[0].meta["exact"]
    assert (plans[0].slots_LWS == plans[1].slots_LWS).all()


@pytest.mark.parametrize(
    ("transitions", "options", "sentence"),
    [
        (np.ones((2, 8, 8)), {"world_size": 3}, r"num_experts \(8\) must be a multiple of world_size \(3\)"),
        (np.ones((2, 8, 8)), {"world_size": 4, "ranks_per_node": 3}, r"ranks_per_node \(3\) must divide"),
        (np.ones((2, 8, 7)), {"world_size": 4}, r"transitions \(shape \(2, 8, 7\)\)"),
        (np.full((2, 8, 8), np.nan), {"world_size": 4}, "layer 0, experts 0 and 0 have nan"),
        (np.ones((2, 8, 8)), {"world_size": 4, "budget": Budget(slots_per_rank=1)}, "at least 2 .* it lacks 1"),
        (np.ones((2, 8, 8)), {"world_size": 4, "load_cap": 1.2}, "needs loads"),
    ],
)
def test_bad_input_is_one_sentence(transitions, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        affinity(transitions, **options)
    assert "\n" not in str(error.value)
