"""Puts a token's next expert where the token already is (ExFlow's objective, solved exactly where that is possible)."""

from __future__ import annotations

import itertools
from functools import cache, lru_cache
from typing import Any

import numpy as np

from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.affinity_replicas import with_replicas
from mixtralkit.planning.policies.chain import Fits, count_partitions, is_small, solve_exactly
from mixtralkit.planning.policies.chain_bound import kind_of_bound, upper_bound
from mixtralkit.planning.policies.chain_search import search
from mixtralkit.planning.policies.inputs import Budget, checked_loads
from mixtralkit.planning.policies.packing import pack_once

_MOST_PACKINGS = 2000  # partitions of a rank's or node's experts that are tried one by one


def affinity(
    transitions_LEE: Any,
    world_size: int,
    ranks_per_node: int | None = None,
    budget: Budget | None = None,
    loads_LE: np.ndarray | None = None,
    load_cap: float | None = None,
    bound: float = 1.0,
) -> ExpertPlan:
    """E/W experts on each rank, so that tokens seldom change node, and within a node seldom change rank.

    What slots the budget has beyond that hold replicas: placement and replicas then move together so that tokens seldom
    change rank (``affinity_replicas``); under a load cap the placement stays and replicas only add.

    Nodes first: the placement on nodes is made for the fewest crossings between them, then each node's experts are
    placed on its ranks. ``meta`` says whether every step was exact, and the bound below which no placement's
    crossings per token can be (equal to the plan's own when exact on one node).

    Args:
        transitions_LEE: [L-1, E, E] weight of tokens from expert a of a layer to expert b of the next, any scale.
        loads_LE: rows of each expert; needed with ``load_cap``.
        load_cap: most load of any rank in any layer, as a multiple of the even share; None sets no limit.
        bound: how many times the usual seconds the bound in ``meta`` may take; 0 leaves it out.

    Raises:
        ValueError: for sizes that do not divide, weights that are no numbers of at least 0, a budget too small, or a
            cap that no placement keeps.
    """
    weights = _checked_transitions(transitions_LEE)
    num_layers, num_experts = len(weights) + 1, weights.shape[1]
    per_node = world_size if ranks_per_node is None else ranks_per_node
    if world_size < 1 or num_experts % world_size:
        raise ValueError(f"num_experts ({num_experts}) must be a multiple of world_size ({world_size}) for affinity")
    if per_node < 1 or world_size % per_node:
        raise ValueError(f"ranks_per_node ({ranks_per_node}) must divide world_size ({world_size})")
    (budget or Budget()).require(num_experts // world_size, num_layers, "affinity's equal ranks")
    caps = None if load_cap is None else _Caps(loads_LE, num_layers, num_experts, world_size, load_cap)
    sizes = world_size // per_node, per_node
    if caps is None:
        ranks_LE, exact = _placed(weights.tobytes(), weights.shape, *sizes)
    else:
        ranks_LE, exact = _place(weights, *sizes, caps)
    holds_LWE = ranks_LE[:, None] == np.arange(world_size)[:, None]
    slots = (budget or Budget()).slots(num_layers, num_experts, world_size)
    if slots > num_experts // world_size:
        holds_LWE = with_replicas(weights, holds_LWE, slots, may_move=load_cap is None)
    return ExpertPlan(
        slots_of(holds_LWE),
        num_experts,
        ranks_per_node=ranks_per_node,
        policy="affinity",
        meta={
            "exact": exact,
            **_bound(weights, world_size, ranks_LE, exact and per_node == world_size, bound),
            "load_cap": load_cap,
        },
    )


def slots_of(holds_LWE: np.ndarray) -> np.ndarray:
    """Slots [L, W, S] of holders, in the order of experts; -1 fills up."""
    num_experts, most = holds_LWE.shape[2], int(holds_LWE.sum(2).max())
    found = np.sort(np.where(holds_LWE, np.arange(num_experts), num_experts), axis=2)[:, :, :most]
    return np.where(found == num_experts, -1, found)


class _Caps:
    """Which sets of experts may share a rank or a node."""

    def __init__(
        self, loads_LE: np.ndarray | None, num_layers: int, num_experts: int, world_size: int, load_cap: float
    ) -> None:
        if loads_LE is None:
            raise ValueError(f"load_cap ({load_cap}) needs loads")
        loads_LE = checked_loads(loads_LE, world_size)
        if loads_LE.shape != (num_layers, num_experts):
            raise ValueError(f"loads (shape {loads_LE.shape}) must be {(num_layers, num_experts)}, as the transitions")
        self.shares_LE = loads_LE / loads_LE.sum(1, keepdims=True) * world_size
        self.most = load_cap * (1 + 1e-9)
        least_L = [_least_peak(shares_E, world_size) for shares_E in self.shares_LE]
        if max(least_L) > self.most:
            raise ValueError(
                f"load_cap ({load_cap}) must be at least {max(least_L):.3f}: "
                f"layer {int(np.argmax(least_L))} cannot be placed more evenly"
            )

    def of_parts(self, experts_LN: np.ndarray, ranks: int) -> Fits:
        """May these items, numbers into ``experts_LN`` of the layer, share ``ranks`` ranks?"""

        @cache
        def fits(layer: int, items: tuple[int, ...]) -> bool:
            return _least_peak(self.shares_LE[layer, experts_LN[layer, list(items)]], ranks) <= self.most

        return fits


def least_cap(loads_LE: np.ndarray, world_size: int) -> float:
    """The least ``load_cap`` that some placement keeps in every layer, or a good one where they are too many to try."""
    loads_LE = checked_loads(loads_LE, world_size)
    shares_LE = loads_LE / loads_LE.sum(1, keepdims=True) * world_size
    return max(_least_peak(shares_E, world_size) for shares_E in shares_LE)


def _least_peak(shares_N: np.ndarray, ranks: int) -> float:
    """Load of the heaviest rank when these experts are spread over ``ranks`` ranks, equally many on each.

    The least there is where the ways are few, a good one where they are many.
    """
    if ranks == 1:
        return float(shares_N.sum())
    size = len(shares_N) // ranks
    if size > 1 and count_partitions(len(shares_N), ranks) <= _MOST_PACKINGS:
        return _least_exact_peak(tuple(shares_N.tolist()), size)
    return float(max(shares_N[items].sum() for items in pack_once(shares_N, ranks)))


def _least_exact_peak(shares: tuple[float, ...], size: int) -> float:
    if not shares:
        return 0.0
    return min(
        max(
            shares[0] + sum(shares[1 + i] for i in others),
            _least_exact_peak(tuple(s for i, s in enumerate(shares[1:]) if i not in others), size),
        )
        for others in itertools.combinations(range(len(shares) - 1), size - 1)
    )


@lru_cache(maxsize=2)  # ``auto`` tries several numbers of replicas on both halves of a trace
def _placed(weights: bytes, shape: tuple[int, int, int], nodes: int, per_node: int) -> tuple[np.ndarray, bool]:
    return _place(np.frombuffer(weights).reshape(shape), nodes, per_node, None)


def _place(weights: np.ndarray, nodes: int, per_node: int, caps: _Caps | None) -> tuple[np.ndarray, bool]:
    """Rank of each expert [L, E], and whether each of the two levels was solved exactly."""
    num_layers, num_experts = len(weights) + 1, weights.shape[1]
    all_LE = np.tile(np.arange(num_experts), (num_layers, 1))
    node_LE, exact = _split(weights, all_LE, nodes, per_node, caps)
    ranks_LE = np.empty_like(node_LE)
    for node in range(nodes):
        experts_LN = np.array([np.flatnonzero(node_E == node) for node_E in node_LE])
        inner = weights[np.arange(num_layers - 1)[:, None, None], experts_LN[:-1, :, None], experts_LN[1:, None, :]]
        local_LN, inner_exact = _split(inner, experts_LN, per_node, 1, caps)
        np.put_along_axis(ranks_LE, experts_LN, node * per_node + local_LN, axis=1)
        exact = exact and inner_exact
    return ranks_LE, exact


def _split(
    weights_JNN: np.ndarray, experts_LN: np.ndarray, parts: int, ranks: int, caps: _Caps | None
) -> tuple[np.ndarray, bool]:
    num_layers, n = experts_LN.shape
    fits = caps and caps.of_parts(experts_LN, ranks)
    if is_small(n, parts):
        return solve_exactly(weights_JNN, num_layers, parts, fits), True
    shares_LN = np.ones(experts_LN.shape) if caps is None else np.take_along_axis(caps.shares_LE, experts_LN, axis=1)
    return search(weights_JNN, num_layers, parts, shares_LN, fits), False


def _bound(weights: np.ndarray, world_size: int, ranks_LE: np.ndarray, exact: bool, work: float) -> dict[str, Any]:
    """Fewest crossings per token that any placement can have, and how that is known."""
    if not work:
        return {"crossings_bound": None, "bound": None}
    stay = float((weights * (ranks_LE[:-1, :, None] == ranks_LE[1:, None, :])).sum())
    whole, kind = float(weights.sum()), "exact"
    if not exact:
        kind = kind_of_bound(max(len(weights), 1), weights.shape[1], work)
        stay = upper_bound(weights, world_size, stay, work)
    return {"crossings_bound": max(0.0, whole - stay), "bound": f"of placements without replicas: {kind}"}


def _checked_transitions(transitions_LEE: Any) -> np.ndarray:
    """Weights scaled to a sum of 1 for each pair of layers that has any."""
    weights = np.array(transitions_LEE, dtype=np.float64)
    if weights.ndim != 3 or weights.shape[1] != weights.shape[2] or weights.shape[1] == 0:
        raise ValueError(f"transitions (shape {weights.shape}) must be [layers - 1, experts, experts]")
    wrong = np.argwhere(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        layer, a, b = wrong[0]
        raise ValueError(
            f"transitions: layer {layer}, experts {a} and {b} have {weights[layer, a, b]}, "
            "which is no number of at least 0"
        )
    return weights / np.maximum(weights.sum((1, 2), keepdims=True), 1e-300)
