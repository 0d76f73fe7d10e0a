"""The same splitting where partitions are too many to list: halves, sweeps and recombination."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from mixtralkit.planning.policies.bisection import halve, split_again
from mixtralkit.planning.policies.chain import Fits, best_matching, stays
from mixtralkit.planning.policies.packing import pack_once

_STARTS, _KICKS = 12, 36  # under a cap, up to _PLENTY items a layer, fewer beyond
_PLENTY = 64
_TRIES, _FEWEST, _WORK = 48, 2, 600_000  # without a cap; as many as items of all tries times labels stay below _WORK
_POOL, _LAST = 6, 2  # tries whose partitions are recombined, and how often what comes of it is split anew


def search(
    weights_JNN: np.ndarray, num_layers: int, parts: int, loads_LN: np.ndarray, fits: Fits | None = None
) -> np.ndarray:
    """Labels [L, n] of a good solution, the same each time.

    Without a cap many tries are halved down to parts (``bisection``) and their parts split anew, pair by pair, the
    worse half of the tries being left after each round. What remains is polished by sweeps (every layer gets its best
    labels while its neighbours keep theirs, an assignment problem) and recombined by a dynamic programme over the
    partitions found. With a cap, which swaps may break, sweeps and recombination start from packings that keep it.

    Args:
        weights_JNN, fits: as in ``chain.solve_exactly``.
        loads_LN: what ``fits`` is about; starts are packed evenly by it.

    Raises:
        ValueError: naming a layer for which no start under the cap was found.
    """
    random = np.random.default_rng(0)
    if fits is not None:
        return _search_capped(weights_JNN, parts, loads_LN, fits, random)
    n = weights_JNN.shape[1]
    tries = int(np.clip(_WORK / (num_layers * n * parts), _FEWEST, _TRIES))
    labels_RLN = split_again(weights_JNN, halve(weights_JNN, parts, tries, random), parts, random)
    while len(labels_RLN) > _POOL:
        order_R = np.argsort([-stays(weights_JNN, labels_LN) for labels_LN in labels_RLN], kind="stable")
        labels_RLN = labels_RLN[order_R[: max(len(order_R) // 2, _POOL)]]
        labels_RLN = split_again(weights_JNN, labels_RLN, parts, random)
    best_LN = _joined(weights_JNN, labels_RLN, parts)
    for _ in range(_LAST):
        again_RLN = split_again(weights_JNN, np.repeat(best_LN[None], _FEWEST, 0), parts, random)
        best_LN = _joined(weights_JNN, [*again_RLN, best_LN], parts)
    return best_LN


def _joined(weights_JNN: np.ndarray, tries: Sequence[np.ndarray], parts: int) -> np.ndarray:
    """The best of the tries, each swept, and of what comes of their recombination."""
    pool = [_sweep(weights_JNN, labels_LN, parts, None) for labels_LN in tries]
    pool.append(_sweep(weights_JNN, _recombine(weights_JNN, pool, parts), parts, None))
    return max(pool, key=lambda labels_LN: stays(weights_JNN, labels_LN))


def _search_capped(
    weights_JNN: np.ndarray, parts: int, loads_LN: np.ndarray, fits: Fits, random: np.random.Generator
) -> np.ndarray:
    n = weights_JNN.shape[1]
    count = max(2, min(_STARTS, _STARTS * _PLENTY // n))
    kicks = min(_KICKS, _KICKS * _PLENTY**2 // n**2)
    packed_LN = np.array([_packed(loads_N, parts, layer, fits) for layer, loads_N in enumerate(loads_LN)])
    starts = [packed_LN] + [
        np.array([_disturbed(labels_N, random, layer, fits, n) for layer, labels_N in enumerate(packed_LN)])
        for _ in range(count - 1)
    ]
    pool = [_sweep(weights_JNN, labels_LN, parts, fits) for labels_LN in starts]
    best_LN = _sweep(weights_JNN, _recombine(weights_JNN, pool, parts), parts, fits)
    for _ in range(kicks):
        kicked_LN = [
            _disturbed(labels_N, random, layer, fits, max(2, n // 8)) for layer, labels_N in enumerate(best_LN)
        ]
        pool = [*pool[-count:], best_LN, _sweep(weights_JNN, np.array(kicked_LN), parts, fits)]
        candidate_LN = _sweep(weights_JNN, _recombine(weights_JNN, pool, parts), parts, fits)
        if stays(weights_JNN, candidate_LN) > stays(weights_JNN, best_LN):
            best_LN = candidate_LN
    return best_LN


def _gain_of_labels(weights_JNN: np.ndarray, labels_LN: np.ndarray, layer: int, parts: int) -> np.ndarray:
    """Weight [n, parts] that each item of ``layer`` shares with the neighbouring layers' items of each label."""
    one_hot = np.eye(parts)
    gain_NW = np.zeros((labels_LN.shape[1], parts))
    if layer > 0:
        gain_NW += weights_JNN[layer - 1].T @ one_hot[labels_LN[layer - 1]]
    if layer < len(weights_JNN):
        gain_NW += weights_JNN[layer] @ one_hot[labels_LN[layer + 1]]
    return gain_NW


def _assigned(gain_NW: np.ndarray) -> np.ndarray:
    """Labels [n], each equally often, with the most gain."""
    n, parts = gain_NW.shape
    size = n // parts
    return linear_sum_assignment(np.repeat(gain_NW, size, axis=1), maximize=True)[1] // size


