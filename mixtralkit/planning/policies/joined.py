"""Even ranks by joining them: k ranks with k - 1 slots to spare can nearly always be made exactly even.

One after the other, the lightest rank with a free slot takes what it lacks from the heaviest, as a replica of one of
its experts, and is done (Walker's alias method). As the layer runs, a rank keeps the rows of its own tokens, so that a
replica computes a W-th part of its expert's rows at least; experts are chosen that allow for it::

    a 5 b 1 | c 2 _      even is 4      a 3 b 1 | c 2 a 2

So W ranks with F slots to spare are joined to P = max(1, W - F) packs; what is left is to put each expert into one pack
so that all have the same load a rank. Heaviest first, then pairs of packs swap experts with falling temperature, then
the heaviest pack with any other. All layers are done at once.

    items_BPN   experts of each pack, -1 fills up       ranks_BP   how many ranks it is
    slots_BWS   experts of each rank's slots, -1 empty, -2 not there
"""

from __future__ import annotations

import numpy as np

_WORK = 6_000_000  # pairs of experts that annealing may look at
_STEPS = 300  # of annealing, at most
_HEAT, _COLD = 0.02, 1e-5  # its first and last temperature, of squared loads of an even rank
EVEN_ENOUGH = 1e-6  # over the even load, where a layer is done


def join(
    loads_BE: np.ndarray, copies_BE: np.ndarray, lacks_BW: np.ndarray, slots: int, own: float
) -> tuple[np.ndarray, np.ndarray]:
    """Experts of each rank's slots, and what each has of its expert's load, both [B, W, S]; none is twice on a rank.

    Args:
        copies_BE: replicas that the experts would get one by one; packs are made around those with several.
        lacks_BW: ranks that have one slot less; the same number in every layer.
        own: part of an expert's load that is its least on each rank that has it.
    """
    (batches, num_experts), world = loads_BE.shape, lacks_BW.shape[1]
    short = int(lacks_BW[0].sum())
    ranks_BP = _pack_sizes(copies_BE, world, world * slots - short - num_experts)
    packs = ranks_BP.shape[1]
    # ranks that lack a slot go to the last packs, which are the smallest
    most_BP = ranks_BP if slots > 1 else np.ones_like(ranks_BP)
    before_BP = most_BP[:, ::-1].cumsum(1)[:, ::-1] - most_BP
    short_BP = np.clip(short - before_BP, 0, most_BP)
    room_BP = ranks_BP * (slots - 1) + 1 - short_BP if packs > 1 else np.full((batches, 1), num_experts)
    items_BPN = _pack(loads_BE, ranks_BP, room_BP)
    if packs > 1 and items_BPN.shape[2] > 1:
        _anneal(items_BPN, loads_BE, ranks_BP)
        _swap_down(items_BPN, loads_BE, ranks_BP)
    first_BP = ranks_BP.cumsum(1) - ranks_BP
    out_BWS, part_BWS = np.full((batches, world, slots), -1), np.zeros((batches, world, slots))
    for ranks, lacking in {*zip(ranks_BP.ravel().tolist(), short_BP.ravel().tolist(), strict=True)}:
        b_M, p_M = np.nonzero((ranks_BP == ranks) & (short_BP == lacking))
        room_W = slots - (np.arange(ranks) >= ranks - lacking)
        items_MN = items_BPN[b_M, p_M, : room_BP[b_M[0], p_M[0]]]
        rank_MW = first_BP[b_M, p_M, None] + np.arange(ranks)
        index = b_M[:, None], rank_MW
        out_BWS[index], part_BWS[index] = _make_even(items_MN, loads_BE[b_M[:, None], items_MN], room_W, slots, own)
    rows_B1 = np.arange(batches)[:, None]
    from_BW, to_BW = (np.argsort(x, axis=1, kind="stable") for x in ((out_BWS == -2).any(2), lacks_BW))
    out_BWS[rows_B1, to_BW], part_BWS[rows_B1, to_BW] = out_BWS[rows_B1, from_BW], part_BWS[rows_B1, from_BW]
    return out_BWS, part_BWS


def _pack_sizes(copies_BE: np.ndarray, world: int, spare: int) -> np.ndarray:
    """Ranks of each pack [B, P], most first: an expert with c replicas heads c ranks; where that is too many, alike."""
    packs = max(1, world - spare)
    if packs == 1:
        return np.full((len(copies_BE), 1), world)
    sizes_BP = np.ones((len(copies_BE), packs), np.int64)
    heads = min(packs, copies_BE.shape[1])
    sizes_BP[:, :heads] = -np.sort(-copies_BE, axis=1)[:, :heads]
    alike_P = world // packs + (np.arange(packs) < world % packs)
    return np.where((sizes_BP.sum(1) == world)[:, None], sizes_BP, alike_P)


