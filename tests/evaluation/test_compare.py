"""Paired tests against scipy's and against sums by hand; folders that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test as scipy_permutation_test

from mixtralkit.evaluation.compare import as_json, compare, mcnemar, permutation_test, table
from mixtralkit.evaluation.summary import Parts


def folder(path: Path, results: list[dict], is_finished: bool = True) -> Path:
    path.mkdir()
    (path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    if is_finished:
        (path / "summary.json").write_text(json.dumps({"records": len(results)}))
    return path


def scored(scores: list[float], metric: str = "accuracy", **more) -> list[dict]:
    return [{"id": f"r{i}", "scores": {metric: score}, **more} for i, score in enumerate(scores)]


def text(id: int, logprob: float, tokens: int, size: int) -> dict:
    scores = {"nats_per_token": -logprob / tokens, "perplexity": 1.0, "bits_per_byte": 1.0}
    return {"id": id, "scores": scores, "logprob": logprob, "num_tokens": tokens, "num_bytes": size}


def means(values: list[float]) -> Parts:
    return Parts(np.array(values), np.ones(len(values)))


def mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return a.mean(axis) - b.mean(axis)


def test_mcnemar_counts_what_only_one_run_has_right():
    a, b = np.array([1.0] * 9 + [0, 1, 0]), np.array([0.0] * 8 + [1, 1, 1, 0])
    # only a: 8, only b: 1; two tails of a fair coin: 2 (C(9,0) + C(9,1)) / 2^9
    assert mcnemar(a, b) == pytest.approx(2 * 10 / 512)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1.0


def test_few_records_are_exchanged_in_every_way_as_in_scipy():
    rng = np.random.default_rng(2)
    for n in (2, 6, 9):
        a, b = rng.normal(size=n), rng.normal(0.4, size=n)
        wanted = scipy_permutation_test((a, b), mean_difference, permutation_type="samples").pvalue
        assert permutation_test(means(a), means(b)) == pytest.approx(wanted)


def test_many_records_are_exchanged_at_random():
    rng = np.random.default_rng(4)
    a = rng.normal(size=80)
    b = a + rng.normal(0.0, 0.5, size=80)
    wanted = scipy_permutation_test(
        (a, b), mean_difference, permutation_type="samples", n_resamples=50_000, rng=rng
    ).pvalue  # fmt: skip
    assert 0.01 < wanted < 0.9
    assert permutation_test(means(a), means(b)) == pytest.approx(wanted, abs=4 * (wanted / 10_000) ** 0.5)
    assert permutation_test(means(a), means(a + 5)) == pytest.approx(1 / 10_001)


def test_runs_of_one_set_are_compared_by_id_whatever_the_order(tmp_path):
    a = folder(tmp_path / "a", scored([1, 1, 0, 0, 1, 1], domain="man"))
    b = folder(tmp_path / "b", scored([1, 0, 0, 0, 0, 0], domain="man")[::-1])
    everything, group = compare(a, b)
    assert (everything.group, group.group) == (None, "domain=man")
    assert (everything.n, everything.test) == (6, "mcnemar")
    assert (everything.a, everything.b) == (pytest.approx(4 / 6), pytest.approx(1 / 6))
    assert everything.difference == pytest.approx(-0.5)
    assert everything.p == pytest.approx(0.25)  # three of three on one side: 2 / 2^3
    assert everything.low == pytest.approx(-5 / 6, abs=0.01)
    assert everything.high == pytest.approx(-1 / 6, abs=0.01)
    backwards = compare(b, a)[0]
    assert (backwards.difference, backwards.p) == (pytest.approx(0.5), everything.p)
    json.dumps(as_json([everything]), allow_nan=False)
    assert table([everything, group]).splitlines()[1].split()[:6] == [
        "all",
        "accuracy",
        "6",
        "0.6667",
        "0.1667",
        "-0.5000",
    ]


def test_texts_are_weighted_in_the_difference_too(tmp_path):
    a = folder(tmp_path / "a", [text(0, -30.0, 10, 40), text(1, -200.0, 100, 400)])
    b = folder(tmp_path / "b", [text(0, -20.0, 10, 40), text(1, -200.0, 100, 400)])
    found = {d.metric: d for d in compare(a, b)}
    assert found["nats_per_token"].difference == pytest.approx(-10 / 110)
    assert found["perplexity"].difference == pytest.approx(np.exp(2.0) - np.exp(230 / 110))
    assert found["nats_per_token"].test == "permutation"
    assert found["nats_per_token"].p == 1.0  # the difference is one record's: both exchanges of it are as large


def test_rounding_is_no_difference(tmp_path):
    logprobs = np.linspace(-200, -100, 30)
    a = folder(tmp_path / "a", [text(i, value, 50, 200) for i, value in enumerate(logprobs)])
    b = folder(tmp_path / "b", [text(i, value * (1 + 1e-7), 50, 200) for i, value in enumerate(logprobs)])
    assert [(d.difference, d.low, d.high, d.p) for d in compare(a, b)] == [(0.0, 0.0, 0.0, 1.0)] * 3


def test_one_record_has_no_interval(tmp_path):
    (found,) = compare(folder(tmp_path / "a", scored([0.2], "chrf")), folder(tmp_path / "b", scored([0.4], "chrf")))
    assert (found.low, found.high, found.p) == (None, None, 1.0)


def test_folders_that_cannot_be_compared_are_named(tmp_path):
    a = folder(tmp_path / "a", scored([1, 0]))
    with pytest.raises(ValueError, match=r"a and .*longer must have the same ids: 1 are in one only, as 'r2'"):
        compare(a, folder(tmp_path / "longer", scored([1, 0, 1])))
    with pytest.raises(ValueError, match=r"a and .*other have no metric in common"):
        compare(a, folder(tmp_path / "other", scored([1, 0], "chrf")))
    with pytest.raises(ValueError, match=r"stopped: is not a finished run \(1 results, no summary.json\)"):
        compare(a, folder(tmp_path / "stopped", scored([1]), is_finished=False))
    with pytest.raises(ValueError, match=r"missing: no such folder"):
        compare(a, tmp_path / "missing")
    cut = folder(tmp_path / "cut", scored([1, 0]))
    (cut / "results.jsonl").write_text((cut / "results.jsonl").read_text().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match=r"results.jsonl: has 1 results, not the 2 of summary.json"):
        compare(a, cut)
    (cut / "results.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: is not a scored result"):
        compare(a, cut)
