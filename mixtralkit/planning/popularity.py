"""Expert popularity one layer ahead, from the experts that tokens took so far (Lina, ATC'23)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtralkit.json_file import check_ordinary
from mixtralkit.npz_file import read_arrays
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.whole_file import writing

LONGEST_PATH = 6
_FEW_BINS = 1 << 22  # counting into so many bins costs less than sorting a large trace's keys


class PathPopularity:
    """For every layer, how the choices of tokens with the same path spread over the experts.

    A path is the **first** choices of the last ``path_length`` layers, fewer where a layer has fewer before it; as a
    number it is written in base E, the latest layer last. What is counted for a path are **all** K choices of the next
    layer, so that estimates are loads. One profile serves every shorter path too.

    A path seen n times has the distribution (counts + prior · P_shorter) / (K·n + prior), with P_shorter that of the
    path without its oldest layer; the shortest is the marginal. So rare paths lean on what is known better, paths
    never seen take it over, and a prior of 0 leaves the plain frequencies.

    Args:
        keys: of each layer int64 [M], path · E + next expert, rising.
        counts: of each layer int64 [M], how often.
        prior: pseudo-counts, at least 0.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        path_length: int,
        keys: Sequence[np.ndarray],
        counts: Sequence[np.ndarray],
        prior: float = 2.0,
    ) -> None:
        _check_length(path_length, num_experts)
        if not 0 <= prior < np.inf:
            raise ValueError(f"prior ({prior}) must be a number of at least 0")
        self.num_experts, self.top_k, self.path_length = num_experts, top_k, path_length
        self.keys, self.counts, self.prior = tuple(keys), tuple(counts), prior
        self._tables = [
            _tables(keys_M, counts_M, min(path_length, layer), num_experts, prior)
            for layer, (keys_M, counts_M) in enumerate(zip(self.keys, self.counts, strict=True))
        ]

    @classmethod
    def fit(cls, trace: RoutingTrace, path_length: int = 3, prior: float = 2.0) -> PathPopularity:
        """Counts a trace's paths of up to ``path_length`` (0 … 6) layers."""
        _check_length(path_length, trace.num_experts)
        keys, counts = [], []
        paths_T = np.zeros(trace.num_tokens, np.int64)
        for layer in range(trace.num_layers):
            bins = trace.num_experts ** (min(path_length, layer) + 1)
            keys_TK = paths_T[:, None] * trace.num_experts + trace.experts[:, layer]
            found = _count(keys_TK.ravel(), None, bins)
            keys.append(found[0])
            counts.append(found[1].astype(np.int64))
            paths_T = extend_paths(paths_T, trace.experts[:, layer, 0], path_length, trace.num_experts)
        return cls(trace.num_experts, trace.top_k, path_length, keys, counts, prior)

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    def predict(self, layer: int, paths_T: np.ndarray, path_length: int | None = None) -> np.ndarray:
        """float32 [T, E], each token's chances: the expected share of every expert in its choices in ``layer``.

        Args:
            paths_T: int64, as ``extend_paths`` makes them up to the layer before.
            path_length: look at so many of these layers only; left out, all.
        """
        tables = self._tables[layer]
        length = len(tables) - 1 if path_length is None else min(path_length, len(tables) - 1)
        out_TE = np.empty((len(paths_T), self.num_experts), np.float32)
        left = np.arange(len(paths_T))
        for depth in range(length, -1, -1):
            codes = paths_T[left] % self.num_experts**depth
            rows, is_known = tables[depth].find(codes)
            out_TE[left[is_known]] = tables[depth].chances_PE[rows[is_known]]
            left = left[~is_known]
            if not len(left):
                break
        return out_TE

    def estimate(
        self, layer: int, paths_T: np.ndarray, path_length: int | None = None, keep: int | None = None
    ) -> np.ndarray:
        """float64 [E], the load that these tokens will put on the experts of ``layer``: Σ_t K · P_path(t)(e).

        Args:
            keep: count only so many likeliest experts of each path, as Lina does to keep its tables small.
        """
        paths_P, times_P = np.unique(paths_T, return_counts=True)
        chances_PE = self.predict(layer, paths_P, path_length)
        if keep is not None and keep < self.num_experts:
            limit_P = np.partition(chances_PE, -keep, axis=1)[:, -keep]
            chances_PE = np.where(chances_PE >= limit_P[:, None], chances_PE, 0)
            chances_PE /= chances_PE.sum(1, keepdims=True)
        return self.top_k * (times_P @ chances_PE.astype(np.float64))

    def save(self, path: str | Path) -> None:
        """Writes the counts as ``.npz``."""
        arrays = {f"keys_{layer}": keys for layer, keys in enumerate(self.keys)}
        arrays |= {f"counts_{layer}": counts for layer, counts in enumerate(self.counts)}
        header = {name: getattr(self, name) for name in ("num_experts", "top_k", "path_length", "num_layers", "prior")}
        with writing(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **header, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> PathPopularity:
        """Reads what ``save`` wrote; errors name the file."""
        check_ordinary(path)
        try:
            arrays = read_arrays(path)
            names = ("num_experts", "top_k", "path_length", "num_layers", "prior")
            kinds = [arrays[name].dtype.kind + "s" * arrays[name].ndim for name in names]
            if kinds[:4] != ["i"] * 4 or kinds[4] != "f":
                raise ValueError
            experts, top_k, length, layers = (int(arrays[name]) for name in names[:4])
            if not (1 <= top_k <= experts <= 32768 and layers >= 1 and len(arrays) == len(names) + 2 * layers):
                raise ValueError
            keys, counts = ([arrays[f"{name}_{i}"] for i in range(layers)] for name in ("keys", "counts"))
            for layer in range(layers):
                _check_counts(keys[layer], counts[layer], experts ** (min(length, layer) + 1))
            return cls(experts, top_k, length, keys, counts, float(arrays["prior"]))
        except (ValueError, TypeError, KeyError, OverflowError):
            raise ValueError(f"{path}: is not a popularity profile") from None


def _check_counts(keys_M: np.ndarray, counts_M: np.ndarray, bins: int) -> None:
    """ValueError unless these are rising keys below ``bins``, each with how often it was seen."""
    whole = all(np.issubdtype(array.dtype, np.integer) and array.ndim == 1 for array in (keys_M, counts_M))
    if not whole or keys_M.shape != counts_M.shape or (counts_M < 1).any() or (np.diff(keys_M) <= 0).any():
        raise ValueError
    if len(keys_M) and not 0 <= keys_M[0] <= keys_M[-1] < bins:
        raise ValueError


def extend_paths(paths_T: np.ndarray, first_T: np.ndarray, path_length: int, num_experts: int) -> np.ndarray:
    """The tokens' paths after one more layer, whose first choices are ``first_T``; paths begin as zeros, int64.

    Plain arithmetic: tensors of torch on any device will do.
    """
    return (paths_T * num_experts + first_T) % num_experts**path_length


def paths_before(trace: RoutingTrace, layer: int, path_length: int) -> np.ndarray:
    """int64 [N], the trace's paths that lead to ``layer``."""
    paths_N = np.zeros(trace.num_tokens, np.int64)
    for earlier in range(max(0, layer - path_length), layer):
        paths_N = extend_paths(paths_N, trace.experts[:, earlier, 0], path_length, trace.num_experts)
    return paths_N


def same_top(estimated_E: np.ndarray, real_E: np.ndarray, count: int) -> bool:
    """Whether the ``count`` experts with the largest estimate are those with the largest real load, in any order.

    Experts of equal real load stand for one another.
    """
    if count >= len(real_E):
        return True
    estimated_E, real_E = np.asarray(estimated_E), np.asarray(real_E)
    order = np.argsort(-estimated_E, kind="stable")
    return bool(real_E[order[:count]].min() >= real_E[order[count:]].max())


@dataclass(frozen=True, eq=False)
class Accuracy:
    """How good estimates were, by layer.

    Attributes:
        batches_L: share of batches whose estimated top-2K experts were the real ones (Lina's rule).
        tokens_L: share of tokens of which the likeliest expert by their path was one of their choices.
        baseline_L: the same for the layer's most popular expert, whatever the path.
    """

    batches_L: np.ndarray
    tokens_L: np.ndarray
    baseline_L: np.ndarray


def accuracy(
    popularity: PathPopularity,
    trace: RoutingTrace,
    batch_tokens: int,
    path_length: int | None = None,
    keep: int | None = None,
) -> Accuracy:
    """Tries a profile on a trace: batches are runs of ``batch_tokens`` rows, a shorter last one is left out.

    ``path_length`` and ``keep`` are as in ``PathPopularity.estimate``.
    """
    for name in ("num_experts", "num_layers", "top_k"):
        if getattr(popularity, name) != getattr(trace, name):
            raise ValueError(f"{name} ({getattr(trace, name)}) must be the profile's {getattr(popularity, name)}")
    if not 1 <= batch_tokens <= trace.num_tokens:
        raise ValueError(f"batch_tokens ({batch_tokens}) must lie in 1 … {trace.num_tokens}, the tokens of the trace")
    starts = range(0, trace.num_tokens - batch_tokens + 1, batch_tokens)
    right = np.zeros((3, trace.num_layers))
    for layer in range(trace.num_layers):
        paths_N, chosen_NK = paths_before(trace, layer, popularity.path_length), trace.experts[:, layer]
        for start in starts:
            rows = slice(start, start + batch_tokens)
            real_E = np.bincount(chosen_NK[rows].ravel(), minlength=trace.num_experts)
            estimated_E = popularity.estimate(layer, paths_N[rows], path_length, keep)
            right[0, layer] += same_top(estimated_E, real_E, 2 * trace.top_k) / len(starts)
        for row, length in ((1, path_length), (2, 0)):
            likeliest_N = popularity.predict(layer, paths_N, length).argmax(1)
            right[row, layer] = (chosen_NK == likeliest_N[:, None]).any(1).mean()
    return Accuracy(*right)


@dataclass(frozen=True, eq=False)
class _Table:
    """Paths of one length: codes int64 [P], rising, and their chances float32 [P, E]."""

    codes_P: np.ndarray
    chances_PE: np.ndarray

    def find(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row of each code, and whether it is there."""
        if not len(self.codes_P):
            return np.zeros(len(codes), np.int64), np.zeros(len(codes), bool)
        rows = np.minimum(np.searchsorted(self.codes_P, codes), len(self.codes_P) - 1)
        return rows, self.codes_P[rows] == codes


def _tables(keys_M: np.ndarray, counts_M: np.ndarray, length: int, experts: int, prior: float) -> list[_Table]:
    """Tables of the paths of 0 … ``length`` layers that end before a layer."""
    levels = [(keys_M, counts_M)]
    for shorter in range(length - 1, -1, -1):
        bins = experts ** (shorter + 1)
        levels.append(_count(levels[-1][0] % bins, levels[-1][1], bins))
    tables = [_Table(np.zeros(1, np.int64), np.full((1, experts), 1 / experts, np.float32))]
    for depth, (keys, counts) in enumerate(reversed(levels)):
        codes = keys // experts
        is_new = np.diff(codes, prepend=-1) != 0
        rows, codes_P = np.cumsum(is_new) - 1, codes[is_new]
        counts_PE = np.zeros((len(codes_P), experts), np.float32)
        counts_PE[rows, keys % experts] = counts
        above = tables[-1]
        known, _ = above.find(codes_P % experts ** max(depth - 1, 0))
        chances_PE = counts_PE + prior * above.chances_PE[known]
        tables.append(_Table(codes_P, chances_PE / chances_PE.sum(1, keepdims=True)))
    if not len(tables[1].codes_P):  # an empty trace
        return tables[:1]
    return tables[1:]


def _count(keys: np.ndarray, amounts: np.ndarray | None, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(distinct keys, rising; sum of their amounts, or how often they occur where there are no amounts)."""
    if bins <= _FEW_BINS:
        sums = np.bincount(keys, amounts, minlength=bins)
        found = np.flatnonzero(sums)
        return found, sums[found]
    found, index = np.unique(keys, return_inverse=True)
    return found, np.bincount(index, amounts, minlength=len(found))


def _check_length(path_length: int, num_experts: int) -> None:
    if not 0 <= path_length <= LONGEST_PATH:
        raise ValueError(f"path_length ({path_length}) must lie in 0 … {LONGEST_PATH}")
    if num_experts ** (path_length + 1) > 2**62:
        raise ValueError(f"path_length ({path_length}) is too long for num_experts ({num_experts})")
