"""Synthetic routing has the properties it was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from mixtralkit.planning.synthetic import RoutingProcess


@pytest.mark.parametrize(("memory", "affinity"), [(1, 0.0), (1, 1.0), (2, 0.7), (3, 1.0)])
def test_transitions_keep_the_shares(memory, affinity):
    """Exactly, by following the probability of every path through the layers."""
    process = RoutingProcess.random(6, 4, 4.0, affinity, memory, seed=1)
    paths_P = process.shares_LE[0]
    for layer, next_PE in enumerate(process.next_PE):
        assert next_PE.shape == (4 ** min(layer + 1, memory), 4)
        np.testing.assert_allclose(next_PE.sum(1), 1)
        joint_PE = paths_P[:, None] * next_PE
        np.testing.assert_allclose(joint_PE.sum(0), process.shares_LE[layer + 1], atol=1e-9)
        paths_P = joint_PE.ravel()
        if layer + 1 >= memory:
            paths_P = paths_P.reshape(4, -1).sum(0)


def test_tokens_follow_shares_and_transitions():
    process = RoutingProcess.random(3, 4, 4.0, affinity=1.0, seed=2)
    trace = process.trace(40_000, seed=3)
    first = trace.first(1)
    np.testing.assert_allclose(first.loads_LE() / 40_000, process.shares_LE, atol=0.01)
    joint_LEE = process.shares_LE[:-1, :, None] * np.array(process.next_PE)
    np.testing.assert_allclose(first.transitions_LEE() / 40_000, joint_LEE, atol=0.01)


def test_later_choices_are_drawn_without_the_first():
    process = RoutingProcess.random(1, 4, 2.0, seed=4)
    trace = process.trace(60_000)
    p = process.shares_LE[0]
    expected = p + [sum(p[a] * p[e] / (1 - p[a]) for a in range(4) if a != e) for e in range(4)]
    np.testing.assert_allclose(trace.loads_LE()[0] / 60_000, expected, atol=0.01)
    assert (trace.weights[:, :, 0] >= trace.weights[:, :, 1]).all()
    np.testing.assert_allclose(trace.weights.astype(float).sum(-1), 1, atol=2e-3)


def test_repetition():
    """r + (1-r)·Σp² of the tokens repeat, and the first token of a sequence never does more than chance."""
    process = RoutingProcess.random(2, 8, repetition=[0.0, 0.4], seed=5)
    found = [layer.repetition for layer in process.trace(50_000, sequence_length=100).statistics()]
    chance = (process.shares_LE**2).sum(1)
    assert found[0] == pytest.approx(chance[0], abs=0.01)
    assert found[1] == pytest.approx(0.4 + 0.6 * chance[1], abs=0.01)


@pytest.mark.parametrize(("share", "top_k"), [(0.7, 2), (0.0, 1), (1.0, 3)])
def test_injected_share_is_exact(share, top_k):
    process = RoutingProcess.random(3, 8, affinity=0.5, repetition=0.3)
    trace = process.trace(1001, top_k, hot_expert=3, hot_share=share)
    np.testing.assert_array_equal(trace.loads_LE()[:, 3], round(share * 1001))
    assert ((trace.experts == 3).any(-1) == (trace.experts[:, :, 0] == 3)).all()


def test_seeds_and_sequences():
    process = RoutingProcess.random(2, 4, seed=6)
    a, b, c = (process.trace(100, sequence_length=30, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.experts, b.experts)
    assert (a.experts != c.experts).any()
    np.testing.assert_array_equal(a.sequence, np.arange(100) // 30)
    np.testing.assert_array_equal(a.position, np.arange(100) % 30)


def test_skew_is_as_stated():
    """Mean max/mean of Dirichlet(8, 15) shares is 1.40, of Dirichlet(8, 4) 1.81."""
    for concentration, expected in ((15, 1.40), (4, 1.81), (np.inf, 1.0)):
        shares = RoutingProcess.random(2000, 8, concentration).shares_LE
        assert (shares.max(1) * 8).mean() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("process", "trace", "message"),
    [
        ({"affinity": 1.5}, {}, r"affinity \(1.5\) must lie in 0 … 1"),
        ({"concentration": 0}, {}, r"concentration \(0\) must be above 0"),
        ({"memory": 9}, {}, r"memory \(9\) must be at least 1"),
        ({"repetition": 1.0}, {}, r"repetition \(1.0\) must lie in 0 … 1"),
        ({}, {"top_k": 9}, r"top_k \(9\) must lie in 1 … 8"),
        ({}, {"top_k": 8, "hot_share": 0.5}, r"top_k \(8\) must lie in 1 … 7"),
        ({}, {"hot_share": 1.5}, r"hot_share \(1.5\) must lie in 0 … 1"),
    ],
)
def test_refusals(process, trace, message):
    with pytest.raises(ValueError, match=message):
        RoutingProcess.random(2, 8, **process).trace(10, **trace)
