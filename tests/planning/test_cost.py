"""The shadow model's figures by hand, and its choice against the formula written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixtralkit.planning.cost import ShadowModel, choose_shadows

PAPER = ShadowModel.for_training(d_model=2048, alpha=2, net_bandwidth=6.25e9, gpu_throughput=11.5e12)
MIXTRAL = ShadowModel.for_inference(d_model=4096, alpha=3.5, net_bandwidth=6.25e9, gpu_throughput=11.5e12)


def test_times_of_the_paper():
    """3 · 4·B·αH²/P + 4·B·H/W for a row, 2αH²/W for a shadow, four bytes a number."""
    assert PAPER.s_per_row == pytest.approx(3 * 4 * 2 * 2048**2 / 11.5e12 + 4 * 2048 * 4 / 6.25e9)
    assert PAPER.s_per_shadow == pytest.approx(2 * 2 * 2048**2 * 4 / 6.25e9)


def test_times_of_mixtral_inference():
    assert MIXTRAL.s_per_row == pytest.approx(3 * 2 * 4096 * 14336 / 11.5e12 + 2 * 4096 * 2 / 6.25e9)
    assert MIXTRAL.s_per_shadow * MIXTRAL.net_bandwidth == pytest.approx(352.3e6, rel=1e-3)


def test_a_mixtral_shadow_breaks_even_on_the_wire_near_21500_rows():
    """Three matrices of 4096 × 14336 against a row of 4096 out and back: 3 · 14336 / 2 rows, at any bandwidth."""
    free_compute = ShadowModel.for_inference(4096, 3.5, net_bandwidth=6.25e9, gpu_throughput=1e30)
    assert choose_shadows([21_505, 0], free_compute) == (0,)
    assert choose_shadows([21_503, 0], free_compute) == ()


def test_loads_are_those_of_experts_and_not_of_source_ranks():
    """FastMoE's shadow policy adds its [source rank][expert] counts over the experts instead of the ranks.

    Its sums are then the rows each rank has, and their places rank numbers that it takes for expert ids. Ranks with
    equal batches look balanced, so that nothing is ever shadowed; the hottest expert goes unseen. With 8 ranks and
    70% of the rows to expert 3 the answer is exactly {3}.
    """
    counts_WE = np.full((8, 8), 44)
    counts_WE[:, 3] = 716  # of 1024 rows on each rank
    assert choose_shadows(counts_WE.sum(0).tolist(), PAPER) == (3,)
    assert choose_shadows(counts_WE.sum(1).tolist(), PAPER) == ()
    counts_WE[5] *= 3  # a rank with more rows would be shadowed as if it were expert 5
    assert choose_shadows(counts_WE.sum(0).tolist(), PAPER) == (3,)
    assert choose_shadows(counts_WE.sum(1).tolist(), PAPER) == (5,)


def test_equal_loads_are_not_shadowed():
    assert choose_shadows([10**6] * 8, PAPER) == ()


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_where_the_predicted_time_stops_to_fall(seed):
    loads_E = np.random.default_rng(seed).pareto(1.0, 16) * 2000
    falling = [*sorted(loads_E, reverse=True), 0.0]
    times = [PAPER.s_per_row * falling[r] + r * PAPER.s_per_shadow for r in range(17)]
    chosen = choose_shadows(loads_E.tolist(), PAPER)
    taken = len(chosen)
    assert all(later < now for now, later in itertools.pairwise(times[: taken + 1]))
    assert taken == 16 or times[taken + 1] >= times[taken]
    assert list(chosen) == np.argsort(-loads_E)[:taken].tolist()


def test_residents_cost_nothing_and_those_with_rows_are_always_taken():
    small = [5, 40, 0, 30]
    assert choose_shadows(small, PAPER) == ()
    assert choose_shadows(small, PAPER, resident={0, 1, 2}) == (1, 0)


def test_a_resident_does_not_hide_the_expert_behind_it():
    """The lead that pays for a broadcast is over the next expert that is not at home already."""
    loads_E = [10_000, 9_990, 10]
    assert choose_shadows(loads_E, PAPER) == ()
    assert choose_shadows(loads_E, PAPER, resident={0}) == (0, 1)


def test_most_limits_what_is_broadcast_and_not_the_residents():
    loads_E = [40_000, 30_000, 20_000, 10_000]
    assert choose_shadows(loads_E, PAPER) == (0, 1, 2, 3)
    assert choose_shadows(loads_E, PAPER, most=1) == (0,)
    assert choose_shadows(loads_E, PAPER, resident=[3], most=1) == (0, 3)


def test_no_rows_no_shadows():
    assert choose_shadows([0] * 8, PAPER) == ()
    assert choose_shadows([], PAPER) == ()


@pytest.mark.parametrize("field", ["d_model", "alpha", "net_bandwidth", "gpu_throughput", "data_bytes"])
def test_a_figure_of_zero_is_named(field):
    figures = {"d_model": 8, "alpha": 2.0, "net_bandwidth": 1.0, "gpu_throughput": 1.0, "data_bytes": 4, field: 0}
    with pytest.raises(ValueError, match=rf"{field} \(0\) must be a number above 0"):
        ShadowModel.for_inference(**figures)
