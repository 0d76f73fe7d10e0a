"""The dispatchers' other half: what each assigns, which bytes it moves and what it costs, one class a name.

``DISPATCH_COSTS`` has an entry for every name of ``dispatchers.DISPATCHERS``. An entry replays one layer: it says on
which rank each choice is computed, adds its bytes to the links, and gives the seconds of dispatch, experts and combine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from mixtralkit.planning.dispatchers import IN_GRAPHS
from mixtralkit.planning.replicas import ReplicaTable

if TYPE_CHECKING:
    from mixtralkit.planning.replay import Replay

Work = tuple[np.ndarray, np.ndarray, np.ndarray]  # seconds of dispatch, experts and combine of every step or chunk
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # row, giver and taker of every row that travels


class DispatchCost(Protocol):
    """What the simulator asks of a dispatcher.

    Attributes:
        rows_everywhere: every rank has every row; else each has its own.
        splits_attention: ranks share attention and vocabulary.
        overlaps: its exchange and products can overlap in chunks.
    """

    rows_everywhere: bool = False
    splits_attention: bool = False
    overlaps: bool = False

    def run(self, replay: Replay, layer: int, table: ReplicaTable, experts_TK: np.ndarray) -> tuple[np.ndarray, Work]:
        """Rank of each choice [T, K] (-1 where dropped; None where every rank has a part of it), and the seconds."""


class SplitWidth(DispatchCost):
    """Every rank has all rows and a part of every expert; one sum over the ranks. Nothing is summed on one rank."""

    rows_everywhere = splits_attention = True

    def run(self, replay, layer, table, experts_TK):
        return None, (np.zeros(replay.steps), _split_experts_s(replay, experts_TK), replay.sum_everywhere_s(layer))


class Gathered(DispatchCost):
    """Each rank its own rows, gathered to all, which have a part of every expert each; one sum over the ranks."""

    def run(self, replay, layer, table, experts_TK):
        rows_S = replay.rows_SW().max(1)
        out_S = rows_S * (replay.model.shape.row_bytes + replay.model.shape.packed_bytes)
        replay.add_links(layer, (1 - np.eye(replay.world)) * out_S.sum())
        return None, (
            replay.model.all_gather_s(out_S), _split_experts_s(replay, experts_TK), replay.sum_everywhere_s(layer)
        )  # fmt: skip


class Replicated(DispatchCost):
    """Every rank has all rows and some experts; replicas take turns; one sum over the ranks."""

    rows_everywhere = splits_attention = True

    def run(self, replay, layer, table, experts_TK):
        ranks_TK = replay.in_turn(table, experts_TK, np.zeros_like(replay.owner_T), replay.place_T, replay.tokens_S)
        experts_S = replay.experts_s(replay.step_T, replay.steps, ranks_TK, experts_TK)
        return ranks_TK, (np.zeros(replay.steps), experts_S, replay.sum_everywhere_s(layer))


class Static(DispatchCost):
    """Room for every row on every rank, there and back, by collectives; replicas take turns."""

    def run(self, replay, layer, table, experts_TK):
        model, room_S = replay.model, replay.rows_SW().max(1)
        ranks_TK = replay.in_turn(table, experts_TK, replay.owner_T, replay.row_T, room_S * replay.world)
        out_S = room_S * (model.shape.row_bytes + model.shape.packed_bytes)
        back_S = room_S * model.shape.row_bytes
        replay.add_links(layer, (1 - np.eye(replay.world)) * (out_S + back_S).sum())
        dispatch_S = model.captured_s(model.kernels.static) + model.all_gather_s(out_S) + model.all_gather_s(0.0)
        combine_S = model.captured_s(model.kernels.combine) + model.all_gather_s(back_S)
        experts_S = replay.experts_s(replay.step_T, replay.steps, ranks_TK, experts_TK)
        return ranks_TK, (dispatch_S, experts_S, combine_S)


class Symmetric(DispatchCost):
    """Kernels that reach into the other ranks' memory: a row goes to each of its ranks once, its sums come back.

    A step of more rows a rank than ``Execution.exchange_rows`` goes in pieces.
    """

    def run(self, replay, layer, table, experts_TK):
        rows_S = replay.rows_SW().max(1)
        ranks_TK = replay.in_turn(table, experts_TK, replay.owner_T, replay.row_T, rows_S * replay.world)
        owner_T1, row_bytes = replay.owner_T[:, None], float(replay.model.shape.row_bytes)
        row_N, from_N, to_N = pairs(once_per_member(ranks_TK) & (ranks_TK != owner_T1), owner_T1, ranks_TK)
        counts_WW = np.bincount(from_N * replay.world + to_N, minlength=replay.world**2).reshape(replay.world, -1)
        replay.add_links(layer, (counts_WW + counts_WW.T) * row_bytes)
        step_N = replay.step_T[row_N]
        out_SW, into_SW = (row_bytes * replay.per_rank(step_N, ranks_N, replay.steps) for ranks_N in (from_N, to_N))
        pieces_S = np.maximum(-(-rows_S // (replay.execution.exchange_rows or max(int(rows_S.max()), 1))), 1)
        each_S1 = pieces_S[:, None]
        half_S = pieces_S * replay.model.symmetric_exchange_s(out_SW / each_S1, into_SW / each_S1) / 2
        return ranks_TK, (half_S, replay.experts_s(replay.step_T, replay.steps, ranks_TK, experts_TK), half_S)


class Exact(DispatchCost):
    """Counted rows by collectives, once for each destination rank; replicas are poured."""

    overlaps = True
    id_bytes = 0  # of a row's number, which travels where rows do not come back

    def run(self, replay, layer, table, experts_TK):
        ranks_TK = table.ranks_poured(experts_TK, replay.owner_T, replay.group_T, replay.groups)
        replay.away_L[layer] = ((ranks_TK >= 0) & (ranks_TK != replay.owner_T[:, None])).sum()
        shape, model, choice = replay.model.shape, replay.model, table.has_choice
        stages = self.stages(replay, ranks_TK)
        kernels = model.kernels.dispatch + choice * model.kernels.replicas
        start_s = model.launches_s(kernels) + (3 + choice) * model.hardware.sync_s
        out_bytes = shape.row_bytes + shape.packed_bytes + self.id_bytes
        dispatch_G = start_s + sum(replay.travel_s(layer, stage, out_bytes, messages=3) for stage in stages)
        if choice:
            dispatch_G = dispatch_G + model.all_gather_s(8.0 * shape.num_experts)  # counts, to pour by
        experts_G = replay.experts_s(replay.group_T, replay.groups, ranks_TK, experts_TK)
        dispatch_G, back = self.after(replay, ranks_TK, dispatch_G, stages)
        back_s = sum(replay.travel_s(layer, stage, shape.row_bytes, messages=1) for stage in back)
        return ranks_TK, (dispatch_G, experts_G, model.launches_s(model.kernels.combine) + back_s)

    def stages(self, replay: Replay, ranks_TK: np.ndarray) -> list[Pairs]:
        """For each exchange on the way out: every row that travels, and from which rank to which."""
        owner_T1 = replay.owner_T[:, None]
        return [pairs(once_per_member(ranks_TK) & (ranks_TK != owner_T1), owner_T1, ranks_TK)]

    def after(self, replay: Replay, ranks_TK: np.ndarray, dispatch_G: np.ndarray, stages: list[Pairs]):
        """Seconds of the way out, and the pairs of the way back: the same, the other way round."""
        return dispatch_G, [(row_N, to_N, from_N) for row_N, from_N, to_N in reversed(stages)]


class TwoStage(Exact):
    """Once across nodes, then inside the node."""

    def stages(self, replay, ranks_TK):
        owner_T1, per_node = replay.owner_T[:, None], replay.per_node
        nodes_TK = np.where(ranks_TK < 0, -1, ranks_TK // per_node)
        holder_TK = nodes_TK * per_node + owner_T1 % per_node
        across_TK = once_per_member(nodes_TK) & (nodes_TK != owner_T1 // per_node)
        inside_TK = once_per_member(ranks_TK) & (ranks_TK != holder_TK)
        return [pairs(across_TK, owner_T1, holder_TK), pairs(inside_TK, holder_TK, ranks_TK)]


class Coherent(Exact):
    """Rows stay where their heaviest choice was computed: to the other choices' ranks, and the sums to that one."""

    overlaps = False
    id_bytes = 4

    def stages(self, replay, ranks_TK):
        owner_T1 = replay.owner_T[:, None]
        members_TK = np.concatenate([ranks_TK, first_kept(ranks_TK, replay.owner_T)[:, None]], 1)
        return [pairs(once_per_member(members_TK) & (members_TK != owner_T1), owner_T1, members_TK)]

    def after(self, replay, ranks_TK, dispatch_G, stages):
        dispatch_G = dispatch_G + replay.model.all_gather_s(0.0) + replay.model.hardware.sync_s  # is any row split?
        replay.owner_T = first_kept(ranks_TK, replay.owner_T)
        owner_T1 = replay.owner_T[:, None]
        return dispatch_G, [pairs(once_per_member(ranks_TK) & (ranks_TK != owner_T1), ranks_TK, owner_T1)]


