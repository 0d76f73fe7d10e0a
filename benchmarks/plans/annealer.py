"""Swap annealing of an affinity placement, as plain as it can be: the oracle that ``affinity`` is held against.

Two experts of a layer swap ranks if that saves crossings, or else by chance, less and less; then the best seen counts.
"""

from __future__ import annotations

import time

import numpy as np

_HOT, _COLD = 1.0, 1e-3  # first and last temperature, in mean weights of an expert
_DRAWN = 4096  # proposals drawn at once


def anneal(weights_JEE: np.ndarray, world: int, seconds: float, seed: int = 0) -> tuple[np.ndarray, int]:
    """Rank of each expert [L, E], equally many on each, after so many CPU seconds, and the number of proposals.

    Args:
        weights_JEE: [L-1, E, E], weight of tokens from expert a of a layer to expert b of the next.
    """
    random = np.random.default_rng(seed)
    layers, experts = len(weights_JEE) + 1, weights_JEE.shape[1]
    ranks_LE = np.array([random.permutation(experts) % world for _ in range(layers)])
    # weight that each expert has with the neighbouring layers' experts of each rank
    near_LEW = np.zeros((layers, experts, world))
    for layer, weight_EE in enumerate(weights_JEE):
        near_LEW[layer] += weight_EE @ np.eye(world)[ranks_LE[layer + 1]]
        near_LEW[layer + 1] += weight_EE.T @ np.eye(world)[ranks_LE[layer]]
    scale = weights_JEE.sum() / (layers * experts)
    stay = best = 0.0
    best_LE, proposals, started, done = ranks_LE.copy(), 0, time.process_time(), 0.0
    while done < 1:
        heat = scale * _HOT * (_COLD / _HOT) ** done
        drawn = random.integers(layers, size=_DRAWN), *random.integers(experts, size=(2, _DRAWN))
        limits = heat * np.log(random.random(_DRAWN) + 1e-300)
        for layer, a, b, limit in zip(*(x.tolist() for x in (*drawn, limits)), strict=True):
            rank_a, rank_b, near_EW = ranks_LE[layer, a], ranks_LE[layer, b], near_LEW[layer]
            gain = near_EW[a, rank_b] + near_EW[b, rank_a] - near_EW[a, rank_a] - near_EW[b, rank_b]
            if rank_a == rank_b or gain <= limit:
                continue
            ranks_LE[layer, a], ranks_LE[layer, b] = rank_b, rank_a
            if layer:
                moved_E = weights_JEE[layer - 1, :, a] - weights_JEE[layer - 1, :, b]
                near_LEW[layer - 1, :, rank_b] += moved_E
                near_LEW[layer - 1, :, rank_a] -= moved_E
            if layer + 1 < layers:
                moved_E = weights_JEE[layer, a] - weights_JEE[layer, b]
                near_LEW[layer + 1, :, rank_b] += moved_E
                near_LEW[layer + 1, :, rank_a] -= moved_E
            stay += gain
        proposals += _DRAWN
        if stay > best:
            best, best_LE = stay, ranks_LE.copy()
        done = (time.process_time() - started) / seconds
    return best_LE, proposals
