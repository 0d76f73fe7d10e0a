"""Which replica computes which rows, so that the busiest rank has as little to do as can be."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

FEW_CHOICES = 64  # of an expert in the mean, up to which a step's time is reading experts (H200, Mixtral-8x7B)


def are_few(rows: int, top_k: int, num_experts: int) -> bool:
    """Whether so many rows of all ranks leave experts waiting for their weights, so that replicas do not pay."""
    return rows * top_k <= FEW_CHOICES * num_experts


def one_holder(slots_WE: np.ndarray) -> np.ndarray:
    """Slots of one layer (-1 where not held) with one holder left of each expert, ranks having evenly many.

    For few rows: a replica that computes as well is one more expert to read. The same on every rank; evenly means that
    the most experts of a rank are as few as the plan allows.
    """
    ranks, experts = slots_WE.shape
    for most in range(-(-experts // ranks), experts + 1):
        misses_EP = np.repeat(slots_WE.T < 0, most, axis=1)  # places of the ranks, ``most`` of each
        expert_E, place_E = linear_sum_assignment(misses_EP)
        if not misses_EP[expert_E, place_E].any():
            kept_WE, rank_E = np.full_like(slots_WE, -1), place_E // most
            kept_WE[rank_E, expert_E] = slots_WE[rank_E, expert_E]
            return kept_WE
    raise ValueError("an expert has no slot")


def spread_rows(counts_E: np.ndarray, fixed_W: np.ndarray, holds_WE: np.ndarray) -> np.ndarray:
    """Rows of each expert for each rank that holds it, the busiest rank's total as small as whole rows allow.

    A smallest-maximum flow: rows are pushed to the least busy replica; then, while some chain of experts with two
    replicas leads from a busiest rank to one with at least two rows less, rows move along it. When no such chain is
    left the ranks that chains reach are as even as they can be, which is the optimum (no cut is violated).

    Args:
        counts_E: rows of each expert that are free to go to any of its replicas.
        fixed_W: rows each rank already has.
        holds_WE: bool, who has which expert.

    Returns:
        int64 [E, W], zero where a rank lacks the expert, rows summing to ``counts_E``.
    """
    rows_EW = np.zeros(holds_WE.T.shape, np.int64)
    load_W = np.asarray(fixed_W, np.int64).copy()
    for expert in np.argsort(holds_WE.sum(0), kind="stable"):  # the least free first
        ranks = np.flatnonzero(holds_WE[:, expert])
        rows_EW[expert, ranks] = _fill(load_W[ranks], int(counts_E[expert]))
        load_W += rows_EW[expert]
    while (move := _improving_chain(rows_EW, load_W, holds_WE)) is not None:
        chain, amount = move
        for giver, expert, taker in chain:
            rows_EW[expert, giver] -= amount
            rows_EW[expert, taker] += amount
        load_W[chain[0][0]] -= amount
        load_W[chain[-1][2]] += amount
    return rows_EW


def _fill(load_W: np.ndarray, rows: int) -> np.ndarray:
    """Pours ``rows`` into vessels that already hold ``load_W``, always into the lowest."""
    order = np.argsort(load_W, kind="stable")
    levels = load_W[order]
    used = 1
    while used < len(levels) and int((levels[used] - levels[:used]).sum()) < rows:
        used += 1
    target, extra = divmod(rows + int(levels[:used].sum()), used)
    poured = np.zeros_like(load_W)
    poured[order[:used]] = target - levels[:used]
    poured[order[:extra]] += 1
    return poured


def _improving_chain(rows_EW: np.ndarray, load_W: np.ndarray, holds_WE: np.ndarray):
    """A way to move rows from a busiest rank to one that has at least two less: ([(giver, expert, taker)…], rows)."""
    start = int(load_W.argmax())
    came_from: dict[int, tuple[int, int] | None] = {start: None}
    queue = [start]
    for giver in queue:
        for expert in np.flatnonzero(rows_EW[:, giver] > 0):
            for taker in np.flatnonzero(holds_WE[:, expert]):
                if int(taker) not in came_from:
                    came_from[int(taker)] = (giver, int(expert))
                    queue.append(int(taker))
    end = min(queue, key=lambda rank: (load_W[rank], rank))
    if load_W[start] - load_W[end] < 2:
        return None
    chain = []
    taker = end
    while (step := came_from[taker]) is not None:
        chain.append((step[0], step[1], taker))
        taker = step[0]
    chain.reverse()
    room = int(load_W[start] - load_W[end]) // 2
    return chain, min(room, *(int(rows_EW[expert, giver]) for giver, expert, _ in chain))