def _pack(loads_BE: np.ndarray, ranks_BP: np.ndarray, room_BP: np.ndarray) -> np.ndarray:
    """Experts of each pack: the heaviest first, each to the pack with room whose ranks are the lightest with it."""
    rows_B, num_experts = np.arange(len(loads_BE)), loads_BE.shape[1]
    order_BE = np.argsort(-loads_BE, axis=1, kind="stable")
    items_BPN = np.full((*ranks_BP.shape, int(room_BP.max())), -1)
    count_BP, load_BP = np.zeros(ranks_BP.shape, np.int64), np.zeros(ranks_BP.shape)
    if ranks_BP.shape[1] == 1:
        return order_BE[:, None]
    for place in range(num_experts):
        item_B = order_BE[:, place]
        weight_B = loads_BE[rows_B, item_B]
        level_BP = np.where(count_BP < room_BP, (load_BP + weight_B[:, None]) / ranks_BP, np.inf)
        pack_B = level_BP.argmin(1)
        items_BPN[rows_B, pack_B, count_BP[rows_B, pack_B]] = item_B
        count_BP[rows_B, pack_B] += 1
        load_BP[rows_B, pack_B] += weight_B
    return items_BPN


def _weights(items_BPN: np.ndarray, loads_BE: np.ndarray, ranks_BP: np.ndarray) -> np.ndarray:
    """Loads of packs' experts in loads of an even rank; NaN where there is none."""
    even_B = loads_BE.sum(1) / ranks_BP.sum(1)
    weights_BPN = np.take_along_axis((loads_BE / even_B[:, None])[:, None], np.maximum(items_BPN, 0), 2)
    return np.where(items_BPN >= 0, weights_BPN, np.nan)


