"""Popularity by path: plain counting as oracle, convergence to a known process, accuracy that rises with memory."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from mixtralkit.planning.popularity import PathPopularity, accuracy, extend_paths, paths_before, same_top
from mixtralkit.planning.synthetic import RoutingProcess
from mixtralkit.planning.trace import RoutingTrace


@pytest.fixture(scope="module")
def process() -> RoutingProcess:
    """Each layer depends on the three before it."""
    return RoutingProcess.random(6, 4, concentration=8.0, affinity=1.0, memory=3, seed=3)


@pytest.fixture(scope="module")
def trace(process) -> RoutingTrace:
    return process.trace(3_000, seed=1)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 6])
def test_frequencies_are_those_of_a_loop(trace, length):
    popularity = PathPopularity.fit(trace, length, prior=0.0)
    for layer in range(trace.num_layers):
        seen = defaultdict(Counter)
        paths = [tuple(token[max(0, layer - length) : layer, 0]) for token in trace.experts]
        for path, token in zip(paths, trace.experts, strict=True):
            seen[path].update(token[layer].tolist())
        expected = [[seen[path][e] / seen[path].total() for e in range(4)] for path in paths]
        codes = paths_before(trace, layer, length)
        np.testing.assert_allclose(popularity.predict(layer, codes), expected, rtol=1e-5)
        np.testing.assert_allclose(popularity.estimate(layer, codes), trace.loads_LE()[layer], rtol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_profile_serves_shorter_paths(trace, length):
    long, short = PathPopularity.fit(trace, 4), PathPopularity.fit(trace, length)
    for layer in range(trace.num_layers):
        found = long.predict(layer, paths_before(trace, layer, 4), length)
        np.testing.assert_allclose(found, short.predict(layer, paths_before(trace, layer, length)), rtol=1e-5)


def test_converges_to_the_known_transitions(process):
    """The first choice alone, so that chances are the process's own; the error falls as 1/sqrt(tokens)."""
    errors = []
    for tokens in (2_000, 32_000):
        popularity = PathPopularity.fit(process.trace(tokens, top_k=1), 3, prior=0.0)
        wrong = []
        for layer, next_PE in enumerate(process.next_PE, 1):
            paths = paths_before(process.trace(4_000, top_k=1, seed=9), layer, 3)
            wrong.append(np.abs(popularity.predict(layer, paths) - next_PE[paths]).mean())
        errors.append(np.mean(wrong))
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


def test_accuracy_rises_up_to_the_memory(process):
    fitted = PathPopularity.fit(process.trace(60_000, top_k=1), 5)
    test = process.trace(20_000, top_k=1, seed=8)
    tried = [accuracy(fitted, test, 50, length) for length in range(6)]
    tokens = [found.tokens_L[3:].mean() for found in tried]
    batches = [found.batches_L[3:].mean() for found in tried]
    assert (np.diff(tokens[:4]) > [0.005, 0.03, 0.03]).all()
    assert (np.diff(batches[:4]) > 0).all()
    assert tokens[5] == pytest.approx(tokens[3], abs=0.01)  # the process remembers no more
    np.testing.assert_array_equal(tried[0].tokens_L, tried[3].baseline_L)
    best = [np.max(next_PE, 1)[paths_before(test, i, 3)].mean() for i, next_PE in enumerate(process.next_PE, 1)]
    assert tokens[3] == pytest.approx(np.mean(best[2:]), abs=0.01)  # the most that any predictor can do


def test_prior_leans_on_the_shorter_path():
    """Worked by hand: path 0 goes to expert 1 once, path 1 to expert 2 three times."""
    trace = RoutingTrace(np.array([[0, 1], [1, 2], [1, 2], [1, 2]])[:, :, None], 3)
    popularity = PathPopularity.fit(trace, 1, prior=2.0)
    marginal = (np.array([0, 1, 3]) + 2 / 3) / 6
    np.testing.assert_allclose(popularity.predict(1, np.array([0]))[0], (np.array([0, 1, 0]) + 2 * marginal) / 3)
    np.testing.assert_allclose(popularity.predict(1, np.array([2]))[0], marginal, rtol=1e-6)  # never seen


def test_keeping_the_likeliest_experts(trace):
    popularity = PathPopularity.fit(trace, 2, prior=0.0)
    codes = paths_before(trace, 4, 2)[:50]
    chances = popularity.predict(4, codes).astype(np.float64)
    chances[np.arange(50)[:, None], np.argsort(chances, 1)[:, :2]] = 0
    expected = 2 * (chances / chances.sum(1, keepdims=True)).sum(0)
    np.testing.assert_allclose(popularity.estimate(4, codes, keep=2), expected, rtol=1e-5)


def test_paths_grow_on_tensors_too(trace):
    codes = torch.zeros(trace.num_tokens, dtype=torch.int64)
    for layer in range(5):
        assert codes.tolist() == paths_before(trace, layer, 2).tolist()
        codes = extend_paths(codes, torch.from_numpy(trace.experts[:, layer, 0].astype(np.int64)), 2, 4)


def test_many_experts_need_no_dense_tables():
    trace = RoutingProcess.random(8, 256, memory=1, affinity=0.5).trace(500, top_k=8)
    popularity = PathPopularity.fit(trace, 6, prior=0.0)
    np.testing.assert_allclose(popularity.estimate(7, paths_before(trace, 7, 6)), trace.loads_LE()[7], rtol=1e-4)


def test_same_top():
    real = np.array([5, 3, 3, 1])
    assert same_top(np.array([9.0, 8, 1, 0]), real, 2)
    assert same_top(np.array([9.0, 1, 8, 0]), real, 2)  # experts 1 and 2 stand for one another
    assert not same_top(np.array([9.0, 1, 0, 8]), real, 2)
    assert same_top(np.array([0.0, 1, 2, 3]), real, 4)


def test_file_round_trip(trace, tmp_path):
    popularity = PathPopularity.fit(trace, 3)
    popularity.save(tmp_path / "profile")
    loaded = PathPopularity.load(tmp_path / "profile")
    codes = paths_before(trace, 5, 3)
    np.testing.assert_array_equal(loaded.predict(5, codes), popularity.predict(5, codes))
    assert (loaded.top_k, loaded.path_length, loaded.num_layers) == (2, 3, 6)


def test_refusals(trace, tmp_path):
    popularity = PathPopularity.fit(trace, 1)
    with pytest.raises(ValueError, match=r"path_length \(7\) must lie in 0 … 6"):
        PathPopularity.fit(trace, 7)
    with pytest.raises(ValueError, match=r"prior \(nan\) must be a number of at least 0"):
        PathPopularity.fit(trace, 1, float("nan"))
    with pytest.raises(ValueError, match=r"top_k \(1\) must be the profile's 2"):
        accuracy(popularity, trace.first(1), 10)
    with pytest.raises(ValueError, match=r"batch_tokens \(4000\) must lie in 1 … 3000"):
        accuracy(popularity, trace, 4000)
    trace.save(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match=r"trace.npz: is not a popularity profile"):
        PathPopularity.load(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match="absent: cannot be read"):
        PathPopularity.load(tmp_path / "absent")


def test_an_empty_trace_predicts_evenly():
    popularity = PathPopularity.fit(RoutingTrace(np.zeros((0, 2, 1), int), 4), 1)
    np.testing.assert_array_equal(popularity.predict(1, np.array([3])), np.full((1, 4), 0.25))
