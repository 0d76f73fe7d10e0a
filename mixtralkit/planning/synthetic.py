"""Synthetic routing with known probabilities: skew, affinity between layers, repetition, an injected hot expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixtralkit.planning.trace import RoutingTrace

TRANSITION_CONCENTRATION = 1.1
MOST_PATHS = 1 << 20


@dataclass(frozen=True, eq=False)
class RoutingProcess:
    """Where tokens go next, exactly.

    Attributes:
        shares_LE: float64, probability of each expert as first choice; rows sum to 1.
        next_PE: for every layer but the last float64 [E^m, E]: the next layer's first choice given the first choices
            of the last m layers (fewer at the start). A path's row is its base-E number, the latest layer last.
        repetition_L: float64, probability that a token takes the first choice of the token before it instead.
    """

    shares_LE: np.ndarray
    next_PE: tuple[np.ndarray, ...]
    repetition_L: np.ndarray

    @classmethod
    def random(
        cls,
        num_layers: int,
        num_experts: int,
        concentration: float = 15.0,
        affinity: float = 0.0,
        memory: int = 1,
        repetition: float | Sequence[float] = 0.0,
        seed: int = 0,
    ) -> RoutingProcess:
        """Draws a process.

        Args:
            concentration: shares of a layer ~ Dirichlet(concentration, …). 15 is as uneven as Mixtral on real text,
                4 more so, infinity is even.
            affinity: 0 … 1, from independent layers to transitions of Dirichlet(1.1), scaled to keep the shares.
            memory: layers that the next choice depends on.
            repetition: one for all layers, or one each.
        """
        if num_layers < 1 or num_experts < 2:
            raise ValueError(f"num_layers ({num_layers}) must be at least 1 and num_experts ({num_experts}) 2")
        if not concentration > 0:
            raise ValueError(f"concentration ({concentration}) must be above 0")
        if not 0 <= affinity <= 1:
            raise ValueError(f"affinity ({affinity}) must lie in 0 … 1")
        if memory < 1 or num_experts**memory > MOST_PATHS:
            raise ValueError(f"memory ({memory}) must be at least 1, with at most {MOST_PATHS} paths in all")
        repetition_L = np.broadcast_to(np.asarray(repetition, np.float64), num_layers)
        if not ((repetition_L >= 0) & (repetition_L < 1)).all():
            raise ValueError(f"repetition ({repetition}) must lie in 0 … 1, without 1")
        rng = np.random.default_rng(seed)
        shares_LE = np.full((num_layers, num_experts), 1 / num_experts)
        if concentration < np.inf:
            shares_LE = rng.dirichlet([concentration] * num_experts, num_layers)
        return cls(shares_LE, _transitions(rng, shares_LE, affinity, memory), repetition_L)

    def trace(
        self,
        num_tokens: int,
        top_k: int = 2,
        sequence_length: int = 512,
        hot_expert: int = 0,
        hot_share: float | None = None,
        seed: int = 0,
    ) -> RoutingTrace:
        """Draws tokens. Further choices are drawn as the first one, without those already taken.

        Args:
            sequence_length: tokens of a sequence.
            hot_share: in every layer exactly ``round(hot_share · num_tokens)`` tokens, drawn evenly, take
                ``hot_expert`` first, and no other token takes it at all.
        """
        layers, experts = self.shares_LE.shape
        free = experts - (hot_share is not None)
        if not 1 <= top_k <= free:
            raise ValueError(f"top_k ({top_k}) must lie in 1 … {free}, the experts to choose from")
        if num_tokens < 0 or sequence_length < 1:
            raise ValueError(f"num_tokens ({num_tokens}) and sequence_length ({sequence_length}) must be at least 0, 1")
        if hot_share is not None and not (0 <= hot_share <= 1 and 0 <= hot_expert < experts):
            raise ValueError(
                f"hot_share ({hot_share}) must lie in 0 … 1, hot_expert ({hot_expert}) in 0 … {experts - 1}"
            )
        rng = np.random.default_rng(seed)
        position = np.arange(num_tokens, dtype=np.int32) % sequence_length
        ids_NLK = np.empty((num_tokens, layers, top_k), np.int16)
        weights_NLK = np.empty((num_tokens, layers, top_k), np.float16)
        paths_N = np.zeros(num_tokens, np.int64)
        for layer in range(layers):
            logits_PE = self._logits(layer, hot_expert if hot_share is not None else None)
            ids_NK, weights_NLK[:, layer] = _draw(rng, logits_PE, paths_N, top_k)
            first_N = _repeat(rng, ids_NK[:, 0], position, self.repetition_L[layer])
            if hot_share is not None:
                first_N[rng.permutation(num_tokens)[: round(hot_share * num_tokens)]] = hot_expert
            ids_NLK[:, layer] = _with_first(ids_NK, first_N)
            if layer + 1 < layers:
                paths_N = (paths_N * experts + first_N) % len(self.next_PE[layer])
        sequence = (np.arange(num_tokens) // sequence_length).astype(np.int32)
        return RoutingTrace(ids_NLK, experts, weights_NLK, sequence, position, {"synthetic": True, "seed": seed})

    def _logits(self, layer: int, without: int | None) -> np.ndarray:
        """float32 [paths, E] log-probabilities of a layer's first choice, ``without`` one expert."""
        chances_PE = (self.shares_LE[:1] if layer == 0 else self.next_PE[layer - 1]).copy()
        if without is not None:
            chances_PE[:, without] = 0
        with np.errstate(divide="ignore"):
            return np.log(chances_PE).astype(np.float32)


