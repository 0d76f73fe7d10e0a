"""Where the layer computes each choice of a trace and which rows travel for it: many steps at once, in numpy.

Rows are grouped: a group is a step, or a chunk of one. ``source_T`` is the rank a row is on, ``group_T`` its group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.replicas import one_holder, spread_rows

# (counts_GE of rows that are free to go to any replica, fixed_GW rows at home, holds_WE) -> rows [G, E, W]
Spread = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


FEW_RANKS = 32


def share_out(counts_GE: np.ndarray, fixed_GW: np.ndarray, holds_WE: np.ndarray) -> np.ndarray:
    """Rows of each expert for each of its replicas: as the layer does for up to ``FEW_RANKS``, else by ``pour``."""
    if len(holds_WE) > FEW_RANKS:
        return pour(counts_GE, fixed_GW, holds_WE)
    return np.stack([spread_rows(c, fixed, holds_WE) for c, fixed in zip(counts_GE, fixed_GW, strict=True)])


def pour(counts_GE: np.ndarray, fixed_GW: np.ndarray, holds_WE: np.ndarray) -> np.ndarray:
    """Rows of each expert for each of its replicas: expert after expert, into the rank with the least so far.

    Experts with fewer replicas go first. The layer starts so too and then moves rows along chains of replicas until
    no rank can be relieved (``replicas.spread_rows``); that finer spread takes too long for thousands of ranks.
    """
    groups, (world_size, num_experts) = len(counts_GE), holds_WE.shape
    rows_GEW = np.zeros((groups, num_experts, world_size), np.int64)
    load_GW = fixed_GW.astype(np.int64)
    copies_E = holds_WE.sum(0)
    for expert in np.argsort(copies_E, kind="stable"):
        if counts_GE[:, expert].any():
            ranks = np.flatnonzero(holds_WE[:, expert])
            poured_GC = _fill(load_GW[:, ranks], counts_GE[:, expert])
            rows_GEW[:, expert, ranks] = poured_GC
            load_GW[:, ranks] += poured_GC
    return rows_GEW


def _fill(load_GC: np.ndarray, rows_G: np.ndarray) -> np.ndarray:
    """Pours ``rows_G`` into vessels that already hold ``load_GC``, always into the lowest of a group."""
    order_GC = np.argsort(load_GC, axis=1, kind="stable")
    levels_GC = np.take_along_axis(load_GC, order_GC, 1)
    place_C = np.arange(load_GC.shape[1])
    below_GC = levels_GC.cumsum(1) - levels_GC
    used_G = np.maximum((place_C * levels_GC - below_GC < rows_G[:, None]).sum(1), 1)
    filled_G = np.take_along_axis(levels_GC.cumsum(1), used_G[:, None] - 1, 1)[:, 0]
    target_G, extra_G = np.divmod(rows_G + filled_G, used_G)
    poured_GC = target_G[:, None] - levels_GC + (place_C < extra_G[:, None])
    poured_GC[place_C >= used_G[:, None]] = 0
    back_GC = np.empty_like(poured_GC)
    np.put_along_axis(back_GC, order_GC, poured_GC, 1)
    return back_GC


@dataclass(frozen=True)
class Holders:
    """Who holds what in one layer of a plan."""

    holds_WE: np.ndarray
    replicas_EW: np.ndarray

    @classmethod
    def of(cls, plan: ExpertPlan, layer: int) -> Holders:
        """``replicas_EW``: the ranks of each expert's replicas first, in rank order."""
        holds_WE = plan.holds_LWE[layer]
        return cls(holds_WE, np.argsort(~holds_WE.T, axis=1, kind="stable"))

    def has_choice(self, rows_are_everywhere: bool) -> bool:
        """Whether some choice may be computed on one of several ranks."""
        copies_E = self.holds_WE.sum(0)
        most = len(self.holds_WE) if not rows_are_everywhere else len(self.holds_WE) + 1
        return bool(((copies_E > 1) & (copies_E < most)).any())

    def assign(
        self, experts_TK: np.ndarray, source_T: np.ndarray, group_T: np.ndarray, groups: int, spread: Spread,
        rows_are_everywhere: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Rank that computes each choice, -1 where the choice is -1: at home if it can be, else spread evenly.

        Rows of a group and source must stand in the order in which the rank has them.
        """
        world_size, num_experts = self.holds_WE.shape
        kept_TK = experts_TK >= 0
        home_TK = kept_TK & self.holds_WE[source_T[:, None], experts_TK] & (not rows_are_everywhere)
        ranks_TK = np.where(home_TK, source_T[:, None], self.replicas_EW[experts_TK, 0])
        ranks_TK[~kept_TK] = -1
        if not self.has_choice(rows_are_everywhere):
            return ranks_TK
        free_TK = kept_TK & ~home_TK
        group_TK = np.broadcast_to(group_T[:, None], experts_TK.shape)
        source_TK = np.broadcast_to(source_T[:, None], experts_TK.shape)
        keys_N = group_TK[free_TK] * num_experts + experts_TK[free_TK]
        counts_GE = np.bincount(keys_N, minlength=groups * num_experts).reshape(groups, num_experts)
        at_home_N = group_TK[home_TK] * world_size + source_TK[home_TK]
        fixed_GW = np.bincount(at_home_N, minlength=groups * world_size).reshape(groups, world_size)
        shares = spread(counts_GE, fixed_GW, self.holds_WE).ravel()
        # An expert's rows, by source and then in the source's order, fill its ranks' shares one after the other.
        order_N = np.argsort(keys_N * world_size + source_TK[free_TK], kind="stable")
        given_N = np.repeat(np.tile(np.arange(world_size), groups * num_experts), shares)
        free_ranks_N = np.empty(len(keys_N), np.int64)
        free_ranks_N[order_N] = given_N
        ranks_TK[free_TK] = free_ranks_N
        return ranks_TK

    def assign_in_turn(
        self, experts_TK: np.ndarray, source_T: np.ndarray, row_T: np.ndarray, rows_are_everywhere: bool = False
    ) -> np.ndarray:
        """The same without counting: row ``row_T`` of a rank takes replica ``row % replicas``."""
        kept_TK = experts_TK >= 0
        home_TK = self.holds_WE[source_T[:, None], experts_TK] & (not rows_are_everywhere)
        turn_TK = row_T[:, None] % self.holds_WE.sum(0)[experts_TK]
        ranks_TK = np.where(home_TK, source_T[:, None], self.replicas_EW[experts_TK, turn_TK])
        ranks_TK[~kept_TK] = -1
        return ranks_TK

    def assign_to_one(self, experts_TK: np.ndarray) -> np.ndarray:
        """Each expert's choices to one of its holders, as steps of few rows do."""
        one_WE = one_holder(np.where(self.holds_WE, 0, -1))
        return np.where(experts_TK >= 0, (one_WE >= 0).argmax(0)[experts_TK], -1)


def cut_to_capacity(
    plan: ExpertPlan, home_SE: np.ndarray, experts_TK: np.ndarray, weights_TK: np.ndarray | None, place_T: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Choices over a cold expert's capacity become -1, or another expert; with the numbers dropped and rerouted.

    The heaviest choices stay, the earlier of equal ones (all are equal where the trace has no weights, or the plan's
    ``cut_order`` is ``"arrival"``). A trace does not know a row's next-best experts: ``reroute`` offers those after the
    choice's own, by id.

    Args:
        home_SE: True where place s (a rank in a step) has the expert at home, which has no limit.
        place_T: place of each row.
    """
    if plan.cold_capacity_factor is None:
        return experts_TK, 0, 0
    (places, num_experts), top_k = home_SE.shape, experts_TK.shape[1]
    tokens_S = np.bincount(place_T, minlength=places)
    share_S = np.ceil(top_k * tokens_S * plan.cold_capacity_factor / num_experts)
    capacity_S = (share_S * plan.cold_token_percent).astype(np.int64)
    experts_N, place_N = experts_TK.ravel().astype(np.int64), np.repeat(place_T, top_k)
    keys_N = place_N * num_experts + experts_N
    by_weight = weights_TK is not None and plan.cut_order == "weight"
    weights_N = weights_TK.ravel().astype(np.float32) if by_weight else np.zeros(len(keys_N))
    over_N = ~home_SE[place_N, experts_N] & (_rank_in_group(keys_N, -weights_N) >= capacity_S[place_N])
    cut_N = np.where(over_N, -1, experts_N)
    if plan.overflow == "drop" or not over_N.any():
        return cut_N.reshape(experts_TK.shape), int(over_N.sum()), 0
    filled = np.bincount(keys_N[~over_N], minlength=places * num_experts).reshape(home_SE.shape)
    room_SE = np.where(home_SE, len(keys_N), capacity_S[:, None] - filled)
    rerouted_TK = _reroute(experts_TK, cut_N.reshape(experts_TK.shape), weights_N, place_N, room_SE)
    dropped = int((rerouted_TK < 0).sum())
    return rerouted_TK, dropped, int(over_N.sum()) - dropped


def _reroute(
    wanted_TK: np.ndarray, cut_TK: np.ndarray, weights_N: np.ndarray, place_N: np.ndarray, room_SE: np.ndarray
) -> np.ndarray:
    num_experts, top_k = room_SE.shape[1], wanted_TK.shape[1]
    found_TK, room_SE = cut_TK.copy(), room_SE.copy()
    for step in range(1, num_experts):
        holes_N = np.flatnonzero(found_TK.ravel() < 0)
        if not len(holes_N):
            break
        row_N = holes_N // top_k
        offer_N = (wanted_TK.ravel()[holes_N].astype(np.int64) + step) % num_experts
        taken = (wanted_TK[row_N] == offer_N[:, None]) | (found_TK[row_N] == offer_N[:, None])
        # Two holes of one row may be offered the same expert: the first takes it.
        _, first = np.unique(row_N * num_experts + offer_N, return_index=True)
        again = np.ones(len(holes_N), bool)
        again[first] = False
        may = ~taken.any(1) & ~again
        keys_N = place_N[holes_N] * num_experts + offer_N
        in_line_N = np.zeros(len(holes_N), np.int64)
        in_line_N[may] = _rank_in_group(keys_N[may], -weights_N[holes_N[may]])
        accepted = may & (in_line_N < room_SE.ravel()[keys_N])
        found_TK.ravel()[holes_N[accepted]] = offer_N[accepted]
        room_SE -= np.bincount(keys_N[accepted], minlength=room_SE.size).reshape(room_SE.shape)
    return found_TK


def _rank_in_group(keys_N: np.ndarray, by_N: np.ndarray) -> np.ndarray:
    """0 for the smallest of ``by_N`` among those of one key, 1 for the next, …; equal ones in order."""
    order_N = np.lexsort((by_N, keys_N))
    sorted_N = keys_N[order_N]
    starts = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])
    lengths = np.diff(np.r_[starts, len(sorted_N)])
    place_N = np.empty(len(keys_N), np.int64)
    place_N[order_N] = np.arange(len(keys_N)) - np.repeat(starts, lengths)
    return place_N


def once_per_member(members_TK: np.ndarray) -> np.ndarray:
    """True for the first choice of a row that goes to its member; False for repeats and for -1."""
    first_TK = members_TK >= 0
    for later in range(1, members_TK.shape[1]):
        for earlier in range(later):
            first_TK[:, later] &= members_TK[:, later] != members_TK[:, earlier]
    return first_TK
