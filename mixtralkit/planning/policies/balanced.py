"""Replicates heavy experts and packs replicas so that the busiest rank is light when its replicas' rows are poured.

As in EPLB there are two ways: in the hierarchical one groups of experts are packed to nodes, and each node replicates
and packs its own; the global one has one node. Unlike EPLB, a rank never has an expert twice, and what is made even is
the load as the layer pours it, not equal parts (``joined``). Where that leaves a layer uneven, EPLB's own plan, its
duplicates turned into something useful, is poured as well and the lighter one kept. All layers are planned at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.inputs import Budget, checked_loads
from mixtralkit.planning.policies.joined import EVEN_ENOUGH, join
from mixtralkit.planning.policies.packing import swap_down
from mixtralkit.planning.policies.poured import count_copies, holds, pour

_TRIES, _WORK = 16, 4_000  # plans for other loads, for layers that are not even; slots of them all
_SMALL = 6_000  # ranks of all layers times experts, up to which plans are compared as they run
_NOISE = 0.15  # how different, a standard deviation
_AS_RUN = 50  # rounds of pouring that say how even a plan runs
_NOTHING = 1e-200  # load of each expert of a node that nobody chooses
_TRIFLE = 2e-3  # over the even load as run, from which others are looked at


def balanced(
    loads_LE: np.ndarray,
    world_size: int,
    budget: Budget | None = None,
    ranks_per_node: int | None = None,
    num_groups: int | None = None,
    extra: int | None = None,
    shares: str = "poured",
) -> ExpertPlan:
    """Replicas in every slot of the budget, so that the heaviest rank of each layer is light; none without a budget.

    Args:
        loads_LE: rows of each expert in a profile.
        ranks_per_node: None for one node.
        num_groups: groups of consecutive experts that stay on one node each (hierarchical); None lets replicas be
            on any node (global).
        extra: slots of a layer, over all ranks, beyond one for each expert, instead of all of the budget's.
        shares: what is made even: "poured", as the layer here divides an expert's rows, or "equal", as SGLang, vLLM and
            TensorRT-LLM do.

    Raises:
        ValueError: for a budget too small, sizes that do not divide, or other shares.
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
        np.maximum(_search(loads_LE, world_size, slots, groups, nodes, surplus, shares), -1),
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


