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

SMALL_BATCH_CHOICES = 128  # of an expert in the mean, up to which reading experts takes the time (H200, Mixtral-8x7B)
TURNS = 64  # of a table: replicas take turns by row, rows 64 apart alike, whatever the number of replicas
_POURS = 4  # rounds in which every group is poured, before chains
_MOST_EXACT_RANKS = 512  # beyond, pouring is not finished by chains: they take too long
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

    @cached_property
    def _order_GW(self) -> np.ndarray:
        """The ranks of each group first, in rank order."""
        return np.argsort(~self.group_holds_GW, axis=1, kind="stable")

    def ranks(self, experts_N: np.ndarray, sender_N: np.ndarray, row_N: np.ndarray, small: bool) -> np.ndarray:
        """Rank that computes each choice of row ``row_N`` of rank ``sender_N``; -1 where the expert is -1.

        Replicas take turns by row; senders begin with different ones.
        """
        experts = np.maximum(experts_N, 0)
        if small:
            return np.where(experts_N < 0, -1, self.small_E[experts])
        group_N = self.group_WE[sender_N, experts]
        counts_G, order_GW = self.group_holds_GW.sum(1).clip(min=1), self._order_GW  # a node may hold no replica
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

    def ranks_poured(
        self, experts_NK: np.ndarray, sender_N: np.ndarray, batch_N: np.ndarray, batches: int
    ) -> np.ndarray:
        """Rank that computes each choice where counts are known, for many batches of rows at once; -1 for expert -1.

        What a group's rows give each of its ranks (``pour``) is filled in the order of senders, then of their rows.
        """
        world, sender_NK = len(self.slots_WE), np.broadcast_to(sender_N[:, None], experts_NK.shape)
        group_NK = np.where(experts_NK < 0, -1, self.group_WE[sender_NK, np.maximum(experts_NK, 0)])
        ranks_NK = np.where(experts_NK < 0, -1, sender_NK)
        batch_NK = np.broadcast_to(batch_N[:, None], experts_NK.shape)
        stays_NK, travels_NK = (experts_NK >= 0) & (group_NK < 0), group_NK >= 0
        groups = len(self.group_holds_GW)
        key_F = batch_NK[travels_NK] * groups + group_NK[travels_NK]
        counts_BG = np.bincount(key_F, minlength=batches * groups).reshape(batches, groups)
        fixed_F = batch_NK[stays_NK] * world + sender_NK[stays_NK]
        fixed_BW = np.bincount(fixed_F, minlength=batches * world).reshape(batches, world)
        _, rank_X, rows_BX = _pour(counts_BG, fixed_BW, self.group_holds_GW)
        order_F = np.argsort(key_F * world + sender_NK[travels_NK], kind="stable")
        ranks_F = np.empty(len(key_F), np.int64)
        ranks_F[order_F] = np.repeat(np.tile(rank_X, batches), rows_BX.ravel())
        ranks_NK[travels_NK] = ranks_F
        return ranks_NK

    def pour(self, counts_SE: np.ndarray) -> np.ndarray:
        """Rows of each group for each rank so that the busiest rank has as few as can be: int64 [G, W].

        Args:
            counts_SE: rows of each expert on each rank that has rows: [W, E], or [1, E] where all have the same.
        """
        senders = self.group_WE[: len(counts_SE)]
        free_N = senders >= 0
        counts_G = np.bincount(senders[free_N], counts_SE[free_N], minlength=len(self.group_holds_GW)).astype(np.int64)
        fixed_W = np.zeros(len(self.slots_WE), np.int64)
        if not self.rows_everywhere:
            fixed_W = (counts_SE * ~free_N).sum(1)
        return pour_batches(counts_G[None], fixed_W[None], self.group_holds_GW)[0]


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


def pour_batches(counts_BG: np.ndarray, fixed_BW: np.ndarray, holds_GW: np.ndarray) -> np.ndarray:
    """Rows of each group for each rank that holds it, the busiest rank's total as small as whole rows allow.

    A smallest-maximum flow, for many batches at once. Groups are poured one after the other, the least free first, into
    the lowest of their ranks; a few times each group's rows are taken out and poured again; then, while some chain of
    groups leads from a busiest rank to one with at least two rows less, rows move along it. When no such chain is left
    the ranks that chains reach are as even as they can be, which is the optimum (no cut is violated).

    Args:
        counts_BG: rows of each group (an expert's, or those of one node's senders) that any of its ranks may take.
        fixed_BW: rows each rank already has.
        holds_GW: bool, the ranks of each group.

    Returns:
        int64 [B, G, W], zero where a rank is not the group's, rows summing to ``counts_BG``.
    """
    group_X, rank_X, rows_BX = _pour(counts_BG, fixed_BW, holds_GW)
    rows_BGW = np.zeros((len(counts_BG), *holds_GW.shape), np.int64)
    rows_BGW[:, group_X, rank_X] = rows_BX
    return rows_BGW


