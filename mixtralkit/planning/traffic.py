"""The capacity cut of a trace's rows, many steps at once, in numpy."""

from __future__ import annotations

import numpy as np

from mixtralkit.planning.plan import ExpertPlan


def cut_to_capacity(
    plan: ExpertPlan, local_SE: np.ndarray, experts_TK: np.ndarray, weights_TK: np.ndarray | None, place_T: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Choices over a cold expert's capacity become -1, or another expert; with the numbers dropped and rerouted.

    The heaviest choices stay, the earlier of equal ones (all are equal where the trace has no weights, or the plan's
    ``cut_order`` is ``"arrival"``). A trace does not know a row's next-best experts: ``reroute`` offers those after the
    choice's own, by id.

    Args:
        local_SE: True where place s (a rank in a step) has the expert itself, which has no limit.
        place_T: place of each row.
    """
    if plan.cold_capacity_factor is None:
        return experts_TK, 0, 0
    (places, num_experts), top_k = local_SE.shape, experts_TK.shape[1]
    tokens_S = np.bincount(place_T, minlength=places)
    share_S = np.ceil(top_k * tokens_S * plan.cold_capacity_factor / num_experts)
    capacity_S = (share_S * plan.cold_token_percent).astype(np.int64)
    experts_N, place_N = experts_TK.ravel().astype(np.int64), np.repeat(place_T, top_k)
    keys_N = place_N * num_experts + experts_N
    by_weight = weights_TK is not None and plan.cut_order == "weight"
    weights_N = weights_TK.ravel().astype(np.float32) if by_weight else np.zeros(len(keys_N))
    over_N = ~local_SE[place_N, experts_N] & (_rank_in_group(keys_N, -weights_N) >= capacity_S[place_N])
    cut_N = np.where(over_N, -1, experts_N)
    if plan.overflow == "drop" or not over_N.any():
        return cut_N.reshape(experts_TK.shape), int(over_N.sum()), 0
    filled = np.bincount(keys_N[~over_N], minlength=places * num_experts).reshape(local_SE.shape)
    room_SE = np.where(local_SE, len(keys_N), capacity_S[:, None] - filled)
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
