"""Two runs of one set, record by record: what differs, how surely, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from mixtralkit.evaluation.run import RESULTS, SUMMARY, read_rows
from mixtralkit.evaluation.summary import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Parts,
    Row,
    align,
    by_group,
    interval,
    metrics_of,
    resamples,
)
from mixtralkit.json_file import read_object

PERMUTATIONS = 10_000
RELATIVE_ROUNDING = 1e-5  # of a text's log-likelihood, in float32 and other batches
_BLOCK = 200  # exchanges drawn at a time


@dataclass(frozen=True)
class Difference:
    """One metric of two runs over the same ``n`` records.

    Attributes:
        difference: b - a; ``low`` and ``high`` its bootstrap interval over records, None for one record.
        test: ``"mcnemar"`` (exact; scores of 0 and 1) or ``"permutation"``.
        p: chance of a difference as large, were the runs alike.
    """

    metric: str
    group: str | None
    n: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    test: str
    p: float


def compare(folder_a: str | Path, folder_b: str | Path) -> list[Difference]:
    """Every metric that both runs have, over all records and each group; ValueError unless the ids are the same."""
    rows_a, rows_b = _rows(Path(folder_a)), _rows(Path(folder_b))
    of_b = {row.id: row for row in rows_b}
    missing = {row.id for row in rows_a} ^ set(of_b)
    if missing:
        one = next(row.id for row in (*rows_a, *rows_b) if row.id in missing)
        raise ValueError(
            f"{folder_a} and {folder_b} must have the same ids: {len(missing)} are in one only, as {one!r}"
        )
    metrics = [metric for metric in metrics_of(rows_a) if metric in metrics_of(rows_b)]
    if not metrics:
        raise ValueError(f"{folder_a} and {folder_b} have no metric in common")
    return [
        difference
        for group, own in by_group(rows_a)
        for difference in _differences(metrics, group, [(row, of_b[row.id]) for row in own])
    ]


def _rows(folder: Path) -> list[Row]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    rows = read_rows(folder / RESULTS)
    if not (folder / SUMMARY).exists():
        raise ValueError(f"{folder}: is not a finished run ({len(rows)} results, no {SUMMARY}); start it again first")
    wanted = read_object(folder / SUMMARY).get("records")
    if len(rows) != wanted:
        raise ValueError(f"{folder / RESULTS}: has {len(rows)} results, not the {wanted} of {SUMMARY}")
    return rows


def _differences(metrics: Sequence[str], group: str | None, pairs: Sequence[tuple[Row, Row]]) -> Iterator[Difference]:
    for metric in metrics:
        own = [(a, b) for a, b in pairs if metric in a.scores and metric in b.scores]
        if own:
            a, b = (Parts.of(metric, rows) for rows in zip(*own, strict=True))
            yield _difference(metric, group, a, _without_rounding(a, b))


def _without_rounding(a: Parts, b: Parts) -> Parts:
    """b with a's numbers where the two differ by rounding: the same scores in other batches are no difference."""
    is_same_N = np.isclose(a.top_N, b.top_N, rtol=RELATIVE_ROUNDING, atol=0) & (a.bottom_N == b.bottom_N)
    return replace(b, top_N=np.where(is_same_N, a.top_N, b.top_N))


def _difference(metric: str, group: str | None, a: Parts, b: Parts) -> Difference:
    n = len(a.top_N)
    low = high = None
    if n > 1:
        low, high = interval(np.concatenate([b.values(counts_RN) - a.values(counts_RN) for counts_RN in resamples(n)]))
    is_binary = all(np.isin(part.top_N, (0, 1)).all() and (part.bottom_N == 1).all() for part in (a, b))
    test, p = ("mcnemar", mcnemar(a.top_N, b.top_N)) if is_binary else ("permutation", permutation_test(a, b))
    return Difference(metric, group, n, a.value(), b.value(), b.value() - a.value(), low, high, test, p)


def mcnemar(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """The exact two-sided test of paired scores of 0 and 1: records that only one run has right are a fair coin's."""
    only_a, only_b = int((a_N > b_N).sum()), int((b_N > a_N).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def permutation_test(a: Parts, b: Parts, count: int = PERMUTATIONS, seed: int = SEED) -> float:
    """Two-sided: how often the runs differ as much when the two results of each record are exchanged at random.

    All 2^N exchanges where these are no more than ``count``, else ``count`` drawn ones and the real one. Works for
    weighted ratios too: what is exchanged is a record's result with its weight.
    """
    n = len(a.top_N)
    least = abs(b.value() - a.value()) * (1 - 1e-9) - 1e-12  # rounding must not lose the exchange that is the real one
    hits = sum(int((np.abs(_exchanged(a, b, mask_RN)) >= least).sum()) for mask_RN in _masks(n, count, seed))
    return hits / 2**n if 2**n <= count else (hits + 1) / (count + 1)


def _masks(n: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks [R, n] of 0.0 and 1.0: whether each record's results are exchanged."""
    if 2**n <= count:
        yield (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, count, _BLOCK):
        yield rng.integers(0, 2, size=(min(_BLOCK, count - start), n)).astype(np.float64)


def _exchanged(a: Parts, b: Parts, mask_RN: np.ndarray) -> np.ndarray:
    """[R] differences b - a after the exchanges."""
    mixed = []
    for one, other in ((a, b), (b, a)):
        top_R = one.top_N.sum() + mask_RN @ (other.top_N - one.top_N)
        bottom_R = one.bottom_N.sum() + mask_RN @ (other.bottom_N - one.bottom_N)
        mixed.append(np.array([one.finish(ratio) for ratio in top_R / bottom_R]))
    return mixed[1] - mixed[0]


def as_json(differences: Sequence[Difference]) -> dict[str, Any]:
    """The comparison as JSON values."""
    drawn = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "permutations": PERMUTATIONS, "seed": SEED}
    return {**drawn, "differences": [asdict(difference) for difference in differences]}


def table(differences: Sequence[Difference]) -> str:
    """The comparison as text, a metric a line."""
    rows = [("group", "metric", "n", "a", "b", "b - a", f"{CONFIDENCE:.0%} interval", "p", "test")]
    for d in differences:
        between = "" if d.low is None else f"{d.low:+.4f} … {d.high:+.4f}"
        numbers = (f"{d.a:.4f}", f"{d.b:.4f}", f"{d.difference:+.4f}", between, f"{d.p:.4f}")
        rows.append((d.group or "all", d.metric, f"{d.n:,}", *numbers, d.test))
    return align(rows, left=2)
