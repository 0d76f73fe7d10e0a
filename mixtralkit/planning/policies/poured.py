"""Plans of many layers at once, and the evenest ranks that pouring can give them: water filling.

Loads of a replicated expert may be divided between its ranks in any parts (``planning.replicas``). What a slot has of
its expert's load is its amount; a rank's load is the sum of its slots' amounts, the peak that of the heaviest rank.

    slots_BWS   expert of each slot, -1 empty, -2 not there
    amount_BWS  its part of the expert's load
"""

from __future__ import annotations

import numpy as np

_FULL = 1e300  # load of a rank that takes nothing
_SETTLED = 4e-7  # of the peak, by which a round of pouring must lower it


def pour(
    slots_BWS: np.ndarray,
    loads_BE: np.ndarray,
    own: float = 0.0,
    part_BWS: np.ndarray | None = None,
    rounds: int = 300,
) -> np.ndarray:
    """Amounts [B, W, S] with the least peak: each expert's load is poured again and again into its lightest ranks.

    That is coordinate descent on the sum of squared loads, whose minimum has the least peak as well.

    Args:
        own: part of an expert's load that each of its ranks has at least: its own tokens', as the layer runs.
        part_BWS: amounts to begin with; None are equal ones.
        rounds: most of them; it stops where no peak falls any more. 0 leaves the amounts as they are.
    """
    batches, world, slots = slots_BWS.shape
    loads_BE = np.pad(loads_BE, ((0, 0), (0, 1)))
    even_B = loads_BE.sum(1) / world
    copies_BE = count_copies(slots_BWS, loads_BE.shape[1] - 1)
    flat_BX = np.where(slots_BWS >= 0, slots_BWS, -1).reshape(batches, -1)
    copies_BX = np.take_along_axis(copies_BE, flat_BX, 1) * (flat_BX >= 0)
    whole_BX = np.take_along_axis(loads_BE, flat_BX, 1) * (flat_BX >= 0)
    amount_BX = whole_BX / np.maximum(copies_BX, 1) if part_BWS is None else part_BWS.reshape(batches, -1)
    many_BX = copies_BX > 1
    if not many_BX.any():
        return amount_BX.reshape(slots_BWS.shape)
    place_BMC, expert_BM = _places(flat_BX, many_BX, copies_BE)
    load_BW = amount_BX.reshape(slots_BWS.shape).sum(2)
    # the amount of an absent place lies on an absent rank, that is full
    load_F, amount_F, least_F = (
        np.pad(x, ((0, 0), (0, 1)), constant_values=filler).ravel()
        for x, filler in ((load_BW, _FULL), (amount_BX, 0.0), (own * whole_BX, 0.0))
    )
    rank_BMC = np.where(place_BMC >= 0, place_BMC // slots, world)
    row_BMC = np.arange(batches)[:, None, None]
    place_BMC = np.where(place_BMC >= 0, place_BMC, world * slots) + row_BMC * (world * slots + 1)
    rank_BMC += row_BMC * (world + 1)
    wanted_BM = np.take_along_axis(loads_BE * (1 - own * copies_BE), expert_BM, 1)
    places = [(place_BMC[:, m], rank_BMC[:, m], wanted_BM[:, m]) for m in range(expert_BM.shape[1])]
    steps = [(place_BC, rank_BC, least_F[place_BC], wanted_B) for place_BC, rank_BC, wanted_B in places]
    ranks_BW = load_F.reshape(batches, -1)[:, :-1]
    peak_B = ranks_BW.max(1)
    for _ in range(rounds):
        for place_BC, rank_BC, least_BC, wanted_B in steps:
            base_BC = load_F[rank_BC] - amount_F[place_BC] + least_BC
            poured_BC = fill(base_BC, wanted_B)
            amount_F[place_BC] = least_BC + poured_BC
            load_F[rank_BC] = base_BC + poured_BC
        before_B, peak_B = peak_B, ranks_BW.max(1)
        if ((before_B - peak_B <= _SETTLED * peak_B) | (peak_B <= even_B * (1 + _SETTLED))).all():
            break
    return amount_F.reshape(batches, -1)[:, :-1].reshape(slots_BWS.shape)


def fill(base_BC: np.ndarray, wanted_B: np.ndarray) -> np.ndarray:
    """What each vessel, filled to ``base_BC``, gets of ``wanted_B`` poured into the lowest; full ones get none."""
    sorted_BC = np.sort(base_BC, axis=1)
    level_BC = (wanted_B[:, None] + sorted_BC.cumsum(1)) / np.arange(1, base_BC.shape[1] + 1)
    used_B = np.maximum((sorted_BC < level_BC).sum(1), 1)
    level_B = level_BC[np.arange(len(used_B)), used_B - 1]
    return np.maximum(level_B[:, None] - base_BC, 0.0)


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
