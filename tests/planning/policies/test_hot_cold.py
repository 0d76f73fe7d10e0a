"""Hot experts everywhere, the others once; FasterMoE's choice as a plan."""

from __future__ import annotations

import numpy as np
import pytest

from mixtralkit.planning.cost import ShadowModel, choose_shadows
from mixtralkit.planning.policies.hot_cold import hot_cold, most_hot
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.quality import rank_loads
from mixtralkit.planning.policies.shadow import shadow

LOADS = np.random.default_rng(0).dirichlet(np.full(8, 4), size=6) * 1000


@pytest.mark.parametrize("cold", ["balanced", "contiguous"])
@pytest.mark.parametrize("hot", [0, 1, 3, 8])
def test_the_heaviest_are_on_every_rank_and_the_others_once(hot, cold):
    plan = hot_cold(LOADS, 4, hot, cold=cold)
    for layer, loads_E in enumerate(LOADS):
        heaviest = set(np.argsort(-loads_E)[:hot].tolist())
        assert set(np.flatnonzero(plan.holds_LWE[layer].all(0)).tolist()) == heaviest
        copies_E = plan.copies_LWE[layer].sum(0)
        assert all(copies_E[e] == (4 if e in heaviest else 1) for e in range(8))


def test_equal_loads_take_the_lower_ids():
    assert np.flatnonzero(hot_cold(np.ones((1, 8)), 4, 2).holds_LWE[0].all(0)).tolist() == [0, 1]


def test_contiguous_cold_experts_stay_in_order():
    loads = np.array([[9, 1, 1, 1, 8, 1, 1, 1]])
    assert hot_cold(loads, 2, 2, cold="contiguous").slots_LWS[0].tolist() == [[0, 1, 2, 3, 4], [0, 4, 5, 6, 7]]


def test_balanced_cold_experts_are_more_even():
    plans = [hot_cold(LOADS, 4, 2, cold=cold) for cold in ("balanced", "contiguous")]
    peaks = [rank_loads(plan, LOADS).max(1).mean() for plan in plans]
    assert peaks[0] < peaks[1]


def test_budget_fills_up_with_hot_experts():
    plan = hot_cold(LOADS, 4, budget=Budget(slots_per_rank=4))
    assert plan.meta["hot_experts"] == 2 == most_hot(8, 4, 4)  # the other six on four ranks take two more
    assert plan.slots_LWS.shape[2] <= 4
    assert hot_cold(LOADS, 4).meta["hot_experts"] == 0


def test_one_copy_a_node():
    plan = hot_cold(LOADS, 4, 2, ring=2)
    for layer, loads_E in enumerate(LOADS):
        nodes_2E = plan.copies_LWE[layer].reshape(2, 2, 8).sum(1)
        heaviest = np.argsort(-loads_E)[:2]
        assert (nodes_2E[:, heaviest] == 1).all()
        assert plan.copies_LWE[layer].sum() == 10


def test_capacity_is_kept_in_the_plan():
    plan = hot_cold(LOADS, 4, 1, cold_capacity_factor=1.2, cold_token_percent=0.5, overflow="reroute")
    assert (plan.cold_capacity_factor, plan.cold_token_percent, plan.overflow) == (1.2, 0.5, "reroute")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hot_experts": 9}, r"hot_experts \(9\) must lie in 0 … num_experts \(8\)"),
        ({"hot_experts": 2, "budget": Budget(slots_per_rank=3)}, "at least 4 for 2 hot experts: it lacks 1"),
        ({"cold": "warm"}, r"cold \('warm'\) must be one of"),
        ({"ring": 3}, r"ring \(3\) must divide world_size \(4\)"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        hot_cold(LOADS, 4, **options)


MODEL = ShadowModel.for_inference(d_model=4096, alpha=3.5, net_bandwidth=6.25e9, gpu_throughput=11.5e12)


def test_shadow_is_fastermoes_choice_layer_by_layer():
    rows = 400_000
    plan = shadow(LOADS, 8, MODEL, rows)
    chosen = [choose_shadows(loads_E / loads_E.sum() * rows, MODEL) for loads_E in LOADS]
    assert [set(np.flatnonzero(hot_E).tolist()) for hot_E in plan.holds_LWE.all(1)] == [set(hot) for hot in chosen]
    assert any(chosen)


def test_few_rows_pay_for_no_shadow_and_many_steps_do():
    assert not shadow(LOADS, 4, MODEL, rows=100).holds_LWE.all(1).any()
    assert shadow(LOADS, 4, MODEL, rows=100, steps=1e5).holds_LWE.all(1).any()


def test_shadows_stay_under_the_budget():
    plan = shadow(LOADS, 4, MODEL, rows=1e7, budget=Budget(slots_per_rank=3))
    assert plan.holds_LWE.sum(2).max() <= 3
    assert plan.holds_LWE.all(1).sum(1).max() == 1


def test_shadow_without_rows_is_an_error():
    with pytest.raises(ValueError, match=r"rows \(0\) must be a number above 0"):
        shadow(LOADS, 4, MODEL, rows=0)
