"""Affinity with replicas: which experts each rank has, copies and all, so that tokens seldom change rank.

A token stays on its rank where that has the next expert, else it goes to one of the expert's ranks, each as likely
(``quality.crossings_J``). Given what the other layers have, a slot of rank w for expert e in a layer saves

    arriving[w, e] · (1 + mean over e's ranks of ahead[e] - ahead[e, w])

crossings, with ``arriving`` the weight of tokens on w that want e and ``ahead`` the crossings still to come from there.
So each layer in turn takes the slots that save most, every expert keeping one: placement and replicas move together.
"""

from __future__ import annotations

import numpy as np

_SWEEPS, _NOISY = 40, 30  # over all layers; in the first of them savings are disturbed less and less


def with_replicas(weights_JEE: np.ndarray, holds_LWE: np.ndarray, slots: int, may_move: bool = True) -> np.ndarray:
    """Holders [L, W, E] with at most ``slots`` experts a rank: from a placement that has each expert once.

    Args:
        weights_JEE: transitions, each pair of layers summing to 1.
        may_move: False keeps the placement and only adds replicas, one layer after the other.
    """
    random = np.random.default_rng(0)
    best_LWE = _add_only(weights_JEE, holds_LWE, slots)
    if not may_move:
        return best_LWE
    least, found_LWE = crossings(weights_JEE, best_LWE), best_LWE.copy()
    for sweep in range(_SWEEPS):
        noise = max(0.0, 0.5 * (1 - sweep / _NOISY))
        if sweep % 10 == 0:
            found_LWE = best_LWE.copy()
        ahead_LEW = _ahead(weights_JEE, found_LWE)
        at_EW = _even(found_LWE[0])
        for layer, weight_EE in enumerate(weights_JEE, 1):
            arriving_WE = at_EW.T @ weight_EE
            saved_WE = arriving_WE * _worth(ahead_LEW[layer], found_LWE[layer])
            if noise:
                saved_WE = saved_WE * (1 + noise * random.standard_normal(saved_WE.shape))
            found_LWE[layer] = _take(saved_WE, slots)
            at_EW = _arrive(arriving_WE, found_LWE[layer])
        if (now := crossings(weights_JEE, found_LWE)) < least * (1 - 1e-12):
            best_LWE, least = found_LWE.copy(), now
    return best_LWE


def crossings(weights_JEE: np.ndarray, holds_LWE: np.ndarray) -> float:
    """Expected changes of rank of a token, as ``quality.crossings_J`` on one node."""
    total, at_EW = 0.0, _even(holds_LWE[0])
    for weight_EE, holds_WE in zip(weights_JEE, holds_LWE[1:], strict=True):
        arriving_WE = at_EW.T @ weight_EE
        total += float(arriving_WE[~holds_WE].sum())
        at_EW = _arrive(arriving_WE, holds_WE)
    return total


def _add_only(weights_JEE: np.ndarray, holds_LWE: np.ndarray, slots: int) -> np.ndarray:
    holds_LWE, at_EW = holds_LWE.copy(), _even(holds_LWE[0])
    for layer, weight_EE in enumerate(weights_JEE, 1):
        arriving_WE, holds_WE = at_EW.T @ weight_EE, holds_LWE[layer]
        for rank, room in enumerate(slots - holds_WE.sum(1)):
            more = np.argsort(np.where(holds_WE[rank], -1.0, arriving_WE[rank]))[::-1][: max(int(room), 0)]
            holds_WE[rank, more[arriving_WE[rank, more] > 0]] = True
        at_EW = _arrive(arriving_WE, holds_WE)
    return holds_LWE


def _even(holds_WE: np.ndarray) -> np.ndarray:
    return (holds_WE / holds_WE.sum(0)).T


def _arrive(arriving_WE: np.ndarray, holds_WE: np.ndarray) -> np.ndarray:
    """Where tokens of each expert are computed, [E, W] summing to 1: where they were, else on any of its ranks."""
    even_WE = holds_WE / holds_WE.sum(0)
    there_WE = holds_WE * arriving_WE + even_WE * np.where(holds_WE, 0, arriving_WE).sum(0)
    total_E = there_WE.sum(0)
    return np.where(total_E > 0, there_WE / np.where(total_E > 0, total_E, 1), even_WE).T


def _ahead(weights_JEE: np.ndarray, holds_LWE: np.ndarray) -> np.ndarray:
    """Crossings still to come for a token whose expert e is computed on rank w, [L, E, W]."""
    ahead_LEW = np.zeros((len(holds_LWE), holds_LWE.shape[2], holds_LWE.shape[1]))
    for layer in range(len(weights_JEE) - 1, -1, -1):
        chance_EE = weights_JEE[layer] / np.maximum(weights_JEE[layer].sum(1, keepdims=True), 1e-300)
        holds_WE, later_EW = holds_LWE[layer + 1], ahead_LEW[layer + 1]
        moved_E = 1 + (later_EW * _even(holds_WE)).sum(1)
        ahead_LEW[layer] = chance_EE @ np.where(holds_WE.T, later_EW, moved_E[:, None])
    return ahead_LEW


def _worth(ahead_EW: np.ndarray, holds_WE: np.ndarray) -> np.ndarray:
    return np.maximum(1 + (ahead_EW * _even(holds_WE)).sum(1)[None] - ahead_EW.T, 0.0)


def _take(saved_WE: np.ndarray, slots: int) -> np.ndarray:
    """The ``slots`` experts of each rank that save most; experts left out replace what is missed least."""
    world, num_experts = saved_WE.shape
    holds_WE = np.zeros((world, num_experts), bool)
    np.put_along_axis(holds_WE, np.argpartition(-saved_WE, slots - 1, axis=1)[:, :slots], True, 1)
    left = np.flatnonzero(~holds_WE.any(0))
    for expert in left[np.argsort(-saved_WE[:, left].max(0), kind="stable")]:
        spare_WE = holds_WE & (holds_WE.sum(0) > 1)
        loss_WE = np.where(spare_WE, saved_WE, np.inf) - saved_WE[:, expert][:, None]
        rank, given = np.unravel_index(loss_WE.argmin(), loss_WE.shape)
        holds_WE[rank, given], holds_WE[rank, expert] = False, True
    return holds_WE
