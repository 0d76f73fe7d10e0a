"""Replicates heavy experts and packs replicas so that ranks are even (EPLB's two algorithms, no rank holds one twice).

Hierarchical: groups of experts are packed to nodes, replicas are made and packed to ranks inside each node. Global:
one node. In both a replica is given, one after another, to the expert with most load per replica, and replicas are
packed heaviest first to the lightest rank with room. Unlike EPLB, a rank never gets a second replica of an expert,
and a local search follows: it swaps experts between ranks, and turns replicas of one expert into another's, while
that makes the heaviest rank lighter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.inputs import Budget, checked_loads
from mixtralkit.planning.policies.packing import swap_down

_MOST_ROUNDS = 200  # of one local search; it mostly stops by itself within 20
_KICKS = 60  # local searches of a layer from somewhere near the best
_EVEN_ENOUGH = 1.001  # max/mean at which the search ends


def balanced(
    loads_LE: np.ndarray,
    world_size: int,
    budget: Budget | None = None,
    ranks_per_node: int | None = None,
    num_groups: int | None = None,
) -> ExpertPlan:
    """Fills every slot of the budget with replicas so that the heaviest rank of each layer is light.

    Args:
        loads_LE: rows of each expert in a profile.
        ranks_per_node: None for one node.
        num_groups: groups of consecutive experts that stay on one node each (hierarchical); None lets replicas be
            on any node (global).

    Raises:
        ValueError: for a budget too small, or sizes that do not divide.
    """
    loads_LE = checked_loads(loads_LE, world_size)
    num_layers, num_experts = loads_LE.shape
    slots = (budget or Budget()).slots(num_layers, num_experts, world_size)
    nodes = world_size // (ranks_per_node or world_size)
    if ranks_per_node is not None and nodes * ranks_per_node != world_size:
        raise ValueError(f"ranks_per_node ({ranks_per_node}) must divide world_size ({world_size})")
    groups, nodes = (num_groups, nodes) if num_groups is not None else (1, 1)
    phy2log = rebalance_experts(loads_LE, slots * world_size, groups, nodes, world_size)[0]
    slots_LWS = np.sort(phy2log.reshape(num_layers, world_size, slots), axis=2)
    return ExpertPlan(
        slots_LWS,
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
    gpus, slots = num_gpus // num_nodes, num_replicas // num_gpus
    phy2log = np.empty((num_layers, num_gpus, slots), np.int64)
    for layer, loads_E in enumerate(loads_LE):
        phy2log[layer] = min(
            (_place(loads_E, nodes, gpus, slots) for nodes in _experts_of_nodes(loads_E, num_groups, num_nodes)),
            key=lambda slots_WS: _peak(_holds(slots_WS, num_experts), loads_E),
        )
    return phy2log.reshape(num_layers, num_replicas), *_inverse(phy2log.reshape(num_layers, -1), num_experts)


def spread_replicas(loads_E: np.ndarray, world_size: int, slots: int) -> np.ndarray:
    """Which rank holds which expert, bool [W, E]: ``slots`` different experts on each rank, every expert somewhere.

    Needs E ≥ ``slots`` and W · ``slots`` ≥ E. An expert's load is shared equally by its replicas.
    """
    copies_E = _count_replicas(loads_E, world_size, slots * world_size)
    starts = [_pack_replicas(loads_E, copies_E, world_size, slots, by_room) for by_room in (False, True)]
    found = [_improve(holds_WE, loads_E) for holds_WE in starts if holds_WE is not None]
    best_WE = min(found, key=lambda holds_WE: _peak(holds_WE, loads_E))
    random = np.random.default_rng(0)  # the same plan for the same loads
    for _ in range(_KICKS):
        if _peak(best_WE, loads_E) <= loads_E.sum() / world_size * _EVEN_ENOUGH:
            break
        other_WE = _improve(_kick(best_WE, random), loads_E)
        if _peak(other_WE, loads_E) < _peak(best_WE, loads_E):
            best_WE = other_WE
    return best_WE


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


def _place(loads_E: np.ndarray, nodes: list[np.ndarray], gpus: int, slots: int) -> np.ndarray:
    """Slots [W, S] when each node replicates and packs its own experts."""
    return np.concatenate(
        [[experts[holds_E] for holds_E in spread_replicas(loads_E[experts], gpus, slots)] for experts in nodes]
    )


def _experts_of_nodes(loads_E: np.ndarray, num_groups: int, num_nodes: int) -> list[list[np.ndarray]]:
    """Experts of each node, equally many groups on each: heaviest group first to the lightest node, also with swaps."""
    loads_G = loads_E.reshape(num_groups, -1).sum(1)
    holds_MG = np.zeros((num_nodes, num_groups), bool)
    for group in np.argsort(-loads_G, kind="stable"):
        has_room_M = holds_MG.sum(1) < num_groups // num_nodes
        holds_MG[np.where(has_room_M, holds_MG @ loads_G, np.inf).argmin(), group] = True
    group_of_E = np.arange(len(loads_E)) // (len(loads_E) // num_groups)
    swapped_MG = swap_down(holds_MG, loads_G)
    packings = [holds_MG] if (swapped_MG == holds_MG).all() else [holds_MG, swapped_MG]
    return [[np.flatnonzero(holds_G[group_of_E]) for holds_G in packing] for packing in packings]


def _count_replicas(loads_E: np.ndarray, world_size: int, total: int) -> np.ndarray:
    """Replicas of each expert: one each, then one at a time where most load is on a replica; never more than ranks."""
    copies_E = np.ones(len(loads_E), np.int64)
    for _ in range(total - len(loads_E)):
        copies_E[np.where(copies_E < world_size, loads_E / copies_E, -1).argmax()] += 1
    return copies_E


def _pack_replicas(
    loads_E: np.ndarray, copies_E: np.ndarray, world_size: int, slots: int, by_room: bool
) -> np.ndarray | None:
    """Heaviest replicas first, to the lightest ranks with room; None where that ends with a replica left over.

    ``by_room`` takes the ranks with most room first, the lightest among equals: that never leaves one over.
    """
    holds_WE = np.zeros((world_size, len(loads_E)), bool)
    loads_W = np.zeros(world_size)
    each_E = loads_E / copies_E
    for expert in np.lexsort((-copies_E, -each_E)):
        room_W = slots - holds_WE.sum(1)
        order = np.lexsort((loads_W, -room_W if by_room else room_W == 0))
        chosen = order[: copies_E[expert]]
        if (room_W[chosen] == 0).any():
            return None
        holds_WE[chosen, expert] = True
        loads_W[chosen] += each_E[expert]
    return holds_WE


def _improve(holds_WE: np.ndarray, loads_E: np.ndarray) -> np.ndarray:
    """Swaps, then changes of one replica into another expert's, in turn, while the heaviest ranks become lighter."""
    for _ in range(_MOST_ROUNDS):
        holds_WE = swap_down(holds_WE, loads_E / holds_WE.sum(0))
        better_WE = _change_replica(holds_WE, loads_E)
        if better_WE is None:
            break
        holds_WE = better_WE
    return holds_WE