def _grown(weights_JNN: np.ndarray, parts: int, random: np.random.Generator) -> np.ndarray:
    """Random labels in one layer, every further layer assigned to the one before it, or after it."""
    layers, n = len(weights_JNN) + 1, weights_JNN.shape[1]
    labels_LN = np.zeros((layers, n), np.int64)
    start = int(random.integers(layers))
    labels_LN[start] = random.permutation(n) % parts
    one_hot = np.eye(parts)
    for layer in range(start + 1, layers):
        labels_LN[layer] = _assigned(weights_JNN[layer - 1].T @ one_hot[labels_LN[layer - 1]])
    for layer in range(start - 1, -1, -1):
        labels_LN[layer] = _assigned(weights_JNN[layer] @ one_hot[labels_LN[layer + 1]])
    return labels_LN


def _sweep(weights_JNN: np.ndarray, labels_LN: np.ndarray, parts: int, fits: Fits | None) -> np.ndarray:
    """Best labels of one layer after the other, forth and back, until a round changes nothing."""
    labels_LN = labels_LN.copy()
    layers = range(len(labels_LN))
    value = stays(weights_JNN, labels_LN)
    while True:
        for layer in (*layers, *layers[-2::-1]):
            gain_NW = _gain_of_labels(weights_JNN, labels_LN, layer, parts)
            labels_N = _assigned(gain_NW)
            if fits is not None and not _all_fit(labels_N, layer, fits):
                labels_N = _climb(gain_NW, labels_LN[layer], layer, fits)
            labels_LN[layer] = labels_N
        before, value = value, stays(weights_JNN, labels_LN)
        if value <= before * (1 + 1e-12):
            return labels_LN


def _climb(gain_NW: np.ndarray, labels_N: np.ndarray, layer: int, fits: Fits) -> np.ndarray:
    """Swaps two items' labels, the best allowed swap first, while that gains."""
    labels_N = labels_N.copy()
    while True:
        to_NN = gain_NW[:, labels_N]  # item a under the label of item b
        here_N = to_NN.diagonal()
        change_NN = np.triu(to_NN + to_NN.T - here_N[:, None] - here_N, 1)
        pairs = np.argsort(-change_NN, axis=None)
        for pair in pairs[: int((change_NN > 1e-12 * (1 + here_N.sum())).sum())]:
            a, b = divmod(int(pair), len(labels_N))
            swapped_N = _swapped(labels_N, a, b)
            if _all_fit(swapped_N, layer, fits, labels_N[[a, b]]):
                labels_N = swapped_N
                break
        else:
            return labels_N


def _recombine(weights_JNN: np.ndarray, pool: list[np.ndarray], parts: int) -> np.ndarray:
    """The best chain whose partition of each layer is one of the pool's."""
    one_hot = np.eye(parts)
    members_PLNW = one_hot[np.array(pool)]
    value_P, steps = np.zeros(len(pool)), []
    for layer, weights_NN in enumerate(weights_JNN):
        gain_PQWW = np.einsum("pnw,qnv->pqwv", members_PLNW[:, layer], weights_NN @ members_PLNW[:, layer + 1])
        orders = [[best_matching(gain_WW) for gain_WW in gain_QWW] for gain_QWW in gain_PQWW]
        gained_PQ = np.array(
            [
                [g[np.arange(parts), o].sum() for g, o in zip(row, order, strict=True)]
                for row, order in zip(gain_PQWW, orders, strict=True)
            ]
        )
        total_PQ = value_P[:, None] + gained_PQ
        steps.append((total_PQ.argmax(0), orders))
        value_P = total_PQ.max(0)
    path = [int(value_P.argmax())]
    for came_Q, _ in reversed(steps):
        path.append(int(came_Q[path[-1]]))
    path.reverse()
    names_W = np.arange(parts)  # new name of each label of the chosen solution
    labels_LN = [pool[path[0]][0]]
    for layer, (_, orders) in enumerate(steps):
        following_W = np.empty_like(names_W)
        following_W[orders[path[layer]][path[layer + 1]]] = names_W
        names_W = following_W
        labels_LN.append(names_W[pool[path[layer + 1]][layer + 1]])
    return np.array(labels_LN)


def _packed(loads_N: np.ndarray, parts: int, layer: int, fits: Fits) -> np.ndarray:
    labels_N = np.empty(len(loads_N), np.int64)
    for label, items in enumerate(pack_once(loads_N, parts)):
        labels_N[items] = label
    if not _all_fit(labels_N, layer, fits):
        raise ValueError(f"layer {layer}: no placement was found that keeps every part's load under the cap")
    return labels_N


def _disturbed(
    labels_N: np.ndarray, random: np.random.Generator, layer: int, fits: Fits | None, swaps: int
) -> np.ndarray:
    """The labels after some random swaps, those that the cap forbids left out."""
    for _ in range(swaps):
        a, b = random.integers(len(labels_N), size=2)
        swapped_N = _swapped(labels_N, a, b)
        if fits is None or _all_fit(swapped_N, layer, fits, labels_N[[a, b]]):
            labels_N = swapped_N
    return labels_N


def _swapped(labels_N: np.ndarray, a: int, b: int) -> np.ndarray:
    swapped_N = labels_N.copy()
    swapped_N[[a, b]] = labels_N[[b, a]]
    return swapped_N


def _all_fit(labels_N: np.ndarray, layer: int, fits: Fits, labels: np.ndarray | None = None) -> bool:
    """Whether the items of every label, or of these, may be a part."""
    labels = np.unique(labels_N if labels is None else labels)
    return all(fits(layer, tuple(np.flatnonzero(labels_N == label).tolist())) for label in labels)
