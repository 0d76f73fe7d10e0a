"""The replay of a trace, a layer at a time: which rows travel, and what the time model says of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtralkit.planning.capacity import cut_trace
from mixtralkit.planning.cost import TimeModel, ring_share
from mixtralkit.planning.dispatch_cost import DISPATCH_COSTS, Pairs, first_kept, is_launched
from mixtralkit.planning.dispatchers import DISPATCHERS
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.replicas import SMALL_BATCH_CHOICES, ReplicaTable
from mixtralkit.planning.trace import RoutingTrace

MOST_CHUNKS = 1024
PHASES = ("attention", "gate", "dispatch", "experts", "combine")


@dataclass(frozen=True)
class Execution:
    """How a plan is run.

    Attributes:
        dispatcher: one of ``dispatchers.DISPATCHERS``.
        batch: tokens of a step on each rank; None takes the whole trace as one step.
        step_tokens: of all ranks together, instead of ``batch``, where they need not divide by the ranks.
        chunks: parts of a step whose exchange and products overlap (the schedule); 1 is none.
        context: tokens of each sequence that the cache holds already.
        span: tokens of a step that belong to one sequence; 1 in decode.
        small_choices: of an expert in the mean, up to which steps whose rows take turns compute it at one of its
            holders alone (``replicas.is_small``); 0 lets replicas take turns always.
        exchange_rows: rows of a rank that symmetric memory holds at once, more go in pieces; None holds all.
    """

    dispatcher: str = "exact"
    batch: int | None = None
    chunks: int = 1
    context: int = 0
    span: int = 1
    small_choices: int = SMALL_BATCH_CHOICES
    exchange_rows: int | None = None
    step_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.dispatcher not in DISPATCHERS:
            raise ValueError(f"dispatcher ({self.dispatcher!r}) must be one of {', '.join(DISPATCHERS)}")
        optional = ("batch", "exchange_rows", "step_tokens")
        for name, least in (("chunks", 1), ("context", 0), ("span", 1), *((name, 1) for name in optional)):
            value, may_be_none = getattr(self, name), name in optional
            if not (may_be_none and value is None) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least {least}")
        if self.chunks > MOST_CHUNKS:
            raise ValueError(f"chunks ({self.chunks}) must be at most {MOST_CHUNKS}")
        if self.chunks > 1 and not DISPATCH_COSTS[self.dispatcher].overlaps:
            able = ", ".join(name for name, cost in DISPATCH_COSTS.items() if cost.overlaps)
            raise ValueError(f"chunks ({self.chunks}) must be 1 with dispatcher {self.dispatcher}: only {able} overlap")


class Replay:
    """One replay as it goes from layer to layer; its arrays are ``simulate.Simulation``'s."""

    def __init__(self, plan: ExpertPlan, trace: RoutingTrace, model: TimeModel, execution: Execution) -> None:
        self.plan, self.trace, self.model, self.execution = plan, trace, model, execution
        self.dispatch = DISPATCH_COSTS[execution.dispatcher]
        self.world = plan.world_size
        self.per_node = min(plan.ranks_per_node or self.world, self.world)
        self._deal(trace.num_tokens)
        layers = plan.num_layers
        self.size_LE = model.shape.expert_bytes_LE(plan)
        self.formats_L = [len(set(row)) for row in plan.formats_LE(model.shape.weights)]
        self.phases_LP, self.hidden_L = np.zeros((layers, len(PHASES))), np.zeros(layers)
        self.rows_LW, self.loads_LSW = np.zeros((layers, self.world)), []
        self.links_WW, self.bytes_L = np.zeros((self.world, self.world)), np.zeros(layers)
        self.away_L, self.dropped_L, self.rerouted_L = (np.zeros(layers, np.int64) for _ in range(3))
        self.lead_T: np.ndarray | None = None
        self.kept_T = np.arange(trace.num_tokens)
        self.crossings = self.node_crossings = 0

    def _deal(self, tokens: int) -> None:
        """Step, rank, row of the rank and chunk of every token."""
        batch, chunks = self.execution.batch, self.execution.chunks
        in_step = self.execution.step_tokens or (tokens if batch is None else batch * self.world)
        index_T = np.arange(tokens)
        self.step_T, place_T = np.divmod(index_T, in_step)
        self.steps = int(self.step_T[-1]) + 1
        self.tokens_S = np.bincount(self.step_T)
        self.owner_T = place_T * self.world // self.tokens_S[self.step_T]
        key_T = self.step_T * self.world + self.owner_T
        rows_G = np.bincount(key_T, minlength=self.steps * self.world)
        self.row_T = index_T - (rows_G.cumsum() - rows_G)[key_T]
        short_T, longer_T = np.divmod(rows_G[key_T], chunks)
        boundary_T = longer_T * (short_T + 1)
        late_T = longer_T + (self.row_T - boundary_T) // np.maximum(short_T, 1)
        chunk_T = np.where(self.row_T < boundary_T, self.row_T // (short_T + 1), late_T)
        self.groups, self.group_T = self.steps * chunks, self.step_T * chunks + chunk_T

    def _keep_last_rows(self) -> None:
        """Leaves the last row of every prompt, and the last of a step."""
        place_T = self.place_T
        last_T = ((place_T + 1) % self.execution.span == 0) | (place_T + 1 == self.tokens_S[self.step_T])
        for name in ("kept_T", "step_T", "owner_T", "row_T", "group_T"):
            setattr(self, name, getattr(self, name)[last_T])
        if self.lead_T is not None:
            self.lead_T = self.lead_T[last_T]
        self.tokens_S = np.bincount(self.step_T)

    def layer(self, layer: int) -> None:
        """Replays one layer and adds what it found; of prompts' rows the last layer's attention passes on the last."""
        table = ReplicaTable.of(self.plan, layer, self.dispatch.rows_everywhere)
        self.size_E, self.formats = self.size_LE[layer], self.formats_L[layer]
        all_SW = self._tokens_SW()
        no_capacity = self.plan.cold_capacity_factor is None  # which rows would lose theirs depends on all of them
        if self.execution.span > 1 and layer + 1 == self.plan.num_layers and no_capacity:
            self._keep_last_rows()
        tokens_SW = self._tokens_SW()
        experts_TK = self._cut(layer, table)
        ranks_TK, work = self.dispatch.run(self, layer, table, experts_TK)
        times_P = [self._attention_s(all_SW, tokens_SW), self.model.gate_s(tokens_SW).max(-1), *work]
        if is_launched(self.execution.dispatcher):
            times_P = [np.maximum(s, least) for s, least in zip(times_P, self.model.host_s(), strict=True)]
        self.phases_LP[layer] = [np.sum(seconds) for seconds in times_P]
        self.hidden_L[layer] = self._hidden_s(*times_P[2:])
        self._count_loads(layer, ranks_TK, experts_TK.shape[1])

    def peak_and_mean(self) -> tuple[np.ndarray, np.ndarray]:
        """Choices of the busiest rank and of the mean one, [L], summed over steps."""
        peaks = np.array([loads_SW.max(1).sum() for loads_SW in self.loads_LSW], float)
        return peaks, np.array([loads_SW.mean(1).sum() for loads_SW in self.loads_LSW])

    @property
    def place_T(self) -> np.ndarray:
        """Place of every row in its step."""
        return np.arange(len(self.step_T)) - (self.tokens_S.cumsum() - self.tokens_S)[self.step_T]

    def rows_SW(self) -> np.ndarray:
        """Rows of each step that are each rank's own."""
        return self.per_rank(self.step_T, self.owner_T, self.steps)

    def _tokens_SW(self) -> np.ndarray:
        """Rows of each step that each rank has in attention and gate."""
        if self.dispatch.rows_everywhere:
            return np.repeat(self.tokens_S[:, None], self.world, 1)
        return self.rows_SW()

    def _cut(self, layer: int, table: ReplicaTable) -> np.ndarray:
        experts_TK = self.trace.experts[self.kept_T, layer].astype(np.int64)
        weights = self.trace.weights
        if self.execution.dispatcher in ("local", "split_width", "gathered"):
            return experts_TK
        if self.dispatch.rows_everywhere:
            local_SE, place_T = np.tile(table.local_WE[0], (self.steps, 1)), self.step_T
        else:
            local_SE, place_T = np.tile(table.local_WE, (self.steps, 1)), self.step_T * self.world + self.owner_T
        weights_TK = None if weights is None else weights[self.kept_T, layer]
        experts_TK, self.dropped_L[layer], self.rerouted_L[layer] = cut_trace(
            self.plan, local_SE, experts_TK, weights_TK, place_T
        )
        return experts_TK

    def in_turn(
        self, table: ReplicaTable, experts_TK: np.ndarray, sender_T: np.ndarray, row_T: np.ndarray, rows_S: np.ndarray
    ) -> np.ndarray:
        """Rank of each choice where nothing is counted: by turns, in small batches (of all ranks) by one holder."""
        shape = experts_TK.shape
        sender_TK, row_TK = (np.broadcast_to(x[:, None], shape) for x in (sender_T, row_T))
        small_S = rows_S * shape[1] <= self.execution.small_choices * self.plan.num_experts
        small, large = (table.ranks(experts_TK, sender_TK, row_TK, few) for few in (True, False))
        return np.where(small_S[self.step_T][:, None], small, large)

    def travel_s(self, layer: int, pairs: Pairs, row_bytes: int, messages: int) -> np.ndarray:
        """Adds the bytes of an exchange; its seconds for each group."""
        row_N, from_N, to_N = pairs
        counts_WW = np.bincount(from_N * self.world + to_N, minlength=self.world**2).reshape(self.world, -1)
        self.add_links(layer, counts_WW * float(row_bytes))
        group_N, across_N = self.group_T[row_N], from_N // self.per_node != to_N // self.per_node
        out, into = [], []
        for mine_N in (~across_N, across_N)[: 1 if self.per_node == self.world else 2]:
            out.append(row_bytes * self.per_rank(group_N[mine_N], from_N[mine_N], self.groups))
            into.append(row_bytes * self.per_rank(group_N[mine_N], to_N[mine_N], self.groups))
        return self.model.exchange_s(out, into, messages)

    def sum_everywhere_s(self, layer: int) -> np.ndarray:
        """All-reduce of every row: bytes on the links of a ring; seconds for each step."""
        size_S = self.tokens_S * float(self.model.shape.row_bytes)
        ring_WW = np.roll(np.eye(self.world), 1, axis=1) * (self.world > 1)
        self.add_links(layer, ring_WW * ring_share(self.world) * size_S.sum())
        return self.model.all_reduce_s(size_S)

    def _attention_s(self, tokens_SW: np.ndarray, passed_on_SW: np.ndarray) -> np.ndarray:
        execution, split = self.execution, self._split
        times = tokens_SW, execution.context, execution.span, split, passed_on_SW
        seconds_S = self.model.attention_s(*times).max(-1)
        if split > 1:
            seconds_S = seconds_S + self.model.all_reduce_s(self.tokens_S * float(self.model.shape.row_bytes))
        return seconds_S

    def ends_s(self) -> float:
        """Seconds outside the layers, summed over steps."""
        coherent, shape = self.execution.dispatcher == "coherent", self.model.shape
        tokens_SW = self.per_rank(self.step_T, self.owner_T, self.steps)
        if self._split > 1 or coherent:  # every rank has the last rows of all
            tokens_SW = self.tokens_S[:, None]
        span = self.execution.span if len(self.kept_T) == self.trace.num_tokens else 1
        seconds = sum(self.model.head_s(tokens_W / span, self._split).max() for tokens_W in tokens_SW)
        seconds += self.steps * self.model.between_steps_s()
        if coherent:  # one sum over the ranks of what every layer added to the caches, and of the last rows
            added = 2 * shape.kv_heads * shape.head_dim * shape.data_bytes * self.plan.num_layers
            seconds += np.sum(self.model.all_reduce_s(self.tokens_S * float(added + shape.row_bytes)))
        return float(seconds)

    def experts_s(self, group_T, groups: int, ranks_TK: np.ndarray, experts_TK: np.ndarray) -> np.ndarray:
        """Seconds of the busiest rank in each group."""
        kept_TK = ranks_TK >= 0
        group_N = np.broadcast_to(group_T[:, None], ranks_TK.shape)[kept_TK]
        place_N = (group_N * self.world + ranks_TK[kept_TK]) * self.plan.num_experts + experts_TK[kept_TK]
        place_P, rows_P = np.unique(place_N, return_counts=True)
        rank_P, ranks = place_P // self.plan.num_experts, groups * self.world
        expert_s_P = self.model.expert_s(rows_P, size=self.size_E[place_P % self.plan.num_experts])
        touched_G, rows_G, seconds_G = (np.bincount(rank_P, values_P, ranks) for values_P in (None, rows_P, expert_s_P))
        start_G = self.model.experts_start_s(rows_G / np.maximum(touched_G, 1))
        seconds_G = seconds_G + self.formats * start_G  # the kernels of each format run
        return seconds_G.reshape(groups, self.world).max(1)

    def _hidden_s(self, dispatch_G: np.ndarray, experts_G: np.ndarray, combine_G: np.ndarray) -> float:
        """What overlapping the chunks saves, by ``moe.schedule``: S0 S1 R0 S2 R1 … beside C0 C1 C2 …"""
        chunks = self.execution.chunks
        if chunks == 1 or not self.model.hardware.overlaps:
            return 0.0
        send_CS, compute_CS, back_CS = (x.reshape(self.steps, chunks).T for x in (dispatch_G, experts_G, combine_G))
        wire_S = arrived_S = send_CS[0]
        experts_S = np.zeros(self.steps)
        for chunk in range(chunks):
            experts_S = np.maximum(experts_S, arrived_S) + compute_CS[chunk]
            if chunk + 1 < chunks:
                wire_S = arrived_S = wire_S + send_CS[chunk + 1]
            wire_S = np.maximum(wire_S, experts_S) + back_CS[chunk]
        return float((send_CS + compute_CS + back_CS).sum() - wire_S.sum())

    @property
    def _split(self) -> int:
        """Ranks that share attention and vocabulary."""
        return self.world if self.dispatch.splits_attention else 1

    def _count_loads(self, layer: int, ranks_TK: np.ndarray | None, choices: int) -> None:
        if ranks_TK is None:
            loads_SW = np.repeat(self.tokens_S[:, None] * (choices / self.world), self.world, 1)
        else:
            kept_TK = ranks_TK >= 0
            steps_TK = np.broadcast_to(self.step_T[:, None], ranks_TK.shape)
            loads_SW = self.per_rank(steps_TK[kept_TK], ranks_TK[kept_TK], self.steps)
            self._count_crossings(first_kept(ranks_TK, self.owner_T))
        self.loads_LSW.append(loads_SW)
        self.rows_LW[layer] = loads_SW.sum(0)

    def _count_crossings(self, lead_T: np.ndarray) -> None:
        if self.lead_T is not None:
            self.crossings += int((lead_T != self.lead_T).sum())
            self.node_crossings += int((lead_T // self.per_node != self.lead_T // self.per_node).sum())
        self.lead_T = lead_T

    def add_links(self, layer: int, bytes_WW: np.ndarray) -> None:
        self.links_WW += bytes_WW
        self.bytes_L[layer] += bytes_WW.sum()

    def per_rank(self, group_N: np.ndarray, rank_N: np.ndarray, groups: int) -> np.ndarray:
        """How many fall on each rank of each group: [G, W]."""
        return np.bincount(group_N * self.world + rank_N, minlength=groups * self.world).reshape(groups, -1)
