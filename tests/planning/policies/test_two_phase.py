"""Lina's assignment by hand, and when phase two corrects it."""

from __future__ import annotations

import numpy as np
import pytest

from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.two_phase import assign, check_estimate, two_phase


def test_half_of_the_rows_take_half_of_the_ranks():
    """W · share = 2, 0.8, 0.6, 0.6: two ranks for the first, one for the next, and the two others do not fit there."""
    assert assign(np.array([50, 20, 15, 15]), 4, 2) == [[0], [0], [1], [2, 3]]


def test_what_fits_nowhere_goes_to_the_lightest_rank():
    """n = 0.7, 0.7, 0.6 on two ranks of three slots: the third fits neither, the first of the equal ones takes it."""
    assert assign(np.array([35, 35, 30]), 2, 3) == [[0, 2], [1]]


@pytest.mark.parametrize("case", range(50))
def test_every_expert_once_at_least_and_never_twice_on_a_rank(case):
    random = np.random.default_rng(case)
    experts, ranks = int(random.integers(1, 20)), int(random.integers(1, 9))
    slots = -(-experts // ranks) + int(random.integers(0, 3))
    assigned = assign(random.dirichlet(np.full(experts, 0.3)), ranks, slots)
    assert {expert for rank in assigned for expert in rank} == set(range(experts))
    assert all(len(set(rank)) == len(rank) <= slots for rank in assigned)


def test_phase_two_corrects_where_the_popular_experts_differ():
    same = check_estimate(np.array([9, 8, 1, 2]), np.array([7, 9, 2, 1]), top_k=1)
    other = check_estimate(np.array([9, 8, 1, 2]), np.array([9, 1, 8, 2]), top_k=1)
    assert (same.right, same.corrected) == (True, False)
    assert (other.right, other.corrected) == (False, True)
    assert other.distance == pytest.approx(7 / 20)


def test_threshold_decides_by_distance_instead():
    estimate, real = np.array([9, 8, 1, 2]), np.array([9, 1, 8, 2])
    assert not check_estimate(estimate, real, 1, threshold=0.36).corrected
    assert check_estimate(estimate, real, 1, threshold=0.34).corrected


def test_corrected_layers_are_those_of_the_real_counts():
    estimate = np.array([[9.0, 1, 1, 1], [1, 9, 1, 1]])
    real = np.array([[9.0, 1, 1, 1], [1, 1, 1, 9]])
    plan = two_phase(estimate, 2, real, top_k=1, threshold=0.1, budget=Budget(3))
    assert (plan.slots_LWS[0] == two_phase(estimate, 2, budget=Budget(3)).slots_LWS[0]).all()
    assert (plan.slots_LWS[1] == two_phase(real, 2, budget=Budget(3)).slots_LWS[1]).all()
    assert plan.meta["corrected"] == 0.5
    assert [layer["corrected"] for layer in plan.meta["layers"]] == [False, True]


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match=r"real loads \(shape \(1, 4\)\)"):
        two_phase(np.ones((2, 4)), 2, np.ones((1, 4)))
    with pytest.raises(ValueError, match="it lacks 1"):
        two_phase(np.ones((2, 4)), 2, budget=Budget(1))