def _pour(counts_BG: np.ndarray, fixed_BW: np.ndarray, holds_GW: np.ndarray):
    """``pour_batches`` without its zeros: group and rank of every place where rows may go, rising, and rows [B, X]."""
    used_G = (counts_BG > 0).any(0)
    group_X, rank_X = np.nonzero(holds_GW & used_G[:, None])
    copies_G = np.bincount(group_X, minlength=len(used_G))
    if (used_G & (copies_G == 0)).any():
        raise ValueError("a group of rows has no rank")
    single_X = copies_G[group_X] == 1
    rows_BX = np.where(single_X, counts_BG[:, group_X], 0).astype(np.int64)
    load_BW = np.asarray(fixed_BW, np.int64).copy()
    np.add.at(load_BW.T, rank_X[single_X], rows_BX[:, single_X].T)
    ends_G = copies_G.cumsum()
    free = [int(g) for g in np.argsort(copies_G, kind="stable") if copies_G[g] > 1]
    places = [slice(ends_G[group] - copies_G[group], ends_G[group]) for group in free]
    for _ in range(_POURS if len(free) > 1 else 1):
        peak_B = load_BW.max(1)
        for group, of_group in zip(free, places, strict=True):
            ranks = rank_X[of_group]
            without_BC = load_BW[:, ranks] - rows_BX[:, of_group]
            rows_BX[:, of_group] = poured_BC = _fill(without_BC, counts_BG[:, group])
            load_BW[:, ranks] = without_BC + poured_BC
        if (load_BW.max(1) == peak_B).all():
            break
    if len(free) > 1 and holds_GW.shape[1] <= _MOST_EXACT_RANKS:
        of_free_X = ~single_X
        number_G = np.zeros(len(used_G), np.int64)
        number_G[free] = np.arange(len(free))
        group_F, rank_F = number_G[group_X[of_free_X]], rank_X[of_free_X]
        rows_BFW = np.zeros((len(counts_BG), len(free), holds_GW.shape[1]), np.int64)
        rows_BFW[:, group_F, rank_F] = rows_BX[:, of_free_X]
        for batch in _not_even(rows_BFW, load_BW, holds_GW[free]):
            _move_along_chains(rows_BFW[batch], load_BW[batch], holds_GW[free])
        rows_BX[:, of_free_X] = rows_BFW[:, group_F, rank_F]
    return group_X, rank_X, rows_BX


def _fill(load_BC: np.ndarray, rows_B: np.ndarray) -> np.ndarray:
    """Pours ``rows_B`` into vessels that already hold ``load_BC``, always into the lowest of a batch."""
    order_BC = np.argsort(load_BC, axis=1, kind="stable")
    levels_BC = np.take_along_axis(load_BC, order_BC, 1)
    place_C = np.arange(load_BC.shape[1])
    sums_BC = levels_BC.cumsum(1)
    used_B = np.maximum((place_C * levels_BC - sums_BC + levels_BC < rows_B[:, None]).sum(1), 1)
    target_B, extra_B = np.divmod(rows_B + np.take_along_axis(sums_BC, used_B[:, None] - 1, 1)[:, 0], used_B)
    poured_BC = target_B[:, None] - levels_BC + (place_C < extra_B[:, None])
    poured_BC[place_C >= used_B[:, None]] = 0
    back_BC = np.empty_like(poured_BC)
    np.put_along_axis(back_BC, order_BC, poured_BC, 1)
    return back_BC


def _not_even(rows_BGW: np.ndarray, load_BW: np.ndarray, holds_GW: np.ndarray) -> np.ndarray:
    """Batches whose busiest rank a chain of groups leads from to a rank with at least two rows less."""
    peak_B = load_BW.max(1)
    found_B = np.flatnonzero(peak_B - load_BW.min(1) > 1)
    if not len(found_B):
        return found_B
    gives_BWG = (rows_BGW[found_B] > 0).swapaxes(1, 2).astype(np.float32)
    reached_BW = load_BW[found_B] == peak_B[found_B, None]
    for _ in range(len(holds_GW)):
        groups_BG = np.einsum("bw,bwg->bg", reached_BW.astype(np.float32), gives_BWG) > 0
        more_BW = reached_BW | (groups_BG.astype(np.float32) @ holds_GW > 0)
        if (more_BW == reached_BW).all():
            break
        reached_BW = more_BW
    lowest_B = np.where(reached_BW, load_BW[found_B], np.iinfo(np.int64).max).min(1)
    return found_B[peak_B[found_B] - lowest_B > 1]


def _move_along_chains(rows_GW: np.ndarray, load_W: np.ndarray, holds_GW: np.ndarray) -> None:
    while (move := _improving_chain(rows_GW, load_W, holds_GW)) is not None:
        chain, amount = move
        for giver, group, taker in chain:
            rows_GW[group, giver] -= amount
            rows_GW[group, taker] += amount
        load_W[chain[0][0]] -= amount
        load_W[chain[-1][2]] += amount


def _improving_chain(rows_GW: np.ndarray, load_W: np.ndarray, holds_GW: np.ndarray):
    """A way to move rows from a busiest rank to one that has at least two less: ([(giver, group, taker)…], rows)."""
    start = int(load_W.argmax())
    came_from: dict[int, tuple[int, int] | None] = {start: None}
    queue, seen_G = [start], np.zeros(len(rows_GW), bool)
    for giver in queue:
        for group in np.flatnonzero((rows_GW[:, giver] > 0) & ~seen_G):
            seen_G[group] = True
            for taker in np.flatnonzero(holds_GW[group]):
                if int(taker) not in came_from:
                    came_from[int(taker)] = (giver, int(group))
                    queue.append(int(taker))
    end = min(queue, key=lambda rank: (load_W[rank], rank))
    if load_W[start] - load_W[end] < 2:
        return None
    chain, taker = [], end
    while (step := came_from[taker]) is not None:
        chain.append((step[0], step[1], taker))
        taker = step[0]
    chain.reverse()
    room = int(load_W[start] - load_W[end]) // 2
    return chain, min(room, *(int(rows_GW[group, giver]) for giver, group, _ in chain))
