"""Plans of many layers at once, and the evenest ranks that pouring can give them: water filling and a local search.

Loads of a replicated expert may be divided between its ranks in any parts (``planning.replicas``). What a slot has of
its expert's load is its amount; a rank's load is the sum of its slots' amounts, the peak that of the heaviest rank.

    slots_BWS   expert of each slot, -1 empty, -2 not there
    amount_BWS  its part of the expert's load
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 12  # of pouring, at most: it stops where peaks stop falling
_SETTLED = 1e-5  # of the peak, by which a round of pouring must lower it


def pour(slots_BWS: np.ndarray, loads_BE: np.ndarray, rounds: int = _ROUNDS) -> np.ndarray:
    """Amounts [B, W, S] with the least peak: each expert's load is poured again and again into its lightest ranks.

    That is coordinate descent on the sum of squared loads, whose minimum has the least peak as well.
    """
    batches, world, slots = slots_BWS.shape
    loads_BE = np.pad(loads_BE, ((0, 0), (0, 1)))
    copies_BE = count_copies(slots_BWS, loads_BE.shape[1] - 1)
    flat_BX = np.where(slots_BWS >= 0, slots_BWS, -1).reshape(batches, -1)
    copies_BX = np.take_along_axis(copies_BE, flat_BX, 1) * (flat_BX >= 0)
    amount_BX = np.where(copies_BX > 0, np.take_along_axis(loads_BE, flat_BX, 1) / np.maximum(copies_BX, 1), 0.0)
    load_BW = amount_BX.reshape(slots_BWS.shape).sum(2)
    many_BX = copies_BX > 1
    if not many_BX.any():
        return amount_BX.reshape(slots_BWS.shape)
    place_BMC, expert_BM = _places(flat_BX, many_BX, copies_BE)
    rows_B1 = np.arange(batches)[:, None]
    real_BMC = place_BMC >= 0
    # the amount of an absent place lies on an absent rank, infinitely high
    amount_BX = np.pad(amount_BX, ((0, 0), (0, 1)))
    load_BW = np.pad(load_BW, ((0, 0), (0, 1)), constant_values=np.inf)
    rank_BMC = np.where(real_BMC, place_BMC // slots, world)
    wanted_BM = np.take_along_axis(loads_BE, expert_BM, 1)
    used_BM = real_BMC.any(2)
    peak_B = load_BW[:, :-1].max(1)
    for _ in range(rounds):
        for m in range(place_BMC.shape[1]):
            rank_BC, place_BC, real_BC = rank_BMC[:, m], place_BMC[:, m], real_BMC[:, m]
            base_BC = np.where(real_BC, load_BW[rows_B1, rank_BC] - amount_BX[rows_B1, place_BC], np.inf)
            poured_BC = np.where(used_BM[:, m, None] & real_BC, fill(base_BC, wanted_BM[:, m]), 0.0)
            amount_BX[rows_B1, place_BC] = poured_BC
            load_BW[rows_B1, rank_BC] = base_BC + poured_BC
        before_B, peak_B = peak_B, load_BW[:, :-1].max(1)
        if (before_B - peak_B <= _SETTLED / rounds * _ROUNDS * peak_B).all():
            break
    return amount_BX[:, :-1].reshape(slots_BWS.shape)


def fill(base_BC: np.ndarray, wanted_B: np.ndarray) -> np.ndarray:
    """What each vessel, filled to ``base_BC``, gets of ``wanted_B`` poured into the lowest; infinite ones get none."""
    sorted_BC = np.sort(base_BC, axis=1)
    finite_BC = np.isfinite(sorted_BC)
    sums_BC = np.where(finite_BC, sorted_BC, 0.0).cumsum(1)
    level_BC = (wanted_B[:, None] + sums_BC) / np.arange(1, base_BC.shape[1] + 1)
    used_B = np.maximum((finite_BC & (sorted_BC < level_BC)).sum(1), 1)
    level_B = np.take_along_axis(level_BC, used_B[:, None] - 1, 1)
    return np.maximum(level_B - base_BC, 0.0)


def count_copies(slots_BWS: np.ndarray, num_experts: int) -> np.ndarray:
    """Replicas of each expert: int [B, E + 1]; the last is of no expert and 0."""
    batches = len(slots_BWS)
    flat_BX = np.where(slots_BWS >= 0, slots_BWS, num_experts).reshape(batches, -1)
    keys = (np.arange(batches)[:, None] * (num_experts + 1) + flat_BX).ravel()
    copies_BE = np.bincount(keys, minlength=batches * (num_experts + 1)).reshape(batches, -1)
    copies_BE[:, -1] = 0
    return copies_BE


def _places(flat_BX: np.ndarray, many_BX: np.ndarray, copies_BE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots [B, M, C] of the replicated experts [B, M], fewest copies first; -1 fills up."""
    batches, experts = copies_BE.shape
    most, count_B = int(copies_BE.max()), (copies_BE > 1).sum(1)
    order_BE = np.argsort(np.where(copies_BE > 1, copies_BE, most + 1), axis=1, kind="stable")
    expert_BM = order_BE[:, : int(count_B.max())]
    number_BE = np.zeros((batches, experts), np.int64)
    np.put_along_axis(number_BE, order_BE, np.arange(experts)[None], 1)
    batch_N, place_N = np.nonzero(many_BX)
    expert_N = flat_BX[batch_N, place_N]
    order_N = np.lexsort((place_N, expert_N, batch_N))
    batch_N, place_N, expert_N = batch_N[order_N], place_N[order_N], expert_N[order_N]
    key_N = batch_N * experts + expert_N
    starts_N = np.r_[True, key_N[1:] != key_N[:-1]]
    nth_N = np.arange(len(key_N)) - np.maximum.accumulate(np.where(starts_N, np.arange(len(key_N)), 0))
    place_BMC = np.full((batches, expert_BM.shape[1], most), -1)
    place_BMC[batch_N, number_BE[batch_N, expert_N], nth_N] = place_N
    return place_BMC, expert_BM


