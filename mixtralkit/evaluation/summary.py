"""Many scores as one line each: means or weighted ratios, with bootstrap confidence intervals, by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np

from mixtralkit.evaluation.scoring import PERPLEXITY, TEXT_METRICS, perplexity
from mixtralkit.json_file import Positive, conform

GROUP_KEYS = ("task", "domain")
RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
_BLOCK = 100  # resamples drawn at a time


@dataclass(frozen=True)
class Row:
    """What of one line of results counts.

    Attributes:
        scores: by metric.
        groups: (key, name) of each of ``GROUP_KEYS`` that the record has.
        logprob, num_tokens, num_bytes: of a text, which weigh it; else None.
    """

    id: int | str
    scores: Mapping[str, float]
    groups: tuple[tuple[str, str], ...] = ()
    logprob: float | None = None
    num_tokens: int | None = None
    num_bytes: int | None = None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Row:
        """From a line of results; ValueError where it is none."""
        said = conform(result, _Scored)
        groups = tuple((key, str(result[key])) for key in GROUP_KEYS if result.get(key) is not None)
        if not set(said.scores) & set(TEXT_METRICS):  # then keys of these names are the record's own
            return cls(said.id, said.scores, groups)
        text = conform(result, _ScoredText)
        return cls(said.id, said.scores, groups, text.logprob, text.num_tokens, text.num_bytes)


class _Scored(msgspec.Struct):
    id: int | str
    scores: dict[str, float]


class _ScoredText(msgspec.Struct):
    logprob: float
    num_tokens: Positive
    num_bytes: Positive


@dataclass(frozen=True, eq=False)
class Parts:
    """A metric as sums over N records: ``finish(top_N.sum() / bottom_N.sum())``."""

    top_N: np.ndarray
    bottom_N: np.ndarray
    finish: Callable[[float], float] = float

    @classmethod
    def of(cls, metric: str, rows: Sequence[Row]) -> Parts:
        """Means of scores; nats per token weighted by tokens, perplexity e to that, bits per byte weighted by bytes."""
        if metric not in TEXT_METRICS:
            return cls(np.array([row.scores[metric] for row in rows], np.float64), np.ones(len(rows)))
        nats_N = -np.array([row.logprob for row in rows], np.float64)
        if metric == "bits_per_byte":
            return cls(nats_N / math.log(2), np.array([row.num_bytes for row in rows], np.float64))
        tokens_N = np.array([row.num_tokens for row in rows], np.float64)
        return cls(nats_N, tokens_N, perplexity if metric == PERPLEXITY else float)

    def value(self) -> float:
        """Over all records."""
        return self.finish(math.fsum(self.top_N) / math.fsum(self.bottom_N))

    def values(self, counts_RN: np.ndarray) -> np.ndarray:
        """[R], the value for each row of counts, which says how often each record is in."""
        ratios_R = (counts_RN @ self.top_N) / (counts_RN @ self.bottom_N)
        return np.array([self.finish(ratio) for ratio in ratios_R])


@dataclass(frozen=True)
class Measure:
    """One line of a summary: the value of ``metric`` over ``n`` records, and its interval (None for one record)."""

    metric: str
    group: str | None
    n: int
    value: float
    low: float | None
    high: float | None


def resamples(n: int, count: int = RESAMPLES, seed: int = SEED) -> Iterator[np.ndarray]:
    """Blocks [≤ 100, n] of how often each of ``n`` records is in a bootstrap sample, ``count`` samples in all."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, _BLOCK):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(_BLOCK, count - start)).astype(np.float64)


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """The percentile interval of resampled values."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return float(low), float(high)


def by_group(rows: Sequence[Row]) -> Iterator[tuple[str | None, list[Row]]]:
    """All rows under None, then those of each group as ``domain=man``, keys in ``GROUP_KEYS``' order, names sorted."""
    yield None, list(rows)
    for key in GROUP_KEYS:
        for name in sorted({name for row in rows for k, name in row.groups if k == key}):
            yield f"{key}={name}", [row for row in rows if (key, name) in row.groups]


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Metrics of the rows, in the order of their first appearance."""
    return list(dict.fromkeys(metric for row in rows for metric in row.scores))


def summarise(rows: Sequence[Row]) -> list[Measure]:
    """Every metric over all rows that have it, and over those of each group."""
    return [measure for group, own in by_group(rows) for measure in _measures(group, own)]


def _measures(group: str | None, rows: Sequence[Row]) -> Iterator[Measure]:
    """Metrics of the same rows are resampled together, for drawing is what costs."""
    together: dict[tuple[int, ...], list[str]] = {}
    for metric in metrics_of(rows):
        have = tuple(i for i, row in enumerate(rows) if metric in row.scores)
        together.setdefault(have, []).append(metric)
    for have, metrics in together.items():
        own = [rows[i] for i in have]
        parts = [Parts.of(metric, own) for metric in metrics]
        bounds: list[tuple[float | None, float | None]] = [(None, None)] * len(parts)
        if len(own) > 1:
            drawn = [[part.values(counts_RN) for part in parts] for counts_RN in resamples(len(own))]
            bounds = [interval(np.concatenate(blocks)) for blocks in zip(*drawn, strict=True)]
        for metric, part, (low, high) in zip(metrics, parts, bounds, strict=True):
            yield Measure(metric, group, len(own), part.value(), low, high)


def as_json(measures: Sequence[Measure]) -> dict[str, Any]:
    """The summary as JSON values."""
    return {
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "measures": [asdict(measure) for measure in measures],
    }


def table(measures: Sequence[Measure]) -> str:
    """The summary as text, a metric a line."""
    rows = [("group", "metric", "n", "value", f"{CONFIDENCE:.0%} interval")]
    for m in measures:
        between = "" if m.low is None else f"{m.low:.4f} … {m.high:.4f}"
        rows.append((m.group or "all", m.metric, f"{m.n:,}", f"{m.value:.4f}", between))
    return align(rows, left=2)


def align(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns of equal width, the first ``left`` of them flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
