"""Annealing of a chain of layers: while a layer's neighbours stay, its labels' gain is linear, so all swap at once.

Odd and even layers take turns. In each, items are paired at random and every pair swaps labels by Metropolis' rule, all
pairs of all layers of all tries in one numpy step; the temperature falls from the mean gain of an item to nearly none.
"""

from __future__ import annotations

import numpy as np

_PAIRINGS = 4  # of one layer, before its neighbours take their turn


def anneal(
    weights_JNN: np.ndarray, labels_RLN: np.ndarray, parts: int, sweeps: int, random: np.random.Generator, start: float
) -> np.ndarray:
    """Labels [R, L, n] after ``sweeps`` of falling temperature, tries side by side.

    Args:
        weights_JNN: [L-1, n, n], item a of a layer with item b of the next.
        labels_RLN: starts; every label equally often in each layer.
        start: first temperature, in mean gains of an item.
    """
    labels_RLN = labels_RLN.copy()
    tries, num_layers, n = labels_RLN.shape
    if parts == 1:
        return labels_RLN
    weights_JNN = weights_JNN.astype(np.float32)
    back_JNN = np.ascontiguousarray(weights_JNN.swapaxes(1, 2))
    scale = float(weights_JNN.sum()) / max(num_layers * n, 1)
    one_hot = np.zeros((tries, num_layers, n, parts), np.float32)
    np.put_along_axis(one_hot, labels_RLN[..., None], 1.0, 3)
    halves = [np.arange(parity, num_layers, 2) for parity in (0, 1) if parity < num_layers]
    half = n // 2
    index_R = np.arange(tries)[:, None, None]
    for sweep in range(sweeps):
        heat = scale * start * (1e-3) ** (sweep / max(sweeps - 1, 1))
        for layers in halves:
            gain = np.zeros((tries, len(layers), n, parts), np.float32)
            after, before = layers > 0, layers + 1 < num_layers
            gain[:, after] += back_JNN[layers[after] - 1] @ one_hot[:, layers[after] - 1]
            gain[:, before] += weights_JNN[layers[before]] @ one_hot[:, layers[before] + 1]
            labels = labels_RLN[:, layers]
            index_L = np.arange(len(layers))[None, :, None]
            for _ in range(_PAIRINGS):
                order = random.random((tries, len(layers), n), np.float32).argsort(2)
                a, b = order[..., :half], order[..., half : 2 * half]
                label_a, label_b = labels[index_R, index_L, a], labels[index_R, index_L, b]
                change = gain[index_R, index_L, a, label_b] + gain[index_R, index_L, b, label_a]
                change -= gain[index_R, index_L, a, label_a] + gain[index_R, index_L, b, label_b]
                swaps = change > heat * np.log(random.random(change.shape, np.float32) + 1e-12)
                labels[index_R, index_L, a] = np.where(swaps, label_b, label_a)
                labels[index_R, index_L, b] = np.where(swaps, label_a, label_b)
            labels_RLN[:, layers] = labels
            fresh = np.zeros((tries, len(layers), n, parts), np.float32)
            np.put_along_axis(fresh, labels[..., None], 1.0, 3)
            one_hot[:, layers] = fresh
    return labels_RLN