def _transitions(
    rng: np.random.Generator, shares_LE: np.ndarray, affinity: float, memory: int
) -> tuple[np.ndarray, ...]:
    layers, experts = shares_LE.shape
    found, paths_P = [], shares_LE[0]  # paths_P: probability of each path up to the present layer
    for layer in range(layers - 1):
        joint_PE = paths_P[:, None] * rng.dirichlet([TRANSITION_CONCENTRATION] * experts, len(paths_P))
        joint_PE = _with_margins(joint_PE, paths_P, shares_LE[layer + 1])
        joint_PE = affinity * joint_PE + (1 - affinity) * paths_P[:, None] * shares_LE[layer + 1]
        found.append(joint_PE / np.maximum(joint_PE.sum(1, keepdims=True), 1e-300))
        paths_P = joint_PE.ravel()
        if layer + 1 >= memory:
            paths_P = paths_P.reshape(experts, -1).sum(0)  # the oldest layer leaves the path
    return tuple(found)


def _with_margins(joint_PE: np.ndarray, rows_P: np.ndarray, columns_E: np.ndarray) -> np.ndarray:
    """Scales rows and columns in turn (Sinkhorn) until they sum to what they must."""
    for _ in range(1000):
        joint_PE = joint_PE * (columns_E / np.maximum(joint_PE.sum(0), 1e-300))
        sums_P = joint_PE.sum(1)
        if np.abs(sums_P - rows_P).max() < 1e-12:
            break
        joint_PE = joint_PE * (rows_P / np.maximum(sums_P, 1e-300))[:, None]
    return joint_PE


def _draw(
    rng: np.random.Generator, logits_PE: np.ndarray, paths_N: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 and softmax weights float32 [N, K] by falling weight: the k largest of logit + Gumbel noise, which is
    drawing one after the other without replacement."""
    scores_NE = logits_PE[paths_N]
    scores_NE -= np.log(rng.standard_exponential(scores_NE.shape, dtype=np.float32) + np.float32(1e-30))
    ids = np.empty((len(paths_N), top_k), np.int64)
    best = np.empty((len(paths_N), top_k), np.float32)
    rows = np.arange(len(paths_N))
    for k in range(top_k):
        ids[:, k] = scores_NE.argmax(1)
        best[:, k] = scores_NE[rows, ids[:, k]]
        scores_NE[rows, ids[:, k]] = -np.inf
    weights = np.exp(best - best[:, :1])
    return ids, weights / weights.sum(1, keepdims=True)


def _repeat(rng: np.random.Generator, first_N: np.ndarray, position: np.ndarray, repetition: float) -> np.ndarray:
    """With a chance of ``repetition`` a token takes what the token before it in its sequence took."""
    if repetition == 0:
        return first_N.copy()
    is_own = (rng.random(len(first_N)) >= repetition) | (position == 0)
    return first_N[np.maximum.accumulate(np.where(is_own, np.arange(len(first_N)), 0))]


def _with_first(ids_NK: np.ndarray, first_N: np.ndarray) -> np.ndarray:
    """The choices with another first one; where it was among the later ones, these get the old first one."""
    return np.column_stack([first_N, np.where(ids_NK[:, 1:] == first_N[:, None], ids_NK[:, :1], ids_NK[:, 1:])])
