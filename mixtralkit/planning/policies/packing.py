"""Puts weighted items on ranks so that the heaviest rank is light."""

from __future__ import annotations

import numpy as np


def pack_in_order(loads_E: np.ndarray, world_size: int) -> list[list[int]]:
    """Items in order, as equally many on each rank as they divide; loads do not matter."""
    bounds = [len(loads_E) * w // world_size for w in range(world_size + 1)]
    return [list(range(bounds[w], bounds[w + 1])) for w in range(world_size)]


def pack_once(loads_E: np.ndarray, world_size: int) -> list[list[int]]:
    """Each item on one rank, at most ceil(E/W) on a rank: heaviest first to the lightest, then swaps."""
    room = -(-len(loads_E) // world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads_W = np.zeros(world_size)
    for item in np.argsort(-loads_E, kind="stable").tolist():
        rank = min((w for w in range(world_size) if len(ranks[w]) < room), key=lambda w: loads_W[w])
        ranks[rank].append(item)
        loads_W[rank] += loads_E[item]
    holds_WE = np.zeros((world_size, len(loads_E)), bool)
    for rank, items in enumerate(ranks):
        holds_WE[rank, items] = True
    holds_WE = swap_down(holds_WE, loads_E)
    return [np.flatnonzero(holds_E).tolist() for holds_E in holds_WE]


def swap_down(holds_WE: np.ndarray, loads_E: np.ndarray) -> np.ndarray:
    """Swaps an item of the heaviest rank with one of another rank while that makes the heavier of the two lighter.

    Args:
        holds_WE: bool, which rank has which item; an item may be on several ranks, and never twice on one.
        loads_E: what each copy of an item weighs.
    """
    holds_WE = holds_WE.copy()
    loads_W = holds_WE @ loads_E
    while True:
        heavy = int(loads_W.argmax())
        mine = np.flatnonzero(holds_WE[heavy])
        best = (loads_W[heavy] * (1 - 1e-12), None)
        for other in np.flatnonzero(loads_W < loads_W[heavy]):
            give = mine[~holds_WE[other, mine]]
            take = np.flatnonzero(holds_WE[other] & ~holds_WE[heavy])
            if not len(give) or not len(take):
                continue
            change = loads_E[give][:, None] - loads_E[take]
            peak = np.maximum(loads_W[heavy] - change, loads_W[other] + change)
            place = np.unravel_index(peak.argmin(), peak.shape)
            if peak[place] < best[0]:
                best = (peak[place], (other, give[place[0]], take[place[1]]))
        if best[1] is None:
            return holds_WE
        other, given, taken = best[1]
        holds_WE[[heavy, other], [given, taken]] = False
        holds_WE[[other, heavy], [given, taken]] = True
        loads_W = holds_WE @ loads_E
