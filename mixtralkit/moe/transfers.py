"""Experts from rank to rank: a layer's weights follow a new plan.

::

    rank 0  e0 e1 ──┐ stays: e1          e1 e2
    rank 1  e2 e3 ──┼─► e2 from rank 1   e3 e0      each rank gets whole experts it lacks
            old     └─► e0 from rank 0   new        from the nearest rank that has them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext


@dataclass(frozen=True)
class Transfer:
    """One expert's weights: from ``source``, which has them, to ``target``, which does not."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True)
class MoveReport:
    """What moved in one layer; the same on every rank.

    Attributes:
        transfers: experts that crossed from rank to rank, in the order in which they did.
        bytes_moved: size of their weights.
        in_place: whether on every rank the new slots lie where the old ones did.
    """

    transfers: tuple[Transfer, ...] = ()
    bytes_moved: int = 0
    in_place: bool = True


def transfers(old_WE: np.ndarray, new_WE: np.ndarray, ranks_per_node: int | None = None) -> tuple[Transfer, ...]:
    """Who sends what, by rising expert and target: from the target's own node if that has it, and in turn.

    Args:
        old_WE, new_WE: whether (or in which slot, -1 for none) each rank holds each expert. Every expert is somewhere
            in ``old_WE``.
        ranks_per_node: None when all ranks are on one.
    """
    old_WE, new_WE = _holds(old_WE), _holds(new_WE)
    node_W = np.arange(len(old_WE)) // (ranks_per_node or len(old_WE))
    sends_W = np.zeros(len(old_WE), int)
    found = []
    for expert, target in np.argwhere((new_WE & ~old_WE).T).tolist():
        owners = np.flatnonzero(old_WE[:, expert])
        source = min(owners, key=lambda w: (node_W[w] != node_W[target], sends_W[w], abs(w - target)))
        sends_W[source] += 1
        found.append(Transfer(expert, int(source), target))
    return tuple(found)


def stays_in_place(old_WE: np.ndarray, new_WE: np.ndarray) -> bool:
    """Whether every rank has as many slots as before, so that all weights keep their addresses.

    A question of all ranks, so that they agree on whether graphs may go on. Arguments as for ``transfers``.
    """
    return bool((_holds(old_WE).sum(1) == _holds(new_WE).sum(1)).all())


@torch.no_grad()
def move_experts(
    parameters: Sequence[torch.Tensor],
    old_WE: np.ndarray,
    new_WE: np.ndarray,
    moves: Sequence[Transfer],
    in_place: bool,
    context: RankContext,
) -> list[torch.Tensor]:
    """Brings ``parameters`` [S, …] the experts of the new slots. Collective.

    In place, what is new in a slot waits in memory of its own until the old experts have been sent, and slots that
    keep their expert are not touched. Otherwise the new slots are new tensors, which come back.

    Args:
        old_WE, new_WE: slot of each expert on each rank, -1 where it is not held.
        moves: ``transfers(old_WE, new_WE)``.

    Raises:
        RankFailed: another rank had no memory for it. Then no rank's weights have changed.
    """
    old_E, new_E = old_WE[context.rank], new_WE[context.rank]
    fresh_E = (new_E >= 0) & (new_E != old_E) if in_place else new_E >= 0
    fresh = sorted(np.flatnonzero(fresh_E).tolist(), key=lambda expert: new_E[expert])
    place = {expert: i for i, expert in enumerate(fresh)}
    with context.agreed():
        targets = [weights.new_empty(len(fresh), *weights.shape[1:]) for weights in parameters]
    operations = []
    for weights, target in zip(parameters, targets, strict=True):
        for expert in fresh:
            if old_E[expert] >= 0:
                target[place[expert]].copy_(weights[old_E[expert]])
    for move in moves:
        for weights, target in zip(parameters, targets, strict=True):
            if move.source == context.rank:
                operations.append(_operation(dist.isend, weights[old_E[move.expert]], move.target, context))
            elif move.target == context.rank:
                operations.append(_operation(dist.irecv, target[place[move.expert]], move.source, context))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    if in_place:
        for weights, target in zip(parameters, targets, strict=True):
            for expert in fresh:
                weights[new_E[expert]].copy_(target[place[expert]])
    return targets


def open_links(context: RankContext) -> None:
    """Lets every pair of ranks meet once, so that the first move does not wait for NCCL to connect them. Collective."""
    numbers_W = torch.zeros(context.world_size, device=context.device)
    others = [rank for rank in range(context.world_size) if rank != context.rank]
    operations = [_operation(dist.isend, numbers_W[context.rank :][:1], rank, context) for rank in others]
    operations += [_operation(dist.irecv, numbers_W[rank:][:1], rank, context) for rank in others]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _operation(kind, weights: torch.Tensor, other: int, context: RankContext) -> dist.P2POp:
    return dist.P2POp(kind, weights.view(torch.uint8), group=context.group, group_peer=other)


def _holds(table_WE: np.ndarray) -> np.ndarray:
    return table_WE if table_WE.dtype == bool else table_WE >= 0
