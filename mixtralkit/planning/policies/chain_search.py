"""The same splitting where partitions are too many to list: sweeps, swaps, recombination, and a bound."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from mixtralkit.planning.policies.chain import Fits, best_matching, stays
from mixtralkit.planning.policies.packing import pack_once

_STARTS, _KICKS = 12, 36  # up to _PLENTY items a layer, fewer beyond
_PLENTY = 64
_BOUND_STEPS = 60


def search(
    weights_JNN: np.ndarray, num_layers: int, parts: int, loads_LN: np.ndarray, fits: Fits | None = None
) -> np.ndarray:
    """Labels [L, n] of a good solution, the same each time.

    From several starts, sweeps over the layers give each layer its best labels while its neighbours keep theirs (an
    assignment problem), until nothing changes. The partitions that all starts found for each layer are then
    recombined by a dynamic programme, the result is disturbed and swept again, and so on.

    Args:
        weights_JNN, fits: as in ``chain.solve_exactly``.
        loads_LN: what ``fits`` is about; starts are packed evenly by it.

    Raises:
        ValueError: naming a layer for which no start under the cap was found.
    """
    random = np.random.default_rng(0)
    n = weights_JNN.shape[1]
    count = max(2, min(_STARTS, _STARTS * _PLENTY // n))
    kicks = min(_KICKS, _KICKS * _PLENTY**2 // n**2)
    if fits is None:
        starts = [_grown(weights_JNN, parts, random) for _ in range(count)]
    else:
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


def upper_bound(weights_JNN: np.ndarray, parts: int) -> float:
    """No labels have more weight between items of one label than this (load caps only lower it).

    Each pair of layers by itself. With labels, the pairs of one label form a 0/1 matrix whose rows and columns sum
    to m = n / parts, with singular values m (parts times) and 0, one of them for the constant vector. Any split of
    the weights W = A + B therefore bounds the gain by the m largest of each row of A (or column, whichever is less)
    plus m · the parts - 1 largest singular values of B without its means. Subgradient steps choose the split.
    """
    j, n, _ = weights_JNN.shape
    size = n // parts
    if j == 0:
        return 0.0
    best_J = np.minimum(_row_bound(weights_JNN, size)[0], _row_bound(weights_JNN.swapaxes(1, 2), size)[0])
    share_JNN = weights_JNN / 2
    for step in range(_BOUND_STEPS):
        rows_J, chosen_JNN = _row_bound(share_JNN, size)
        spectral_J, overlap_JNN = _spectral_bound(weights_JNN - share_JNN, size, parts)
        best_J = np.minimum(best_J, rows_J + spectral_J)
        direction_JNN = chosen_JNN - overlap_JNN
        norm_J = np.maximum((direction_JNN**2).sum((1, 2)), 1e-12)
        length_J = (rows_J + spectral_J - 0.97 * best_J) / norm_J * 0.5 / (1 + step / 20)
        share_JNN = share_JNN - length_J[:, None, None] * direction_JNN
    return float(best_J.sum())


def _row_bound(weights_JNN: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the ``size`` largest of each row, and which those are."""
    largest = np.argpartition(-weights_JNN, size - 1, axis=2)[:, :, :size]
    chosen_JNN = np.zeros_like(weights_JNN)
    np.put_along_axis(chosen_JNN, largest, 1.0, axis=2)
    return (weights_JNN * chosen_JNN).sum((1, 2)), chosen_JNN


def _spectral_bound(weights_JNN: np.ndarray, size: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Most weight under a matrix with the singular values of a labelling, and that matrix."""
    n = weights_JNN.shape[1]
    centred_JNN = weights_JNN - weights_JNN.mean(1, keepdims=True) - weights_JNN.mean(2, keepdims=True)
    centred_JNN = centred_JNN + weights_JNN.mean((1, 2), keepdims=True)
    left, values, right = np.linalg.svd(centred_JNN)
    top = slice(parts - 1)
    overlap_JNN = size / n + size * left[:, :, top] @ right[:, top]
    return weights_JNN.sum((1, 2)) * size / n + size * values[:, top].sum(1), overlap_JNN


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
