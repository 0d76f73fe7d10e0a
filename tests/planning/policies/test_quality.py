"""Crossings against tokens that are walked through the layers one by one."""

from __future__ import annotations

import numpy as np
import pytest

from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from mixtralkit.planning.policies.affinity import affinity
from mixtralkit.planning.policies.hot_cold import hot_cold
from mixtralkit.planning.policies.quality import crossings_J, measure, measure_held_out, rank_loads
from mixtralkit.planning.synthetic import RoutingProcess


def walked(plan: ExpertPlan, first_NL: np.ndarray, ranks: int, random: np.random.Generator) -> float:
    """Moves per token between groups of ``ranks`` ranks, each token going where its next expert is nearest."""
    moves = 0
    for experts in first_NL:
        at = random.choice(np.flatnonzero(plan.holds_LWE[0, :, experts[0]]))
        for layer, expert in enumerate(experts[1:], start=1):
            holders = np.flatnonzero(plan.holds_LWE[layer, :, expert])
            near = holders[holders // ranks == at // ranks]
            if at in holders:
                continue
            to = random.choice(near if len(near) else holders)
            moves += ranks == 1 or at // ranks != to // ranks
            at = to
    return moves / len(first_NL)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("hot", [0, 2, 8])
def test_crossings_are_those_of_walking_tokens(hot, ranks):
    trace = RoutingProcess.random(6, 8, affinity=1.0, seed=1).trace(4000, top_k=1, seed=2)
    plan = hot_cold(trace.loads_LE(), 4, hot)
    expected = walked(plan, trace.experts[:, :, 0], ranks, np.random.default_rng(0))
    # without replicas the count is exact, with them it forgets a token's path before its last expert
    tolerance = 1e-6 if hot == 0 else 0.06
    assert crossings_J(plan, trace.transitions_LEE(), ranks).sum() == pytest.approx(expected, abs=tolerance)


def test_uniform_routing_crosses_as_uniform_says():
    plan = contiguous(32, 8, 4)
    quality = measure(plan, np.ones((32, 8)), np.ones((31, 8, 8)))
    assert quality.crossings_per_token == pytest.approx(quality.uniform_crossings_per_token) == 23.25
    assert quality.balancedness_mean_over_max == quality.max_over_mean == 1
    assert quality.memory_gb_per_rank(32, 3 * 4096 * 14336 * 2) == pytest.approx(22.5486, abs=1e-3)


def test_replicas_share_their_load():
    """To one of ten million rows, which the loads are scaled to: a twelfth of them is no whole number."""
    slots = np.array([[[0, 1], [0, 2]]])
    loads = rank_loads(ExpertPlan(slots, 3), np.array([[6, 1, 5]]))
    np.testing.assert_allclose(loads, [[4, 8]], rtol=1e-6)
    quality = measure(ExpertPlan(slots, 3), np.array([[6, 1, 5]]))
    assert quality.balancedness_mean_over_max == pytest.approx(6 / 8)
    assert quality.max_over_mean == pytest.approx(8 / 6)
    assert quality.crossings_per_token is None


def test_loads_are_what_the_layer_pours():
    """In equal shares the second rank would have 8.5; half of expert 1's rows may all go to the other."""
    slots = np.array([[[0, 1], [1, 2], [3, -1]]])
    loads = rank_loads(ExpertPlan(slots, 4), np.array([[3.0, 6, 6, 3]]))
    np.testing.assert_allclose(loads, [[7, 8, 3]], atol=1e-5)  # the second keeps its own third of expert 1


def test_small_traces_are_doubted():
    trace = RoutingProcess.random(6, 8, concentration=np.inf, affinity=0.0, seed=1).trace(60, seed=2)
    found = measure_held_out(lambda fit: affinity(fit.transitions_LEE(), 4, bound=0), trace)
    assert found.fitted["crossings_per_token"] < found.held_out["crossings_per_token"]
    assert any("crossings_per_token" in doubt and "record more tokens" in doubt for doubt in found.doubts())
    real = RoutingProcess.random(6, 8, affinity=1.0, seed=1).trace(4000, sequence_length=40, seed=2)
    sure = measure_held_out(lambda fit: affinity(fit.transitions_LEE(), 4, bound=0), real)
    assert not any("crossings_per_token" in doubt for doubt in sure.doubts())


def test_nothing_travels_when_everything_is_everywhere():
    plan = everywhere(4, 8, 4)
    assert crossings_J(plan, np.ones((3, 8, 8))).sum() == 0


def test_other_models_loads_are_an_error():
    with pytest.raises(ValueError, match=r"loads \(shape \(3, 8\)\) must be the plan's \(4, 8\)"):
        measure(contiguous(4, 8, 2), np.ones((3, 8)))
    with pytest.raises(ValueError, match=r"transitions \(shape"):
        measure(contiguous(4, 8, 2), np.ones((4, 8)), np.ones((4, 8, 8)))
