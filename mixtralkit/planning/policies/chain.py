"""Splits the experts of every layer into equal parts so that tokens seldom change part: exact dynamic programme.

A solution is labels [L, n]: the part of each item of each layer. What counts is which items of neighbouring layers
share a label, so the labels of all layers from some layer on can be permuted together for free. A state is therefore
a partition without labels, and the cost from one to the next is the best matching of their parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import factorial

import numpy as np
from scipy.optimize import linear_sum_assignment

Fits = Callable[[int, tuple[int, ...]], bool]  # may these items of this layer be a part?
MOST_WORK = 4_000_000  # additions for one pair of layers up to which the programme is used


def count_partitions(num_items: int, parts: int) -> int:
    """Ways to split the items into unlabelled parts of equal size."""
    size = num_items // parts
    return factorial(num_items) // (factorial(size) ** parts * factorial(parts))


def is_small(num_items: int, parts: int) -> bool:
    """Whether ``solve_exactly`` takes seconds at most."""
    if parts in (1, num_items):
        return True
    return count_partitions(num_items, parts) ** 2 * factorial(parts) * parts <= MOST_WORK


def stays(weights_JNN: np.ndarray, labels_LN: np.ndarray) -> float:
    """Weight of all pairs of neighbouring layers' items with the same label."""
    return float((weights_JNN * (labels_LN[:-1, :, None] == labels_LN[1:, None, :])).sum())


def solve_exactly(weights_JNN: np.ndarray, num_layers: int, parts: int, fits: Fits | None = None) -> np.ndarray:
    """Labels [L, n] with the most weight between items of one label.

    Args:
        weights_JNN: [L-1, n, n], item a of a layer with item b of the next; n is a multiple of ``parts``.
        fits: which sets of items may be a part; None allows all. With one part, or one item a part, it is not asked.

    Raises:
        ValueError: naming a layer in which no partition is allowed.
    """
    n = weights_JNN.shape[1]
    if parts == 1:
        return np.zeros((num_layers, n), np.int64)
    if parts == n:
        return _solve_assignments(weights_JNN)
    subsets = list(itertools.combinations(range(n), n // parts))
    number_of = {subset: number for number, subset in enumerate(subsets)}
    states_PW = np.array([[number_of[part] for part in p] for p in _partitions(tuple(range(n)), n // parts)])
    allowed_LP = [_allowed(layer, subsets, states_PW, fits) for layer in range(num_layers)]
    member_CN = np.zeros((len(subsets), n))
    for number, subset in enumerate(subsets):
        member_CN[number, list(subset)] = 1
    gain_JCC = member_CN @ weights_JNN @ member_CN.T
    chosen_LW = _best_path(gain_JCC, [states_PW[allowed_P] for allowed_P in allowed_LP], parts)
    labels_LN = np.empty((num_layers, n), np.int64)
    for layer, numbers_W in enumerate(chosen_LW):
        for label, number in enumerate(numbers_W):
            labels_LN[layer, list(subsets[number])] = label
    return labels_LN


def best_matching(gain_WW: np.ndarray) -> np.ndarray:
    """Column for each row, with the most gain in all."""
    return linear_sum_assignment(gain_WW, maximize=True)[1]


def _solve_assignments(weights_JNN: np.ndarray) -> np.ndarray:
    """One item a part: every pair of layers is an assignment problem of its own."""
    labels_LN = [np.arange(weights_JNN.shape[1])]
    for weights_NN in weights_JNN:
        following = np.empty_like(labels_LN[0])
        following[best_matching(weights_NN)] = labels_LN[-1]
        labels_LN.append(following)
    return np.array(labels_LN)


def _partitions(items: tuple[int, ...], size: int):
    """All ways to split ``items`` into parts of ``size``; the first item of what is left leads the next part."""
    if not items:
        yield ()
        return
    for others in itertools.combinations(items[1:], size - 1):
        rest = tuple(item for item in items[1:] if item not in others)
        for tail in _partitions(rest, size):
            yield ((items[0], *others), *tail)


def _allowed(layer: int, subsets: list[tuple[int, ...]], states_PW: np.ndarray, fits: Fits | None) -> np.ndarray:
    if fits is None:
        return np.ones(len(states_PW), bool)
    fits_C = np.array([fits(layer, subset) for subset in subsets])
    allowed_P = fits_C[states_PW].all(1)
    if not allowed_P.any():
        raise ValueError(f"layer {layer}: no placement keeps every part's load under the cap")
    return allowed_P


def _best_path(gain_JCC: np.ndarray, states_LPW: list[np.ndarray], parts: int) -> list[np.ndarray]:
    """Subset of each label, layer by layer, along the path of most gain."""
    orders_XW = np.array(list(itertools.permutations(range(parts))))
    value_P = np.zeros(len(states_LPW[0]))
    steps = []
    for gain_CC, from_PW, to_QW in zip(gain_JCC, states_LPW, states_LPW[1:], strict=False):
        # Σ over labels w of gain(part w before, part order[w] after), the best order for every pair of states
        best_PQ = np.full((len(from_PW), len(to_QW)), -np.inf)
        order_PQ = np.zeros(best_PQ.shape, np.int64)
        gain_PWC = gain_CC[from_PW]
        for x, order_W in enumerate(orders_XW):
            total_PQ = sum(gain_PWC[:, w][:, to_QW[:, order_W[w]]] for w in range(parts))
            better_PQ = total_PQ > best_PQ
            best_PQ[better_PQ], order_PQ[better_PQ] = total_PQ[better_PQ], x
        total_PQ = value_P[:, None] + best_PQ
        came_Q = total_PQ.argmax(0)
        steps.append((came_Q, order_PQ))
        value_P = total_PQ.max(0)
    state = int(value_P.argmax())
    path = [state]
    for came_Q, _ in reversed(steps):
        path.append(int(came_Q[path[-1]]))
    path.reverse()
    chosen = [states_LPW[0][path[0]]]
    order_W = np.arange(parts)  # place of label w among the parts of the current state
    for layer, (_, order_PQ) in enumerate(steps):
        order_W = orders_XW[order_PQ[path[layer], path[layer + 1]]][order_W]
        chosen.append(states_LPW[layer + 1][path[layer + 1]][order_W])
    return chosen
