"""One holder of each expert, against all ways to choose one. (``spread_rows`` is tested with the layer's balance.)"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixtralkit.planning.plan import contiguous, everywhere
from mixtralkit.planning.replicas import is_small, one_holder
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
    assert is_small(256, 2, 8)
    assert not is_small(257, 2, 8)
