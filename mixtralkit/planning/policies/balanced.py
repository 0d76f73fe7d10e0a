"""Replicates heavy experts and packs replicas so that the busiest rank is light when its replicas' rows are poured.

EPLB's two algorithms begin: in the hierarchical one groups of experts are packed to nodes and each node replicates and
packs its own; the global one has one node. A replica at a time goes to the expert with most load per replica, replicas
are packed heaviest first to the lightest rank with room. Unlike EPLB, a rank never has an expert twice, what is made
even is the load as the layer pours it and not equal parts, and a local search follows. One of its starts is EPLB's own
plan with its duplicates turned into something useful, so the result is never heavier. All layers are searched at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.inputs import Budget, checked_loads
from mixtralkit.planning.policies.packing import swap_down
from mixtralkit.planning.policies.poured import count_copies, holds, improve, pour

_ROUNDS = 30  # of one local search
_KICKS = 6  # times that layers not yet even are disturbed and searched again
_WORK = 20_000  # slots that a search of disturbed copies of all layers may have; with more than that there is none
_LONG = 300  # rounds of pouring where it is decided whether EPLB's own plan was lighter
_EVEN_ENOUGH = 1.0005  # peak/mean at which the search of a layer ends


def balanced(
    loads_LE: np.ndarray,
    world_size: int,
    budget: Budget | None = None,
    ranks_per_node: int | None = None,
    num_groups: int | None = None,
    extra: int | None = None,
) -> ExpertPlan:
    """Replicas in every slot of the budget, so that the heaviest rank of each layer is light; none without a budget.

    Args:
        loads_LE: rows of each expert in a profile.
        ranks_per_node: None for one node.
        num_groups: groups of consecutive experts that stay on one node each (hierarchical); None lets replicas be
            on any node (global).
        extra: slots of a layer, over all ranks, beyond one for each expert, instead of all of the budget's.

    Raises:
        ValueError: for a budget too small, or sizes that do not divide.
    """
    loads_LE, budget = checked_loads(loads_LE, world_size), budget or Budget()
    num_layers, num_experts = loads_LE.shape
    slots = budget.slots(num_layers, num_experts, world_size)
    if extra is None:
        extra = 0 if budget.most_slots(num_layers, num_experts) is None else slots * world_size - num_experts
    slots = -(-(num_experts + extra) // world_size)
    nodes = world_size // (ranks_per_node or world_size)
    if ranks_per_node is not None and nodes * ranks_per_node != world_size:
        raise ValueError(f"ranks_per_node ({ranks_per_node}) must divide world_size ({world_size})")
    groups, nodes = (num_groups, nodes) if num_groups is not None and num_groups % nodes == 0 else (1, 1)
    _check_sizes(num_experts, slots * world_size, groups, nodes, world_size)
    surplus = slots * world_size - num_experts - extra
    return ExpertPlan(
        np.maximum(_search(loads_LE, world_size, slots, groups, nodes, surplus), -1),
        num_experts,
        ranks_per_node=ranks_per_node,
        policy="balanced",
        meta={"num_groups": num_groups},
    )


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """EPLB's interface: hierarchical where ``num_nodes`` divides ``num_groups``, global otherwise.

    Args:
        weight: loads [L, E]; an array, nested lists, or a tensor on the CPU.
        num_replicas: slots of all GPUs; a multiple of ``num_gpus``.

    Returns:
        ``phy2log`` int64 [L, num_replicas], the expert of each slot, GPU after GPU; ``log2phy`` int64 [L, E, X], the
        slots of each expert, filled with -1; ``logcnt`` int64 [L, E], its number of replicas.

    Raises:
        ValueError: for sizes that do not divide, too few slots, or so many that a rank must hold an expert twice.
    """
    loads_LE = checked_loads(weight, num_gpus)
    num_layers, num_experts = loads_LE.shape
    if num_nodes < 1 or num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_sizes(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    phy2log = _search(loads_LE, num_gpus, num_replicas // num_gpus, num_groups, num_nodes)
    return phy2log.reshape(num_layers, num_replicas), *_inverse(phy2log.reshape(num_layers, -1), num_experts)


def _check_sizes(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    for name, value, divisor_name, divisor in (
        ("num_experts", num_experts, "num_groups", num_groups),
        ("num_gpus", num_gpus, "num_nodes", num_nodes),
        ("num_replicas", num_replicas, "num_gpus", num_gpus),
    ):
        if divisor < 1 or value % divisor:
            raise ValueError(f"{name} ({value}) must be a multiple of {divisor_name} ({divisor})")
    if num_replicas < num_experts:
        raise ValueError(f"num_replicas ({num_replicas}) must be at least num_experts ({num_experts})")
    most = num_experts // num_nodes * num_gpus
    if num_replicas > most:
        raise ValueError(f"num_replicas ({num_replicas}) must be at most {most}: no rank holds an expert twice")


def _search(loads_LE: np.ndarray, world_size: int, slots: int, groups: int, nodes: int, surplus: int = 0) -> np.ndarray:
    """Slots [L, W, S], sorted; ``surplus`` ranks of each layer, others in each, have one less (-2)."""
    num_layers = len(loads_LE)
    of_nodes = [
        _experts_of_nodes(loads_LE, groups, nodes, swaps) for swaps in ((False, True) if nodes > 1 else (False,))
    ]
    found, peaks = [], []
    gpus = world_size // nodes
    lacks_LW = np.zeros((num_layers, world_size), bool)
    lacks_LW[
        np.arange(num_layers)[:, None], (np.arange(num_layers)[:, None] * surplus + np.arange(surplus)) % world_size
    ] = True
    for experts_LNE in of_nodes:
        per_node = experts_LNE.shape[2]
        part_BE = np.take_along_axis(loads_LE[:, None], experts_LNE, 2).reshape(-1, per_node)
        slots_BWS, peak_B = spread_replicas(part_BE, gpus, slots, lacks_LW.reshape(-1, gpus))
        real = slots_BWS >= 0
        names = np.take_along_axis(experts_LNE.reshape(-1, 1, per_node), np.maximum(slots_BWS, 0), 2)
        found.append(np.where(real, names, slots_BWS).reshape(num_layers, world_size, slots))
        peaks.append(peak_B.reshape(num_layers, nodes).max(1))
    best_L = np.argmin(peaks, 0)
    chosen = np.stack(found)[best_L, np.arange(num_layers)]
    return -np.sort(-chosen, axis=2) if surplus else np.sort(chosen, axis=2)


def spread_replicas(
    loads_BE: np.ndarray, world_size: int, slots: int, lacks_BW: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Experts of each rank's slots [B, W, S], and the poured peaks [B], of many layers at once.

    Every expert is somewhere, none twice on a rank; needs E ≥ ``slots`` and W · ``slots`` ≥ E.

    Args:
        lacks_BW: ranks that have one slot less, marked -2.
    """
    lacks_BW = np.zeros((len(loads_BE), world_size), bool) if lacks_BW is None else lacks_BW
    starts = [_packed(loads_BE, world_size, slots, lacks_BW, twice) for twice in (True, False)]
    best_BWS, peak_B = improve(starts[0], loads_BE, _ROUNDS)
    other_BWS, other_B = improve(starts[1], loads_BE, _ROUNDS)
    best_BWS[other_B < peak_B], peak_B = other_BWS[other_B < peak_B], np.minimum(peak_B, other_B)
    even_B = loads_BE.sum(1) / world_size
    random = np.random.default_rng(0)  # the same plan for the same loads
    for _ in range(_KICKS):
        open_B = np.flatnonzero(peak_B > even_B * _EVEN_ENOUGH)
        times = min(_WORK // max(len(open_B) * world_size * slots, 1), 24)
        if not len(open_B) or not times:
            break
        tried_B = np.repeat(open_B, times)
        kicked = _kicked(best_BWS[tried_B], loads_BE.shape[1], random)
        kicked, peaks = improve(kicked, loads_BE[tried_B], _ROUNDS)
        winner = peaks.reshape(-1, times).argmin(1) + np.arange(len(open_B)) * times
        better = peaks[winner] < peak_B[open_B] * (1 - 1e-9)
        best_BWS[open_B[better]], peak_B[open_B[better]] = kicked[winner[better]], peaks[winner[better]]
    both = [pour(slots_BWS, loads_BE, _LONG).sum(2).max(1) for slots_BWS in (best_BWS, starts[0])]
    eplb_B = both[1] < both[0]
    best_BWS[eplb_B] = starts[0][eplb_B]
    return best_BWS, np.minimum(*both)


def _experts_of_nodes(loads_LE: np.ndarray, groups: int, nodes: int, swaps: bool) -> np.ndarray:
    """Experts [L, N, E / N] of each node, equally many groups on each: heaviest group first to the lightest node."""
    num_layers, num_experts = loads_LE.shape
    loads_LG = loads_LE.reshape(num_layers, groups, -1).sum(2)
    node_LG = pack_heaviest_first(loads_LG, nodes, np.full((num_layers, nodes), groups // nodes))
    if swaps:
        for layer, loads_G in enumerate(loads_LG):
            holds_NG = swap_down(node_LG[layer] == np.arange(nodes)[:, None], loads_G)
            node_LG[layer] = holds_NG.argmax(0)
    node_LE = np.repeat(node_LG, num_experts // groups, axis=1)
    return np.argsort(node_LE, axis=1, kind="stable").reshape(num_layers, nodes, -1)


def pack_heaviest_first(weights_BX: np.ndarray, packs: int, room_BP: np.ndarray) -> np.ndarray:
    """Pack of each item [B, X]: the heaviest first, each to the lightest pack with room."""
    batches, items = weights_BX.shape
    order_BX = np.argsort(-weights_BX, axis=1, kind="stable")
    pack_BX, rows = np.empty((batches, items), np.int64), np.arange(batches)
    load_BP, room_BP = np.zeros((batches, packs)), room_BP.copy()
    for x in range(items):
        item_B = order_BX[:, x]
        pack_B = np.where(room_BP > 0, load_BP, np.inf).argmin(1)
        pack_BX[rows, item_B] = pack_B
        load_BP[rows, pack_B] += weights_BX[rows, item_B]
        room_BP[rows, pack_B] -= 1
    return pack_BX


def count_replicas(loads_BE: np.ndarray, total_B: np.ndarray, most: int | None = None) -> np.ndarray:
    """Replicas of each expert [B, E]: one each, then one at a time where a replica has most load, ``most`` at most."""
    copies_BE, rows = np.ones(loads_BE.shape, np.int64), np.arange(len(loads_BE))
    for given in range(int(total_B.max()) - loads_BE.shape[1]):
        load_BE = loads_BE / copies_BE
        if most is not None:
            load_BE = np.where(copies_BE < most, load_BE, -1.0)
        copies_BE[rows, load_BE.argmax(1)] += loads_BE.shape[1] + given < total_B
    return copies_BE


def _packed(loads_BE: np.ndarray, world: int, slots: int, lacks_BW: np.ndarray, twice: bool) -> np.ndarray:
    """A start [B, W, S]: EPLB's packing, what a rank has ``twice`` emptied again; or one that never has it twice.

    The second takes an expert's replicas together, to the lightest ranks with room, or if that leaves one over to those
    with most room, which always works out (Gale–Ryser).
    """
    batches, num_experts = loads_BE.shape
    room_BW = slots - lacks_BW.astype(np.int64)
    total_B = room_BW.sum(1)
    copies_BE = count_replicas(loads_BE, total_B, None if twice else world)
    each_BE = loads_BE / copies_BE
    out_BWS = np.full((batches, world, slots), -1)
    out_BWS[lacks_BW, -1] = -2
    if twice:
        most = int(total_B.max())
        expert_BX = np.stack([np.pad(np.repeat(np.arange(num_experts), c), (0, most - c.sum())) for c in copies_BE])
        real_BX = np.arange(most) < total_B[:, None]
        weight_BX = np.where(real_BX, np.take_along_axis(each_BE, expert_BX, 1), -1.0)
        rank_BX = pack_heaviest_first(weight_BX, world, room_BW + (most - total_B)[:, None])
        holds_BWE = np.zeros((batches, world, num_experts), bool)
        b, x = np.nonzero(real_BX)
        holds_BWE[b, rank_BX[b, x], expert_BX[b, x]] = True
    else:
        holds_BWE = _pack_together(each_BE, copies_BE, room_BW, by_room=False)
        left = np.flatnonzero((holds_BWE.sum(1) < copies_BE).any(1))
        if len(left):
            holds_BWE[left] = _pack_together(each_BE[left], copies_BE[left], room_BW[left], by_room=True)
    b, w, e = np.nonzero(holds_BWE)
    nth = (holds_BWE.cumsum(2) - 1)[b, w, e]
    fits = nth < room_BW[b, w]
    out_BWS[b[fits], w[fits], nth[fits]] = e[fits]
    return _filled(out_BWS, loads_BE)


def _filled(slots_BWS: np.ndarray, loads_BE: np.ndarray) -> np.ndarray:
    """Empty slots given to the experts with most load per replica that the rank does not have; no peak rises by it."""
    num_experts = loads_BE.shape[1]
    holds_BWE, copies_BE = holds(slots_BWS, num_experts), count_copies(slots_BWS, num_experts)[:, :-1]
    while len(rows := np.flatnonzero((slots_BWS == -1).any((1, 2)))):
        place_B = (slots_BWS[rows] == -1).reshape(len(rows), -1).argmax(1)
        rank_B, slot_B = np.divmod(place_B, slots_BWS.shape[2])
        each_BE = np.where(holds_BWE[rows, rank_B], -1.0, loads_BE[rows] / copies_BE[rows])
        expert_B = each_BE.argmax(1)
        slots_BWS[rows, rank_B, slot_B] = expert_B
        holds_BWE[rows, rank_B, expert_B] = True
        copies_BE[rows, expert_B] += 1
    return slots_BWS


def _pack_together(each_BE: np.ndarray, copies_BE: np.ndarray, room_BW: np.ndarray, by_room: bool) -> np.ndarray:
    (batches, num_experts), world = each_BE.shape, room_BW.shape[1]
    holds_BWE, rows = np.zeros((batches, world, num_experts), bool), np.arange(batches)
    load_BW, room_BW = np.zeros((batches, world)), room_BW.copy()
    order_BE = np.lexsort((-copies_BE, -each_BE), axis=1)
    for place in range(num_experts):
        expert_B = order_BE[:, place]
        first_BW = -room_BW if by_room else room_BW == 0
        order_BW = np.lexsort((load_BW, first_BW), axis=1)
        chosen_BW = np.zeros((batches, world), bool)
        np.put_along_axis(chosen_BW, order_BW, np.arange(world) < copies_BE[rows, expert_B][:, None], 1)
        chosen_BW &= room_BW > 0
        holds_BWE[rows, :, expert_B] = chosen_BW
        load_BW += chosen_BW * each_BE[rows, expert_B][:, None]
        room_BW -= chosen_BW
    return holds_BWE


def _kicked(slots_BWS: np.ndarray, num_experts: int, random: np.random.Generator) -> np.ndarray:
    """A few slots of replicas turned into another expert's, or of two ranks swapped, each expert keeping one."""
    slots_BWS = slots_BWS.copy()
    batches, world, slots = slots_BWS.shape
    rows = np.arange(batches)
    for _ in range(4):
        holds_BWE, copies_BE = holds(slots_BWS, num_experts), count_copies(slots_BWS, num_experts)
        rank_B, slot_B = random.integers(world, size=batches), random.integers(slots, size=batches)
        other_B, place_B = random.integers(world, size=batches), random.integers(slots, size=batches)
        own_B, new_B = slots_BWS[rows, rank_B, slot_B], slots_BWS[rows, other_B, place_B]
        fits_B = (own_B >= 0) & (new_B >= 0) & ~holds_BWE[rows, rank_B, new_B]
        swaps_B = fits_B & ~holds_BWE[rows, other_B, own_B] & (rank_B != other_B)
        turns_B = fits_B & (copies_BE[rows, own_B] > 1) & (random.random(batches) < 0.5)
        swaps_B &= ~turns_B
        changed_B = swaps_B | turns_B
        slots_BWS[rows[changed_B], rank_B[changed_B], slot_B[changed_B]] = new_B[changed_B]
        slots_BWS[rows[swaps_B], other_B[swaps_B], place_B[swaps_B]] = own_B[swaps_B]
    return slots_BWS


def _inverse(phy2log: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """``log2phy`` and ``logcnt`` of ``phy2log`` [L, slots of all ranks]."""
    logcnt = (phy2log[:, :, None] == np.arange(num_experts)).sum(1)
    log2phy = np.full((*logcnt.shape, logcnt.max()), -1, np.int64)
    order = np.argsort(phy2log, axis=1, kind="stable")
    expert = np.take_along_axis(phy2log, order, 1)
    nth = np.arange(phy2log.shape[1]) - (logcnt.cumsum(1) - logcnt)[np.arange(len(phy2log))[:, None], expert]
    log2phy[np.arange(len(phy2log))[:, None], expert, nth] = order
    return log2phy, logcnt
