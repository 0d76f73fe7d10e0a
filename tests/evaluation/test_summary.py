"""Means, weighted ratios and their bootstrap intervals against scipy's bootstrap and sums by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from mixtralkit.evaluation.summary import Measure, Parts, Row, as_json, resamples, summarise, table


def rows_of(scores: list[float], metric: str = "accuracy") -> list[Row]:
    return [Row(i, {metric: score}) for i, score in enumerate(scores)]


def text_row(id: int, logprob: float, tokens: int, size: int, domain: str | None = None) -> Row:
    names = {"domain": domain} if domain else {}
    scores = {"nats_per_token": 0, "perplexity": 0, "bits_per_byte": 0}  # not read: the sums are
    return Row.of({"id": id, "scores": scores, "logprob": logprob, "num_tokens": tokens, "num_bytes": size, **names})


def test_resamples_are_what_drawing_with_replacement_gives():
    counts_RN = np.concatenate(list(resamples(5, 250)))
    assert counts_RN.shape == (250, 5)
    assert (counts_RN.sum(1) == 5).all()
    # a record is missing from a sample with chance (4/5)^5 = 0.328; 1,250 draws, so 0.328 ± 0.05 is four deviations
    assert (counts_RN == 0).mean() == pytest.approx(0.8**5, abs=0.05)


def test_the_interval_is_scipys_percentile_bootstrap():
    scores = np.random.default_rng(3).beta(2, 5, size=60)
    (measure,) = summarise(rows_of(scores.tolist(), "chrf"))
    found = bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    assert measure.value == pytest.approx(scores.mean())
    assert measure.n == 60
    width = found.confidence_interval.high - found.confidence_interval.low
    assert measure.low == pytest.approx(found.confidence_interval.low, abs=0.06 * width)
    assert measure.high == pytest.approx(found.confidence_interval.high, abs=0.06 * width)


def test_texts_are_weighted_by_their_tokens_and_bytes_and_resampled_as_texts():
    rng = np.random.default_rng(5)
    tokens = rng.integers(5, 300, size=40)
    sizes, logprobs = 4 * tokens, -rng.uniform(1, 4, size=40) * tokens
    rows = [
        text_row(i, *values)
        for i, values in enumerate(zip(logprobs.tolist(), tokens.tolist(), sizes.tolist(), strict=True))
    ]
    found = {measure.metric: measure for measure in summarise(rows)}
    nats = -logprobs.sum() / tokens.sum()
    assert found["nats_per_token"].value == pytest.approx(nats)
    assert found["perplexity"].value == pytest.approx(math.exp(nats))
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / 4)

    def ratio(top, bottom, axis=-1):
        return -top.sum(axis) / bottom.sum(axis)

    wanted = bootstrap(
        (logprobs, tokens), ratio, paired=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = wanted.high - wanted.low
    assert found["nats_per_token"].low == pytest.approx(wanted.low, abs=0.06 * width)
    assert found["nats_per_token"].high == pytest.approx(wanted.high, abs=0.06 * width)
    assert found["perplexity"].low == pytest.approx(math.exp(found["nats_per_token"].low), rel=1e-3)


def test_groups_have_lines_of_their_own_and_one_record_has_no_interval():
    rows = [
        Row.of({"id": 0, "scores": {"accuracy": 1.0}, "domain": "man", "task": 7}),
        Row.of({"id": 1, "scores": {"accuracy": 0.0}, "domain": "man"}),
        Row.of({"id": 2, "scores": {"chrf": 0.5}, "domain": "docs"}),
    ]
    found = [(m.group, m.metric, m.n, m.value) for m in summarise(rows)]
    assert found == [
        (None, "accuracy", 2, 0.5),
        (None, "chrf", 1, 0.5),
        ("task=7", "accuracy", 1, 1.0),
        ("domain=docs", "chrf", 1, 0.5),
        ("domain=man", "accuracy", 2, 0.5),
    ]
    assert [m.low is None for m in summarise(rows)] == [False, True, True, True, False]


def test_equal_scores_have_an_interval_of_no_width():
    (measure,) = summarise(rows_of([1.0] * 5))
    assert (measure.value, measure.low, measure.high) == (1.0, 1.0, 1.0)


def test_a_records_own_keys_do_not_weigh():
    row = Row.of({"id": 0, "scores": {"accuracy": 1.0}, "logprob": "mine", "num_tokens": None})
    assert (row.logprob, row.num_tokens) == (None, None)
    assert Parts.of("accuracy", [row]).value() == 1.0


def test_a_hopeless_models_perplexity_is_a_number():
    measures = summarise([text_row(0, -1e6, 10, 10), text_row(1, -2e6, 10, 10)])
    json.dumps(as_json(measures), allow_nan=False)


def test_the_table_and_the_json_say_the_same():
    measures = [Measure("accuracy", None, 1200, 0.25, 0.2, 0.3), Measure("accuracy", "domain=man", 1, 1.0, None, None)]
    assert table(measures).splitlines() == [
        "group       metric        n   value     95% interval",
        "all         accuracy  1,200  0.2500  0.2000 … 0.3000",
        "domain=man  accuracy      1  1.0000",
    ]
    first = as_json(measures)["measures"][0]
    assert first == {"metric": "accuracy", "group": None, "n": 1200, "value": 0.25, "low": 0.2, "high": 0.3}
