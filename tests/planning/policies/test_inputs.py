"""Budgets: what they allow, and by how much they are too small."""

from __future__ import annotations

import re

import pytest

from mixtralkit.planning.policies.inputs import Budget

MIXTRAL_EXPERT = 3 * 4096 * 14336 * 2


def test_slots_of_memory():
    budget = Budget(memory_gb=34, expert_bytes=MIXTRAL_EXPERT)
    assert budget.slots(32, 8, 4) == 3  # 11.27 GB each
    assert Budget(2, 34, MIXTRAL_EXPERT).slots(32, 8, 4) == 2
    assert Budget(slots_per_rank=99).slots(32, 8, 4) == 8
    assert Budget().slots(32, 8, 3) == 3


def test_exactly_enough_memory_is_enough():
    needed = 2 * 32 * MIXTRAL_EXPERT / 1e9
    assert Budget(memory_gb=needed, expert_bytes=MIXTRAL_EXPERT).slots(32, 8, 4) == 2


def test_too_small_says_by_how_much():
    with pytest.raises(ValueError, match=r"slots_per_rank \(1\) must be at least 2 for 8 experts .* it lacks 1$"):
        Budget(slots_per_rank=1).slots(32, 8, 4)
    with pytest.raises(ValueError, match=r"memory_gb \(20\) must be at least 22\.55 .* it lacks 2\.55 GB$"):
        Budget(memory_gb=20, expert_bytes=MIXTRAL_EXPERT).slots(32, 8, 4)


@pytest.mark.parametrize("given", [11.27, 11.274, 11.2742, 11.27428])
def test_what_is_needed_prints_as_more_than_what_is_given(given):
    """It said that memory_gb (11.27) must be at least 11.27."""
    with pytest.raises(ValueError, match="must be at least") as error:
        Budget(memory_gb=given, expert_bytes=MIXTRAL_EXPERT).require(1, 32, "one expert")
    printed, needed, lacks = (float(number) for number in re.findall(r"\d+\.\d+", str(error.value)))
    assert printed == pytest.approx(given, rel=1e-5)
    assert printed < needed
    assert lacks > 0


@pytest.mark.parametrize("values", [{"slots_per_rank": 0}, {"memory_gb": -1.0}, {"memory_gb": 1.0}])
def test_values_out_of_range(values):
    with pytest.raises(ValueError, match=r"must be"):
        Budget(**values)
