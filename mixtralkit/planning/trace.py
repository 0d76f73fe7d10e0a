"""RoutingTrace: which experts every token took in every layer, kept in ``.npz`` and read from other systems' files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixtralkit.config.model import check_experts
from mixtralkit.json_file import conform, naming, parse_json, shown
from mixtralkit.npz_file import read_arrays
from mixtralkit.planning.recordings import is_recording, read_recording
from mixtralkit.planning.trace_parts import check_replaceable, parts_of, read_parts
from mixtralkit.whole_file import writing

_MOST_TRANSITIONS = 1 << 27  # 1 GiB of them


@dataclass(frozen=True)
class LayerStatistics:
    """How evenly one layer uses its experts.

    Attributes:
        load_E: choices of each expert.
        max_over_mean, mean_over_max: the busiest expert's load against the mean, and the inverse; 1 is even.
        entropy: of the loads, bits; log2(E) is even.
        repetition: share of tokens with the same first choice as the token before them in their sequence; NaN where
            no token has one. 1/E is what chance gives under even loads.
    """

    load_E: tuple[int, ...]
    max_over_mean: float
    mean_over_max: float
    entropy: float
    repetition: float


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing of N tokens through L layers, K experts each; the arrays are read-only.

    Attributes:
        experts: int16 [N, L, K], ids 0 … num_experts-1, by falling weight; a token takes no expert twice.
        num_experts: logical experts E.
        weights: float16 [N, L, K] of these choices, or None where they are not known.
        sequence: int32 [N], which sequence a token belongs to; None makes all tokens one sequence.
        position: int32 [N], a token's place in its sequence; None counts the sequence's rows.
        meta: JSON values worth keeping: model, prompts, commit.
    """

    experts: np.ndarray
    num_experts: int
    weights: np.ndarray | None = None
    sequence: np.ndarray | None = None
    position: np.ndarray | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        experts = np.asarray(self.experts)
        if experts.ndim != 3 or 0 in experts.shape[1:] or not np.issubdtype(experts.dtype, np.integer):
            raise ValueError(
                f"experts (shape {experts.shape}, {experts.dtype}) must be whole numbers [tokens, layers, top_k]"
            )
        limit = np.iinfo(np.int16).max + 1
        if isinstance(self.num_experts, bool) or not isinstance(self.num_experts, int | np.integer):
            raise ValueError(f"num_experts ({shown(self.num_experts)}) must be a whole number")
        if not experts.shape[2] <= self.num_experts <= limit:
            raise ValueError(f"num_experts ({self.num_experts}) must lie in {experts.shape[2]} (top_k) … {limit}")
        object.__setattr__(self, "num_experts", int(self.num_experts))
        check_experts(experts.shape[1], self.num_experts)
        _check_ids(experts, self.num_experts)
        self._keep("experts", experts.astype(np.int16, copy=False))
        if self.weights is not None:
            self._keep("weights", _checked_weights(self.weights, experts.shape))
        rows = len(experts)
        sequence = np.zeros(rows, np.int32) if self.sequence is None else _column("sequence", self.sequence, rows)
        self._keep("sequence", sequence)
        position = _places(sequence) if self.position is None else _column("position", self.position, rows)
        self._keep("position", position)

    def _keep(self, name: str, array: np.ndarray) -> None:
        view = array.view()
        view.flags.writeable = False
        object.__setattr__(self, name, view)

    @property
    def num_tokens(self) -> int:
        return self.experts.shape[0]

    @property
    def num_layers(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    def first(self, k: int) -> RoutingTrace:
        """The same trace with each token's first k choices only, their weights scaled to sum to 1."""
        if not 1 <= k <= self.top_k:
            raise ValueError(f"k ({k}) must lie in 1 … {self.top_k} (top_k)")
        weights = None
        if self.weights is not None:
            weights = self.weights[:, :, :k].astype(np.float32)
            weights /= np.maximum(weights.sum(-1, keepdims=True), np.float32(1e-9))
        return self._with(self.experts[:, :, :k], weights, slice(None))

    def take(self, rows: np.ndarray | slice) -> RoutingTrace:
        """The tokens of these rows (indices, mask or slice), in that order."""
        weights = None if self.weights is None else self.weights[rows]
        return self._with(self.experts[rows], weights, rows)

    def _with(self, experts: np.ndarray, weights: np.ndarray | None, rows: np.ndarray | slice) -> RoutingTrace:
        return RoutingTrace(experts, self.num_experts, weights, self.sequence[rows], self.position[rows], self.meta)

    def loads_LE(self, weighted: bool = False) -> np.ndarray:
        """int64 [L, E], how often each expert was chosen, every choice counted; ``weighted``: float64 sums of the
        gate's weights instead."""
        if weighted and self.weights is None:
            raise ValueError("the trace has no weights, so its loads can only be counted")
        loads = [
            np.bincount(
                self.experts[:, layer].ravel(),
                weights=self.weights[:, layer].ravel() if weighted else None,
                minlength=self.num_experts,
            )
            for layer in range(self.num_layers)
        ]
        return np.stack(loads)

    def transitions_LEE(self, weighted: bool = True) -> np.ndarray:
        """float64 [L-1, E, E], how much of the tokens goes from expert a of layer l to expert b of layer l+1.

        A token adds w_l(a)·w_{l+1}(b) to every pair (a, b) of its choices: 1 in all for each pair of layers, so that
        sums over pairs on different ranks are crossings. w is the gate's weight, or 1/K for every choice where the
        trace has no weights or ``weighted`` is false.
        """
        layers, experts = self.num_layers, self.num_experts
        if layers * experts**2 > _MOST_TRANSITIONS:
            raise ValueError(f"num_experts ({experts}) in {layers} layers are too many for tables of pairs of them")
        transitions = np.zeros((layers - 1, experts * experts))
        following = self._layer(0, weighted)
        for layer in range(layers - 1):
            (ids, shares), following = following, self._layer(layer + 1, weighted)
            next_ids, next_shares = following
            for i in range(self.top_k):
                for j in range(self.top_k):
                    pairs = ids[:, i] * experts + next_ids[:, j]
                    amounts = shares[:, i] * next_shares[:, j]
                    transitions[layer] += np.bincount(pairs, amounts, minlength=experts * experts)
        return transitions.reshape(layers - 1, experts, experts)

    def _layer(self, layer: int, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [N, K] and shares float32 [N, K] of a layer, the shares of a token summing to 1."""
        ids = self.experts[:, layer].astype(np.int64)
        if not weighted or self.weights is None:
            return ids, np.full(ids.shape, 1 / self.top_k, np.float32)
        shares = self.weights[:, layer].astype(np.float32)
        total = shares.sum(-1, keepdims=True)
        return ids, np.where(total > 0, shares / np.where(total > 0, total, 1), 1 / self.top_k)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[RoutingTrace, RoutingTrace]:
        """Two parts, the first with about ``fraction`` of the tokens, no sequence in both.

        Whole sequences go to one part, drawn with ``seed``. A trace of one sequence is cut at a position instead.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction ({fraction}) must lie between 0 and 1")
        if self.num_tokens < 2:
            raise ValueError(f"a trace of {self.num_tokens} tokens cannot be split")
        ids, of_row, lengths = np.unique(self.sequence, return_inverse=True, return_counts=True)
        if len(ids) == 1:
            order = np.argsort(self.position, kind="stable")
            cut = min(max(round(fraction * self.num_tokens), 1), self.num_tokens - 1)
            return self.take(order[:cut]), self.take(order[cut:])
        drawn = np.random.default_rng(seed).permutation(len(ids))
        ends = np.cumsum(lengths[drawn])
        count = 1 + int(np.abs(ends[:-1] - fraction * self.num_tokens).argmin())
        is_first = np.zeros(len(ids), bool)
        is_first[drawn[:count]] = True
        return self.take(is_first[of_row]), self.take(~is_first[of_row])

    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (before, after): int64 [M] each, of all tokens that follow one another in a sequence."""
        order = np.lexsort((self.position, self.sequence))
        before, after = order[:-1], order[1:]
        same = self.sequence[before] == self.sequence[after]
        next_to = self.position[before].astype(np.int64) + 1 == self.position[after]
        return before[same & next_to], after[same & next_to]

    def statistics(self) -> list[LayerStatistics]:
        """Load, balance and repetition of every layer."""
        before, after = self.neighbours()
        chosen = self.experts[:, :, 0]
        found = []
        for layer, load_E in enumerate(self.loads_LE()):
            mean, most = load_E.mean(), load_E.max()
            shares = load_E[load_E > 0] / max(load_E.sum(), 1)
            same = chosen[before, layer] == chosen[after, layer]
            found.append(
                LayerStatistics(
                    tuple(load_E.tolist()),
                    float(most / mean) if most else 1.0,
                    float(mean / most) if most else 1.0,
                    float(-(shares * np.log2(shares)).sum()) + 0.0,
                    float(same.mean()) if len(same) else float("nan"),
                )
            )
        return found

    def save(self, path: str | Path) -> None:
        """Writes the trace as ``.npz`` (``docs/traces.md``), whole or not at all."""
        check_replaceable(path)
        arrays = {"experts": self.experts, "sequence": self.sequence, "position": self.position}
        if self.weights is not None:
            arrays["weights"] = self.weights
        with writing(path) as unfinished, open(unfinished, "wb") as file:  # numpy would add a suffix to a name
            np.savez(file, **arrays, num_experts=self.num_experts, meta=json.dumps(dict(self.meta)))

    @classmethod
    def load(cls, path: str | Path, num_experts: int | None = None) -> RoutingTrace:
        """Reads a trace; errors name the file.

        Also ``.npy`` of whole numbers, [tokens, layers] (ExFlow) or [tokens, layers, top_k] (vLLM's routed experts),
        ``.npz`` with one such array for every sequence, and SGLang's ``per_token`` recordings (``load_routing``). A
        trace whose recording was stopped is read from its parts.

        Args:
            num_experts: experts of the model, for files that do not say; left out, the highest id decides, with a
                warning. Where the file says it, both must agree.
        """
        if is_recording(path):
            trace, _ = load_routing(path, num_experts)
            if trace is None:
                raise ValueError(f"{path}: has loads alone, to plan from; here the routing of each token is needed")
            return trace
        with naming(path):
            parts = [] if Path(path).exists() else parts_of(path)
            arrays = read_parts(parts) if parts else read_arrays(path)
            if "experts" in arrays:
                return _own(cls, arrays, num_experts)
            if set(arrays) & {"weights", "sequence", "position"}:
                raise ValueError(f"experts are missing; it has {', '.join(arrays)}")
            return _foreign(cls, list(arrays.values()), num_experts)

    @classmethod
    def from_parts(cls, path: str | Path) -> RoutingTrace:
        """Reads what the ranks have recorded so far of the trace at ``path``; errors name it."""
        with naming(path):
            return _own(cls, read_parts(parts_of(path)), None)

    @classmethod
    def concatenate(cls, parts: list[RoutingTrace]) -> RoutingTrace:
        """One trace after the other, sequences renumbered so that none of different parts is the same; the first
        part's meta."""
        first = parts[0]
        for part in parts:
            for name in ("num_experts", "num_layers", "top_k"):
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(f"{name} ({getattr(part, name)}) must be {getattr(first, name)} in every part")
        has_weights = all(part.weights is not None for part in parts)
        sequences, start = [], 0
        for part in parts:
            ids, of_row = np.unique(part.sequence, return_inverse=True)
            sequences.append(of_row + start)
            start += len(ids)
        return cls(
            np.concatenate([part.experts for part in parts]),
            first.num_experts,
            np.concatenate([part.weights for part in parts]) if has_weights else None,
            np.concatenate(sequences),
            np.concatenate([part.position for part in parts]),
            first.meta,
        )


def load_routing(path: str | Path, num_experts: int | None = None) -> tuple[RoutingTrace | None, np.ndarray]:
    """The trace, and float64 loads [L, E], of any file that records routing; errors name it.

    Reads what ``RoutingTrace.load`` reads and what ``planning.recordings`` lists; the trace is None for those that keep
    loads alone.
    """
    if not is_recording(path):
        trace = RoutingTrace.load(path, num_experts)
        return trace, trace.loads_LE().astype(np.float64)
    with naming(path):
        recording = read_recording(path)
        found = recording.loads_LE.shape[1]
        if num_experts is not None and found != num_experts:
            raise ValueError(f"num_experts ({num_experts}) must be the {found} that it has")
        if recording.experts_TLK is None:
            return None, recording.loads_LE
        trace = RoutingTrace(recording.experts_TLK, found, sequence=recording.sequence_T, position=recording.position_T)
        return trace, recording.loads_LE


def _own(cls: type[RoutingTrace], arrays: dict[str, np.ndarray], num_experts: int | None) -> RoutingTrace:
    if "num_experts" not in arrays:
        raise ValueError("num_experts is missing")
    said = arrays["num_experts"].item() if arrays["num_experts"].size == 1 else None
    if num_experts is not None and said != num_experts:
        raise ValueError(f"num_experts ({num_experts}) must be the {said} that the file says")
    meta = conform(parse_json(str(arrays["meta"])), dict, "meta") if "meta" in arrays else {}
    columns = [arrays.get(name) for name in ("weights", "sequence", "position")]
    return cls(arrays["experts"], said, *columns, meta)


def _foreign(cls: type[RoutingTrace], parts: list[np.ndarray], num_experts: int | None) -> RoutingTrace:
    """Arrays of one sequence each, [tokens, layers] or [tokens, layers, top_k]."""
    parts = [part[:, :, None] if part.ndim == 2 else part for part in parts]
    if not parts or any(part.ndim != 3 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        shapes = ", ".join(str(part.shape) for part in parts[:4])
        raise ValueError(f"arrays must be [tokens, layers] or [tokens, layers, top_k], alike in both, not {shapes}")
    experts = np.concatenate(parts)
    if num_experts is None:
        if not experts.size or not np.issubdtype(experts.dtype, np.integer):
            raise ValueError(f"expert ids (shape {experts.shape}, {experts.dtype}) must be whole numbers")
        num_experts = int(experts.max()) + 1
        warnings.warn(f"the trace does not say num_experts; {num_experts} from its highest id", stacklevel=3)
    sequence = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    return cls(experts, num_experts, sequence=sequence)


def _check_ids(experts: np.ndarray, num_experts: int) -> None:
    if experts.size and (experts.min() < 0 or experts.max() >= num_experts):
        token, layer, choice = np.argwhere((experts < 0) | (experts >= num_experts))[0]
        raise ValueError(
            f"experts: token {token}, layer {layer} takes expert {experts[token, layer, choice]}, "
            f"outside 0 … {num_experts - 1}"
        )
    for token, layer, expert in _twice(experts):
        raise ValueError(f"experts: token {token}, layer {layer} takes expert {expert} twice")


def _twice(experts: np.ndarray) -> Iterator[tuple[int, int, int]]:
    for j in range(1, experts.shape[2]):
        for i in range(j):
            same = experts[:, :, i] == experts[:, :, j]
            if same.any():
                token, layer = np.argwhere(same)[0]
                yield int(token), int(layer), int(experts[token, layer, i])


def _checked_weights(weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    weights = np.asarray(weights)
    if weights.shape != shape or not np.issubdtype(weights.dtype, np.floating):
        raise ValueError(f"weights (shape {weights.shape}, {weights.dtype}) must be floats of shape {shape}")
    weights = weights.astype(np.float16, copy=False)
    if weights.size and not (weights.min() >= 0 and weights.max() < np.inf):  # NaN fails both
        token, layer, choice = np.argwhere(~((weights >= 0) & (weights < np.inf)))[0]
        raise ValueError(
            f"weights: token {token}, layer {layer} has {weights[token, layer, choice]}, not a number of at least 0"
        )
    return weights


def _column(name: str, values: np.ndarray, rows: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (rows,) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} (shape {values.shape}, {values.dtype}) must be whole numbers [{rows}]")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**31:
        raise ValueError(f"{name} ({values.min()} … {values.max()}) must lie in 0 … {2**31 - 1}")
    return values.astype(np.int32, copy=False)


def _places(sequence: np.ndarray) -> np.ndarray:
    """0, 1, 2 … within each sequence, in the order of its rows."""
    order = np.argsort(sequence, kind="stable")
    ordered = sequence[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    places = np.arange(len(sequence)) - np.repeat(starts, np.diff(np.append(starts, len(sequence))))
    out = np.empty(len(sequence), np.int32)
    out[order] = places
    return out
