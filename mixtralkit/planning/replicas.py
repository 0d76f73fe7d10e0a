"""Which replica computes which row: of a plan's layer one table, for every dispatcher, the simulator and the judge.

::

    slots_WE of a layer ─► local: the sender holds the expert ─► that rank, always
                           small batch (``is_small``)          ─► one holder of each expert, for all senders
                           large batch                         ─► holders on the sender's node, else all, in turn by row
                           large batch, counts known           ─► the same holders, poured so that ranks are even
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linear_sum_assignment

from mixtralkit.planning.plan import ExpertPlan

SMALL_BATCH_CHOICES = 64  # of an expert in the mean, up to which a step's time is reading experts (H200, Mixtral-8x7B)
TURNS = 64  # of a table: replicas take turns by row, rows 64 apart alike, whatever the number of replicas
SLOT_BITS = 16  # of a place: rank · 2^16 + slot


def is_small(rows: int, top_k: int, num_experts: int) -> bool:
    """Whether so many rows of all ranks leave experts waiting for their weights, so that replicas do not pay."""
    return rows * top_k <= SMALL_BATCH_CHOICES * num_experts


@dataclass(frozen=True, eq=False)
class ReplicaTable:
    """Who computes an expert's rows in one layer, whichever rank they are on.

    Attributes:
        slots_WE: int slot of each expert on each rank, -1 where it is not held; every expert is held somewhere.
        ranks_per_node: None when all ranks are on one node.
        rows_everywhere: every rank is given the same rows, so that no rank is nearer than another.
    """

    slots_WE: np.ndarray
    ranks_per_node: int | None = None
    rows_everywhere: bool = False

    @classmethod
    def of(cls, plan: ExpertPlan, layer: int, rows_everywhere: bool = False) -> ReplicaTable:
        """Of one layer of a plan."""
        return cls(plan.slot_of_LWE[layer], plan.ranks_per_node, rows_everywhere)

    @property
    def holds_WE(self) -> np.ndarray:
        """True where a rank holds an expert."""
        return self.slots_WE >= 0

    @cached_property
    def local_WE(self) -> np.ndarray:
        """True where rows of a rank never travel for an expert, and no capacity limits them: bool [W, E]."""
        return np.broadcast_to(self.holds_WE.all(0), self.holds_WE.shape) if self.rows_everywhere else self.holds_WE

    @cached_property
    def has_choice(self) -> bool:
        """Whether some row may be computed on one of several ranks, so that pouring can make ranks more even."""
        return bool((self.group_holds_GW[self.group_WE[self.group_WE >= 0]].sum(1) > 1).any())

    @cached_property
    def group_WE(self) -> np.ndarray:
        """Of ``group_holds_GW``, which serves each expert's rows of each rank: int [W, E], -1 for the rank itself."""
        experts, ranks = np.arange(self.slots_WE.shape[1]), np.arange(len(self.slots_WE))
        if self.rows_everywhere:
            return np.broadcast_to(experts, self.slots_WE.shape)
        nodes = len(ranks) // self._per_node
        on_node_NE = self.holds_WE.reshape(nodes, self._per_node, -1).any(1)
        node_W = np.where(nodes == 1, 0, 1 + ranks // self._per_node)
        group_WE = node_W[:, None] * len(experts) + experts
        group_WE = np.where(on_node_NE[ranks // self._per_node], group_WE, experts)
        return np.where(self.holds_WE, -1, group_WE)

    @cached_property
    def group_holds_GW(self) -> np.ndarray:
        """The ranks that may compute a group's rows: bool [G, W]; the experts' holders, then those of each node."""
        nodes = len(self.slots_WE) // self._per_node
        groups = [self.holds_WE.T]
        if nodes > 1 and not self.rows_everywhere:
            node_W = np.arange(len(self.slots_WE)) // self._per_node
            groups += [self.holds_WE.T & (node_W == node) for node in range(nodes)]
        return np.concatenate(groups)

    @property
    def _per_node(self) -> int:
        return self.ranks_per_node or len(self.slots_WE)

    @cached_property
    def small_E(self) -> np.ndarray:
        """Rank that computes all rows of an expert in small batches: int [E]. A replica would be one more to read."""
        return (one_holder(self.slots_WE) >= 0).argmax(0)

    def ranks(self, experts_N: np.ndarray, sender_N: np.ndarray, row_N: np.ndarray, small: bool) -> np.ndarray:
        """Rank that computes each choice of row ``row_N`` of rank ``sender_N``; -1 where the expert is -1.

        Replicas take turns by row; senders begin with different ones.
        """
        experts = np.maximum(experts_N, 0)
        if small:
            return np.where(experts_N < 0, -1, self.small_E[experts])
        group_N = self.group_WE[sender_N, experts]
        counts_G = self.group_holds_GW.sum(1)
        order_GW = np.argsort(~self.group_holds_GW, axis=1, kind="stable")
        start_N = 0 if self.rows_everywhere else sender_N
        turn_N = (row_N % TURNS + start_N) % counts_G[group_N]
        ranks_N = np.where(group_N < 0, sender_N, order_GW[group_N, turn_N])
        return np.where(experts_N < 0, -1, ranks_N)

    def places_EC(self, rank: int, small: bool) -> np.ndarray:
        """For rows of ``rank``: rank · 2^16 + slot that computes expert e for rows t with t mod C = c; int32 [E, C].

        C is ``TURNS``, whatever the plan, so that a new plan's table fits into the old one's memory.
        """
        experts = self.slots_WE.shape[1]
        experts_EC, turn_EC = np.indices((experts, TURNS))
        ranks_EC = self.ranks(experts_EC, np.full_like(turn_EC, rank), turn_EC, small)
        return ((ranks_EC << SLOT_BITS) + self.slots_WE[ranks_EC, experts_EC]).astype(np.int32)

    def pour(self, counts_SE: np.ndarray) -> np.ndarray:
        """Rows of each group for each rank so that the busiest rank has as few as can be: int64 [G, W].

        Args:
            counts_SE: rows of each expert on each rank that has rows: [W, E], or [1, E] where all have the same.
        """
        world = len(self.slots_WE)
        senders = self.group_WE[: len(counts_SE)]
        free_N = senders >= 0
        counts_G = np.bincount(senders[free_N], counts_SE[free_N], minlength=len(self.group_holds_GW)).astype(np.int64)
        fixed_W = np.zeros(world, np.int64)
        if not self.rows_everywhere:
            fixed_W = (counts_SE * ~free_N).sum(1)
        used_G = counts_G > 0
        rows_GW = np.zeros(self.group_holds_GW.shape, np.int64)
        rows_GW[used_G] = spread_rows(counts_G[used_G], fixed_W, self.group_holds_GW[used_G].T)
        return rows_GW


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