def _kick(holds_WE: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A few random changes of a replica into another expert's, each expert keeping one."""
    holds_WE = holds_WE.copy()
    for _ in range(int(random.integers(2, 5))):
        rank = random.integers(len(holds_WE))
        give = np.flatnonzero(holds_WE[rank] & (holds_WE.sum(0) > 1))
        take = np.flatnonzero(~holds_WE[rank])
        if len(give) and len(take):
            holds_WE[rank, [random.choice(give), random.choice(take)]] = [False, True]
    return holds_WE


def _change_replica(holds_WE: np.ndarray, loads_E: np.ndarray) -> np.ndarray | None:
    """The best change that lightens the heaviest rank and makes none as heavy; None where there is none.

    Either the heaviest rank gives up a replica for another expert, or another rank takes a replica of one of its
    experts for one of its own. Only experts with a replica elsewhere are given up.
    """
    copies_E = holds_WE.sum(0)
    loads_W = holds_WE @ (loads_E / copies_E)
    heavy = int(loads_W.argmax())
    changes = []
    for rank in range(len(holds_WE)):
        give = np.flatnonzero(holds_WE[rank] & (copies_E > 1))
        take = np.flatnonzero(~holds_WE[rank] & (holds_WE[heavy] | (rank == heavy)))
        changes += [(rank, given, taken) for given in give for taken in take]
    if not changes:
        return None
    rank_X, give_X, take_X = np.array(changes).T
    each_E, fewer_E, more_E = (loads_E / np.maximum(copies_E + step, 1) for step in (0, -1, 1))
    loads_XW = loads_W + holds_WE.T[give_X] * (fewer_E - each_E)[give_X, None]
    loads_XW += holds_WE.T[take_X] * (more_E - each_E)[take_X, None]
    loads_XW[np.arange(len(rank_X)), rank_X] += more_E[take_X] - fewer_E[give_X]
    best = int(loads_XW.max(1).argmin())
    if loads_XW[best].max() >= loads_W[heavy] * (1 - 1e-12):
        return None
    better_WE = holds_WE.copy()
    better_WE[rank_X[best], [give_X[best], take_X[best]]] = [False, True]
    return better_WE


def _holds(slots_WS: np.ndarray, num_experts: int) -> np.ndarray:
    return (slots_WS[:, :, None] == np.arange(num_experts)).any(1)


def _peak(holds_WE: np.ndarray, loads_E: np.ndarray) -> float:
    return float((holds_WE @ (loads_E / holds_WE.sum(0))).max())


def _inverse(phy2log: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """``log2phy`` and ``logcnt`` of ``phy2log`` [L, slots of all ranks]."""
    logcnt = (phy2log[:, :, None] == np.arange(num_experts)).sum(1)
    log2phy = np.full((*logcnt.shape, logcnt.max()), -1, np.int64)
    for layer, row in enumerate(phy2log):
        for expert in range(num_experts):
            places = np.flatnonzero(row == expert)
            log2phy[layer, expert, : len(places)] = places
    return log2phy, logcnt