DISPATCH_COSTS: dict[str, DispatchCost] = {
    "local": SplitWidth(), "split_width": SplitWidth(), "replicated": Replicated(), "gathered": Gathered(),
    "exact": Exact(), "static": Static(), "symmetric": Symmetric(), "two_stage": TwoStage(), "coherent": Coherent(),
}  # fmt: skip


def is_launched(dispatcher: str) -> bool:
    """Whether the host launches a step's kernels one by one, no faster than it can: no graph holds them."""
    return dispatcher not in IN_GRAPHS


def once_per_member(members_TK: np.ndarray) -> np.ndarray:
    """True for the first choice of a row that goes to its member; False for repeats and for -1."""
    first_TK = members_TK >= 0
    for later in range(1, members_TK.shape[1]):
        for earlier in range(later):
            first_TK[:, later] &= members_TK[:, later] != members_TK[:, earlier]
    return first_TK


def first_kept(ranks_TK: np.ndarray, otherwise_T: np.ndarray) -> np.ndarray:
    """Rank of each row's heaviest choice that was kept; ``otherwise_T`` for a row that lost all."""
    kept_TK = ranks_TK >= 0
    first_T = np.take_along_axis(ranks_TK, kept_TK.argmax(1)[:, None], 1)[:, 0]
    return np.where(kept_TK.any(1), first_T, otherwise_T)


def pairs(travels_TK: np.ndarray, from_TK: np.ndarray, to_TK: np.ndarray) -> Pairs:
    """Row, giver and taker of every row that travels."""
    row_N = travels_TK.nonzero()[0]
    return row_N, *(np.broadcast_to(x, travels_TK.shape)[travels_TK] for x in (from_TK, to_TK))


def _split_experts_s(replay: Replay, experts_TK: np.ndarray) -> np.ndarray:
    """Seconds of each step's experts where every rank has a part of each."""
    num_experts = replay.plan.num_experts
    keys_TK = replay.step_T[:, None] * num_experts + experts_TK
    counts_SE = np.bincount(keys_TK.ravel(), minlength=replay.steps * num_experts).reshape(replay.steps, -1)
    return replay.model.experts_s(counts_SE, replay.world, replay.size_E, replay.formats)