def _anneal(items_BPN: np.ndarray, loads_BE: np.ndarray, ranks_BP: np.ndarray) -> None:
    """Packs meet in random pairs, each swaps the two experts that lower the squared loads most, up to some noise.

    In place.
    """
    (batches, packs, size), half = items_BPN.shape, items_BPN.shape[1] // 2
    steps = min(_STEPS, _WORK // (batches * half * size**2))
    random, rows_B1 = np.random.default_rng(0), np.arange(batches)[:, None]
    weights_BPN = _weights(items_BPN, loads_BE, ranks_BP).astype(np.float32)
    over_BP = np.nansum(weights_BPN, 2) - ranks_BP.astype(np.float32)
    share_BP = 1 / ranks_BP.astype(np.float32)
    for step in range(steps):
        heat = _HEAT * (_COLD / _HEAT) ** (step / max(steps - 1, 1))
        order_BP = random.random((batches, packs), np.float32).argsort(1)
        p_BH, q_BH = order_BP[:, :half], order_BP[:, half : 2 * half]
        change = weights_BPN[rows_B1, p_BH][..., :, None] - weights_BPN[rows_B1, q_BH][..., None, :]
        per_p, per_q = share_BP[rows_B1, p_BH], share_BP[rows_B1, q_BH]
        slope = 2 * (over_BP[rows_B1, q_BH] * per_q - over_BP[rows_B1, p_BH] * per_p)
        worse = change * (slope[..., None, None] + change * (per_p + per_q)[..., None, None])
        worse -= heat * random.standard_exponential(worse.shape, np.float32)
        flat = np.where(np.isnan(worse), np.inf, worse).reshape(batches, half, -1)
        best_BH = flat.argmin(2)
        b, x = np.nonzero(np.take_along_axis(flat, best_BH[..., None], 2)[..., 0] < 0)
        s, t = np.divmod(best_BH[b, x], size)
        p, q, moved = p_BH[b, x], q_BH[b, x], change[b, x, s, t]
        over_BP[b, p] -= moved
        over_BP[b, q] += moved
        for array in (items_BPN, weights_BPN):
            array[b, p, s], array[b, q, t] = array[b, q, t].copy(), array[b, p, s].copy()


def _swap_down(items_BPN: np.ndarray, loads_BE: np.ndarray, ranks_BP: np.ndarray) -> None:
    """The heaviest pack swaps an expert with another pack while that lowers the heavier of the two; in place."""
    weights_BPN = _weights(items_BPN, loads_BE, ranks_BP)
    load_BP, share_BP = np.nansum(weights_BPN, 2), 1 / ranks_BP
    going = np.arange(len(items_BPN))
    while len(going := going[(load_BP[going] * share_BP[going]).max(1) > 1 + EVEN_ENOUGH]):
        rows, load, share = np.arange(len(going)), load_BP[going], share_BP[going]
        heavy = (load * share).argmax(1)
        change = weights_BPN[going, heavy][:, :, None, None] - weights_BPN[going][:, None]
        here = (load[rows, heavy][:, None, None, None] - change) * share[rows, heavy][:, None, None, None]
        peak = np.maximum(here, (load[:, None, :, None] + change) * share[:, None, :, None])
        peak[rows, :, heavy] = np.inf
        flat = np.where(np.isnan(peak), np.inf, peak).reshape(len(going), -1)
        best = flat.argmin(1)
        better = flat[rows, best] < (load * share)[rows, heavy] * (1 - 1e-9)
        s, q, t = (x[better] for x in np.unravel_index(best, peak.shape[1:]))
        b, p, moved = going[better], heavy[better], change[rows[better], s, q, t]
        load_BP[b, p] -= moved
        load_BP[b, q] += moved
        for array in (items_BPN, weights_BPN):
            array[b, p, s], array[b, q, t] = array[b, q, t].copy(), array[b, p, s].copy()
        going = b


def _make_even(
    items_MN: np.ndarray, weights_MN: np.ndarray, room_W: np.ndarray, slots: int, own: float
) -> tuple[np.ndarray, np.ndarray]:
    """Slots and parts [M, W, S] of packs: experts are put on ranks, a slot of each stays free for pieces."""
    (batches, count), world, rows_M = items_MN.shape, len(room_W), np.arange(len(items_MN))
    order_MN = np.argsort(-weights_MN, axis=1, kind="stable")
    slots_MWS = np.where(np.arange(slots) < room_W[:, None], -1, -2) + np.zeros((batches, 1, 1), np.int64)
    part_MWS = np.zeros(slots_MWS.shape)
    load_MW, used_MW = np.zeros((batches, world)), np.zeros((batches, world), np.int64)
    for place in range(count):
        item_M = order_MN[:, place]
        rank_M = np.where(used_MW < room_W - 1, load_MW, np.inf).argmin(1)
        full_M = used_MW[rows_M, rank_M] >= room_W[rank_M] - 1  # the last expert, to the heaviest rank
        rank_M = np.where(full_M, np.where(used_MW < room_W, load_MW, -1.0).argmax(1), rank_M)
        slots_MWS[rows_M, rank_M, used_MW[rows_M, rank_M]] = items_MN[rows_M, item_M]
        part_MWS[rows_M, rank_M, used_MW[rows_M, rank_M]] = weights_MN[rows_M, item_M]
        load_MW[rows_M, rank_M] += weights_MN[rows_M, item_M]
        used_MW[rows_M, rank_M] += 1
    least_MWS, even_M, going = part_MWS * own, weights_MN.sum(1) / world, rows_M
    while len(going):
        rows, load, even = np.arange(len(going)), load_MW[going], even_M[going]
        free = (slots_MWS[going] == -1).any(2)
        low = np.where(free, load, np.inf).argmin(1)
        # a rank with a free slot may give more than it has too much: it will take later
        loose = np.where(free, load, 0.0)
        high = np.where(loose.max(1) > even * (1 + 1e-9), loose.argmax(1), load.argmax(1))
        lacks, over = even - load[rows, low], load[rows, high] - even
        wanted = np.where(free[rows, high], lacks, np.minimum(lacks, over))
        mine, part, least = slots_MWS[going, high], part_MWS[going, high], least_MWS[going, high]
        gives = np.minimum(wanted[:, None], part)
        misses = wanted[:, None] - gives + np.maximum(np.maximum(least - gives, gives - part + least), 0.0)
        there = (mine[:, :, None] == slots_MWS[going, low][:, None]).any(2)
        misses[there | (mine < 0)] = np.inf
        near = misses <= misses.min(1, keepdims=True) + 1e-9 * even[:, None]
        s = np.where(near, part, -1.0).argmax(1)  # of those that fit, the one that can give most if loads change
        gives = gives[rows, s]
        on = (
            free[rows, low] & (lacks > 1e-12 * even) & (over > 1e-9 * even) & (gives > 0) & np.isfinite(misses[rows, s])
        )
        m, low, high, s, gives = going[on], low[on], high[on], s[on], gives[on]
        t = (slots_MWS[m, low] == -1).argmax(1)
        slots_MWS[m, low, t], least_MWS[m, low, t] = slots_MWS[m, high, s], least_MWS[m, high, s]
        part_MWS[m, low, t] = gives
        part_MWS[m, high, s] -= gives
        load_MW[m, low] += gives
        load_MW[m, high] -= gives
        going = m
    return slots_MWS, part_MWS
