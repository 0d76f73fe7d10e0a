"""Splits a chain of layers part by part: everything into halves, halves again, and then any two parts anew.

With two parts an item is a spin, +1 or -1, and what two items of a layer gain by changing places is

    (s_b - s_a) · (h_a - h_b) / 2        h: the weight an item has with its neighbours' spins

so all pairs of all odd, then of all even layers are tried at once by Metropolis' rule, for many splits side by side.
Heavy items that belong together over all layers meet in the first halves; swaps of single items, in which the others of
their chain stay behind, seldom bring them together later.

    items_XLM   the items of a split in each layer: X splits, L layers, M items
    spin_XLM    +1 for the first part, -1 for the second
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_PAIRINGS = 4  # of one layer, before its neighbours take their turn
_SWEEPS, _AGAIN = 100, 50  # of temperature, for halves and for two parts
_HOT, _COLD = 10.0, 1e-3  # first temperature, in mean gains of an item, and the last one's part of it


def halve(weights_JNN: np.ndarray, parts: int, tries: int, random: np.random.Generator) -> np.ndarray:
    """Labels [tries, L, n], every label equally often in each layer: random halves, annealed, and so on to parts.

    Args:
        weights_JNN: [L-1, n, n], item a of a layer with item b of the next; n is a multiple of ``parts``.
    """
    layers, n = len(weights_JNN) + 1, weights_JNN.shape[1]
    weights_JNN, size = weights_JNN.astype(np.float32), n // parts
    labels_RLN = np.zeros((tries, layers, n), np.int64)
    groups = [(0, parts, np.tile(np.arange(n), (tries, layers, 1)))]  # first label, labels, items of each try
    while groups:
        halves = []
        for count in sorted({count for _, count, _ in groups}):
            alike = [(first, items_RLM) for first, many, items_RLM in groups if many == count]
            if count == 1:
                for first, items_RLM in alike:
                    np.put_along_axis(labels_RLN, items_RLM, first, 2)
                continue
            items_XLM = np.concatenate([items_RLM for _, items_RLM in alike])
            spin_XLM = np.where(np.arange(count * size) < count // 2 * size, 1, -1) + np.zeros(
                (*items_XLM.shape[:2], 1)
            )
            weights = weights_JNN[None] if count == parts else _between(weights_JNN, items_XLM)
            spin_XLM = _anneal(weights, spin_XLM, _SWEEPS, random)
            items_XLM = np.take_along_axis(items_XLM, np.argsort(-spin_XLM, axis=2, kind="stable"), 2)
            for (first, _), items_RLM in zip(alike, np.split(items_XLM, len(alike)), strict=True):
                halves.append((first, count // 2, items_RLM[:, :, : count // 2 * size]))
                halves.append((first + count // 2, count - count // 2, items_RLM[:, :, count // 2 * size :]))
        groups = halves
    return labels_RLN


def split_again(weights_JNN: np.ndarray, labels_RLN: np.ndarray, parts: int, random: np.random.Generator) -> np.ndarray:
    """Labels after each two parts were split anew, once, which is kept where it gains."""
    tries, layers, n = labels_RLN.shape
    weights_JNN, size, labels_RLN = weights_JNN.astype(np.float32), n // parts, labels_RLN.copy()
    for first_P, second_P in _tournament(parts):
        order_RLPS = np.argsort(labels_RLN, axis=2, kind="stable").reshape(tries, layers, parts, size)
        both = np.concatenate([order_RLPS[:, :, first_P], order_RLPS[:, :, second_P]], 3)
        items_XLM = both.swapaxes(1, 2).reshape(tries * len(first_P), layers, 2 * size)
        before_XLM = np.broadcast_to(np.repeat(np.float32([1, -1]), size), items_XLM.shape)
        weights_XJMM = _between(weights_JNN, items_XLM)
        after_XLM = _anneal(weights_XJMM, before_XLM, _AGAIN, random)
        gains_X = _gain(weights_XJMM, after_XLM) > _gain(weights_XJMM, before_XLM) * (1 + 1e-6)
        first_X, second_X = (np.tile(part_P, tries)[:, None, None] for part_P in (first_P, second_P))
        new_XLM = np.where(np.where(gains_X[:, None, None], after_XLM, before_XLM) > 0, first_X, second_X)
        by_try = (tries, len(first_P), layers, 2 * size)
        for items_RLM, new_RLM in zip(
            items_XLM.reshape(by_try).swapaxes(0, 1), new_XLM.reshape(by_try).swapaxes(0, 1), strict=True
        ):
            np.put_along_axis(labels_RLN, items_RLM, new_RLM, 2)
    return labels_RLN


def _tournament(parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rounds in which every part meets another one, until all have met (the circle method)."""
    ring = np.arange(parts + parts % 2)
    for _ in range(len(ring) - 1):
        pairs = np.stack([ring[: len(ring) // 2], ring[::-1][: len(ring) // 2]])
        yield tuple(pairs[:, pairs.max(0) < parts])
        ring = np.r_[ring[0], ring[-1], ring[1:-1]]


def _between(weights_JNN: np.ndarray, items_XLM: np.ndarray) -> np.ndarray:
    """Weights [X, L-1, M, M] of each split's items."""
    pairs = np.arange(len(weights_JNN))[:, None, None]
    return weights_JNN[pairs, items_XLM[:, :-1, :, None], items_XLM[:, 1:, None, :]]


def _gain(weights_XJMM: np.ndarray, spin_XLM: np.ndarray) -> np.ndarray:
    return ((weights_XJMM @ spin_XLM[:, 1:, :, None])[..., 0] * spin_XLM[:, :-1]).sum((1, 2))


def _anneal(weights_XJMM: np.ndarray, spin_XLM: np.ndarray, sweeps: int, random: np.random.Generator) -> np.ndarray:
    """Spins after ``sweeps`` of falling temperature; each split keeps how many of a layer are +1.

    Args:
        weights_XJMM: float32; X may be 1 for weights that all splits share.
    """
    (layers, items), half = spin_XLM.shape[1:], spin_XLM.shape[2] // 2
    spin_XLM = spin_XLM.astype(np.float32)
    scale_X11 = (weights_XJMM.sum((1, 2, 3)) / (layers * items)).reshape(-1, 1, 1)
    back_XJMM = np.ascontiguousarray(weights_XJMM.swapaxes(2, 3))
    for sweep in range(sweeps):
        heat_X11 = scale_X11 * np.float32(_HOT * _COLD ** (sweep / max(sweeps - 1, 1)))
        for parity in (0, 1) if layers > 1 else (0,):
            spin, field = spin_XLM[:, parity::2].copy(), np.zeros_like(spin_XLM[:, parity::2])
            after, before = (layers - parity) // 2, (layers - 1 + parity) // 2
            field[:, :after] += _field(weights_XJMM[:, parity::2], spin_XLM[:, 1 + parity :: 2])
            field[:, 1 - parity :] += _field(back_XJMM[:, 1 - parity :: 2], spin_XLM[:, 1 - parity :: 2][:, :before])
            for _ in range(_PAIRINGS):
                order_M = random.permutation(items)
                a, b = order_M[:half], order_M[half : 2 * half]
                spin_a, spin_b = spin[:, :, a], spin[:, :, b]
                change = (spin_b - spin_a) * (field[:, :, a] - field[:, :, b])
                swaps = change > -2 * heat_X11 * random.standard_exponential(change.shape, np.float32)
                spin[:, :, a], spin[:, :, b] = np.where(swaps, spin_b, spin_a), np.where(swaps, spin_a, spin_b)
            spin_XLM[:, parity::2] = spin
    return spin_XLM


def _field(weights_XKMM: np.ndarray, spin_XKM: np.ndarray) -> np.ndarray:
    if len(weights_XKMM) == 1:  # shared: one product a layer
        return (weights_XKMM[0] @ spin_XKM.transpose(1, 2, 0)).transpose(2, 0, 1)
    return (weights_XKMM @ spin_XKM[..., None])[..., 0]