def _search(
    loads_LE: np.ndarray, world_size: int, slots: int, groups: int, nodes: int, surplus: int = 0, shares: str = "poured"
) -> np.ndarray:
    """Slots [L, W, S], sorted; ``surplus`` ranks of each layer, others in each, have one less (-2)."""
    if shares not in ("poured", "equal"):
        raise ValueError(f"shares ({shares!r}) must be 'poured' or 'equal'")
    num_layers, gpus = len(loads_LE), world_size // nodes
    # nodes in turn, so that none lacks more than another
    nth_LX = (np.arange(num_layers)[:, None] * surplus + np.arange(surplus)) % world_size
    lacks_LW = np.zeros((num_layers, world_size), bool)
    np.put_along_axis(lacks_LW, nth_LX % nodes * gpus + nth_LX // nodes, True, 1)
    found_LWS, peak_L = np.empty((num_layers, world_size, slots), np.int64), np.full(num_layers, np.inf)
    packings = [_experts_of_nodes(loads_LE, groups, nodes, swaps) for swaps in (False, True)[: 1 if nodes == 1 else 2]]
    for experts_LNE in packings:
        layers = np.flatnonzero((experts_LNE != packings[0]).any((1, 2)) | np.isinf(peak_L))
        if not len(layers):
            break
        experts_LNE, per_node = experts_LNE[layers], experts_LNE.shape[2]
        part_BE = np.take_along_axis(loads_LE[layers, None], experts_LNE, 2).reshape(-1, per_node)
        part_BE[part_BE.sum(1) == 0] = _NOTHING
        lacks_BW = lacks_LW[layers].reshape(-1, gpus)
        if shares == "poured":
            slots_BWS, peak_B = spread_replicas(part_BE, lacks_BW, slots, 1 / world_size)
        else:
            slots_BWS = _as_eplb(part_BE, lacks_BW, slots)
            peak_B = pour(slots_BWS, part_BE, rounds=0).sum(2).max(1)
        names = np.take_along_axis(experts_LNE.reshape(-1, 1, per_node), np.maximum(slots_BWS, 0), 2)
        slots_LWS = np.where(slots_BWS >= 0, names, slots_BWS).reshape(len(layers), world_size, slots)
        peaks = peak_B.reshape(len(layers), nodes).max(1)
        lighter = peaks < peak_L[layers]
        found_LWS[layers[lighter]], peak_L[layers[lighter]] = slots_LWS[lighter], peaks[lighter]
    return -np.sort(-found_LWS, axis=2) if surplus else np.sort(found_LWS, axis=2)


def spread_replicas(
    loads_BE: np.ndarray, lacks_BW: np.ndarray, slots: int, own: float
) -> tuple[np.ndarray, np.ndarray]:
    """Experts of each rank's slots [B, W, S], and peaks [B], of many layers at once.

    Every expert is somewhere, none twice on a rank; needs E ≥ ``slots`` and W · ``slots`` ≥ E.

    Args:
        lacks_BW: ranks that have one slot less, marked -2.
        own: part of an expert's load that each of its ranks has at least.
    """
    found_BWS, part_BWS = _joined(loads_BE, lacks_BW, slots, own)
    even_B, free_B = loads_BE.sum(1) / lacks_BW.shape[1], part_BWS.sum(2).max(1)
    peak_B = free_B.copy()
    if small := lacks_BW.size * loads_BE.shape[1] <= _SMALL:  # with more ranks what they have of their own matters less
        peak_B = pour(found_BWS, loads_BE, own, part_BWS, _AS_RUN).sum(2).max(1)
    rows = np.flatnonzero((free_B > even_B * (1 + EVEN_ENOUGH)) | (peak_B > even_B * (1 + _TRIFLE)))
    if not len(rows):
        return found_BWS, peak_B
    # others: EPLB's, and plans for loads somewhat different; of those in no way heavier than EPLB's the lightest
    loads, lacks = loads_BE[rows], lacks_BW[rows]
    plans = np.stack([_as_eplb(loads, lacks, slots, heaviest=not small), found_BWS[rows]])
    if small:
        tries, random = min(_TRIES, _WORK // (lacks.size * slots)), np.random.default_rng(0)
        noisy = loads * np.maximum(1 + _NOISE * random.standard_normal((tries, *loads.shape)), 0.1)
        noisy = np.concatenate([loads[None], noisy]).reshape(-1, loads.shape[1])
        tried = _joined(noisy, np.tile(lacks, (tries + 1, 1)), slots, own, heaviest=False)[0]
        plans = np.concatenate([plans, tried.reshape(tries + 1, *plans.shape[1:])])
    flat, all_loads = plans.reshape(-1, *plans.shape[2:]), np.tile(loads, (len(plans), 1))
    free = pour(flat, all_loads, rounds=100).sum(2).max(1).reshape(len(plans), -1)
    as_run = pour(flat, all_loads, own, rounds=_AS_RUN).sum(2).max(1).reshape(len(plans), -1) if small else free.copy()
    free[1], as_run[1] = np.minimum(free[1], free_B[rows]), np.minimum(as_run[1], peak_B[rows])
    no_heavier = (free <= free[0] * (1 + 1e-9)) & (as_run <= as_run[0] * (1 + 1e-9))
    best = np.where(no_heavier, as_run + free, np.inf).argmin(0)
    found_BWS[rows], peak_B[rows] = plans[best, np.arange(len(rows))], as_run[best, np.arange(len(rows))]
    return found_BWS, peak_B


def _joined(
    loads_BE: np.ndarray, lacks_BW: np.ndarray, slots: int, own: float, heaviest: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """``join`` of layers whose ranks lack different numbers of slots, nothing left empty."""
    short_B = lacks_BW.sum(1)
    copies_BE = count_replicas(loads_BE, lacks_BW.shape[1] * slots - short_B)
    found_BWS, part_BWS = np.empty((*lacks_BW.shape, slots), np.int64), np.empty((*lacks_BW.shape, slots))
    for short in np.unique(short_B):
        of = short_B == short
        found_BWS[of], part_BWS[of] = join(loads_BE[of], copies_BE[of], lacks_BW[of], slots, own)
    return _filled(found_BWS, loads_BE, heaviest), part_BWS


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


def count_replicas(loads_BE: np.ndarray, total_B: np.ndarray) -> np.ndarray:
    """EPLB's replicas of each expert [B, E]: one each, then one at a time where a replica has most load."""
    copies_BE, rows = np.ones(loads_BE.shape, np.int64), np.arange(len(loads_BE))
    for given in range(int(total_B.max()) - loads_BE.shape[1]):
        copies_BE[rows, (loads_BE / copies_BE).argmax(1)] += loads_BE.shape[1] + given < total_B
    return copies_BE


def _as_eplb(loads_BE: np.ndarray, lacks_BW: np.ndarray, slots: int, heaviest: bool = True) -> np.ndarray:
    """EPLB's packing [B, W, S] of equal parts; where a rank had an expert twice the slot is another's."""
    (batches, num_experts), world = loads_BE.shape, lacks_BW.shape[1]
    room_BW = slots - lacks_BW.astype(np.int64)
    total_B, rows_B1 = room_BW.sum(1), np.arange(batches)[:, None]
    copies_BE, most = count_replicas(loads_BE, total_B), int(total_B.max())
    expert_BX = np.stack([np.pad(np.repeat(np.arange(num_experts), c), (0, most - c.sum())) for c in copies_BE])
    real_BX = np.arange(most) < total_B[:, None]
    weight_BX = np.where(real_BX, np.take_along_axis(loads_BE / copies_BE, expert_BX, 1), -1.0)
    rank_BX = pack_heaviest_first(weight_BX, world, room_BW + (most - total_B)[:, None])
    holds_BWE = np.zeros((batches, world, num_experts), bool)
    holds_BWE[np.broadcast_to(rows_B1, rank_BX.shape)[real_BX], rank_BX[real_BX], expert_BX[real_BX]] = True
    found_BWS = np.where(np.arange(slots) < room_BW[:, :, None], -1, -2)
    b, w, e = np.nonzero(holds_BWE)
    found_BWS[b, w, (holds_BWE.cumsum(2) - 1)[b, w, e]] = e
    return _filled(found_BWS, loads_BE, heaviest)


def _filled(slots_BWS: np.ndarray, loads_BE: np.ndarray, heaviest: bool) -> np.ndarray:
    """Empty slots given to the experts with most load per replica that the rank does not have, or with least.

    Poured, no peak rises by it. As run, a replica takes rows of its rank's own tokens, the fewer the lighter it is.
    """
    num_experts = loads_BE.shape[1]
    holds_BWE, copies_BE = holds(slots_BWS, num_experts), count_copies(slots_BWS, num_experts)[:, :-1]
    while len(rows := np.flatnonzero((slots_BWS == -1).any((1, 2)))):
        place_B = (slots_BWS[rows] == -1).reshape(len(rows), -1).argmax(1)
        rank_B, slot_B = np.divmod(place_B, slots_BWS.shape[2])
        each_BE = loads_BE[rows] / copies_BE[rows] * (1 if heaviest else -1)
        each_BE[holds_BWE[rows, rank_B]] = -np.inf
        expert_B = each_BE.argmax(1)
        slots_BWS[rows, rank_B, slot_B] = expert_B
        holds_BWE[rows, rank_B, expert_B] = True
        copies_BE[rows, expert_B] += 1
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