def holds(slots_BWS: np.ndarray, num_experts: int) -> np.ndarray:
    """Which rank has which expert: bool [B, W, E]."""
    batches, world, _ = slots_BWS.shape
    found = np.zeros((batches, world, num_experts + 2), bool)
    found[np.arange(batches)[:, None, None], np.arange(world)[:, None], slots_BWS] = True
    return found[:, :, :num_experts]


def improve(slots_BWS: np.ndarray, loads_BE: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """A local search: slots and peaks [B]. Swaps, then a replica turned into another expert's, poured again in between.

    A layer is done where neither lowers its peak.
    """
    slots_BWS = slots_BWS.copy()
    best_BWS, active = slots_BWS.copy(), np.arange(len(slots_BWS))
    peak_B = np.full(len(slots_BWS), np.inf)
    even_B = loads_BE.sum(1) / slots_BWS.shape[1]
    for _ in range(rounds):
        amount = pour(slots_BWS[active], loads_BE[active])
        peaks = amount.sum(2).max(1)
        better = peaks < peak_B[active] * (1 - 1e-9)
        best_BWS[active[better]], peak_B[active[better]] = slots_BWS[active[better]], peaks[better]
        going = better & (peaks > even_B[active] * (1 + 1e-4))
        active = active[going]
        if not len(active):
            break
        part, amount = slots_BWS[active], amount[going]
        swapped = swap_down(part, amount, loads_BE.shape[1])
        stuck = np.flatnonzero(~swapped)
        if len(stuck):
            piece = part[stuck]
            change_replica(piece, amount[stuck], loads_BE[active[stuck]])
            part[stuck] = piece
        slots_BWS[active] = part
    return best_BWS, peak_B


def swap_down(slots_BWS: np.ndarray, amount_BWS: np.ndarray, num_experts: int, steps: int = 400) -> np.ndarray:
    """Swaps slots of the heaviest rank with another's, amounts and all, while that lowers the heavier of the two.

    In place. Returns bool [B], whether anything was swapped.
    """
    done_B, changed_B = np.zeros(len(slots_BWS), bool), np.zeros(len(slots_BWS), bool)
    for _ in range(steps):
        active = np.flatnonzero(~done_B)
        if not len(active):
            break
        moved = _swap_once(slots_BWS, amount_BWS, active, num_experts)
        done_B[active[~moved]] = True
        changed_B[active[moved]] = True
    return changed_B


def _swap_once(slots_BWS: np.ndarray, amount_BWS: np.ndarray, active: np.ndarray, num_experts: int) -> np.ndarray:
    slots, amount = slots_BWS[active], amount_BWS[active]
    batches, world, size = slots.shape
    rows = np.arange(batches)
    load_BW = amount.sum(2)
    heavy_B = load_BW.argmax(1)
    peak_B = load_BW[rows, heavy_B]
    mine_BS, weight_BS = slots[rows, heavy_B], amount[rows, heavy_B]
    # may the other rank take what is given, and the heavy one what comes back
    gives_BSWT = (mine_BS >= 0)[:, :, None] & ~(slots[:, None] == mine_BS[:, :, None, None]).any(3)
    takes_BWT = (slots >= -1) & ~(slots[:, :, :, None] == np.where(mine_BS >= 0, mine_BS, -3)[:, None, None]).any(3)
    change_BSWT = weight_BS[:, :, None, None] - amount[:, None]
    other_BSWT = load_BW[:, None, :, None] + change_BSWT
    value_BSWT = np.maximum(peak_B[:, None, None, None] - change_BSWT, other_BSWT)
    value_BSWT[~(gives_BSWT[..., None] & takes_BWT[:, None])] = np.inf
    value_BSWT[rows, :, heavy_B] = np.inf
    flat = value_BSWT.reshape(batches, -1)
    best_B = flat.argmin(1)
    moved = flat[rows, best_B] < peak_B * (1 - 1e-9)
    s_B, w_B, t_B = np.unravel_index(best_B, (size, world, size))
    b, s, w, t, h = active[moved], s_B[moved], w_B[moved], t_B[moved], heavy_B[moved]
    for array in (slots_BWS, amount_BWS):
        array[b, h, s], array[b, w, t] = array[b, w, t].copy(), array[b, h, s].copy()
    return moved


def change_replica(slots_BWS: np.ndarray, amount_BWS: np.ndarray, loads_BE: np.ndarray) -> None:
    """Turns one slot of a rank, empty or of a replica, into an expert of the heaviest rank, where that helps most.

    In place. What helps is estimated: the heavy expert's amount is evened out between the two ranks, the given-up
    replica's goes to its lightest other rank.
    """
    batches, world, size = slots_BWS.shape
    rows = np.arange(batches)
    experts = loads_BE.shape[1]
    load_BW = amount_BWS.sum(2)
    heavy_B = load_BW.argmax(1)
    peak_B = load_BW[rows, heavy_B]
    mine_BS, weight_BS = slots_BWS[rows, heavy_B], amount_BWS[rows, heavy_B]
    copies_BE = count_copies(slots_BWS, experts)
    holds_BWE = holds(slots_BWS, experts)
    free_BWT = (slots_BWS == -1) | (np.take_along_axis(copies_BE[:, None], slots_BWS, 2) > 1)
    free_BWT &= slots_BWS != -2
    # the lightest and the second lightest rank of each expert, for what a given-up replica had
    level_BWE = np.where(holds_BWE, load_BW[:, :, None], np.inf)
    lightest_BE = level_BWE.argmin(1)
    least_BE = level_BWE.min(1)
    np.put_along_axis(level_BWE, lightest_BE[:, None], np.inf, 1)
    second_BE = level_BWE.min(1)
    expert_BWT = np.maximum(slots_BWS, 0)
    index = rows[:, None, None], expert_BWT
    elsewhere = np.where(lightest_BE[index] == np.arange(world)[:, None], second_BE[index], least_BE[index])
    grows_BWT = np.where(slots_BWS == -1, 0.0, elsewhere + amount_BWS)
    even_BWT = (peak_B[:, None, None] + load_BW[:, :, None] - amount_BWS) / 2
    value_BWTS = np.maximum(even_BWT[..., None], (peak_B[:, None] - weight_BS)[:, None, None])
    value_BWTS = np.maximum(value_BWTS, grows_BWT[..., None])
    has_BWS = np.take_along_axis(holds_BWE, np.maximum(mine_BS, 0)[:, None], 2)
    value_BWTS[~free_BWT] = np.inf
    value_BWTS = np.where((has_BWS | (mine_BS < 0)[:, None])[:, :, None], np.inf, value_BWTS)
    flat = value_BWTS.reshape(batches, -1)
    best_B = flat.argmin(1)
    b = np.flatnonzero(flat[rows, best_B] < peak_B * (1 - 1e-9))
    w, t, s = (x[b] for x in np.unravel_index(best_B, (world, size, size)))
    slots_BWS[b, w, t] = mine_BS[b, s]
