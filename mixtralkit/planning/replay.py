"""The replay of a trace, a layer at a time: which rows travel in every layout, and what the time model says of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtralkit.planning.cost import TimeModel, ring_share
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.replicas import SMALL_BATCH_CHOICES
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.planning.traffic import Holders, Spread, cut_to_capacity, once_per_member

LAYOUTS = ("tp", "tp_ep", "ep", "static", "peer", "two_stage", "coherent")
PHASES = ("attention", "gate", "dispatch", "experts", "combine")
CHUNKED = ("ep", "two_stage")


@dataclass(frozen=True)
class Execution:
    """How a plan is run.

    Attributes:
        layout: ``tp`` (all split), ``tp_ep`` (attention split, whole experts, rows everywhere), or, with each rank its
            own sequences: ``ep`` (exact exchange), ``static`` (room for every row everywhere), ``peer`` (through the
            GPUs' memory, which needs ``fused``), ``two_stage`` (across nodes once, then inside), ``coherent`` (rows
            stay where their experts are).
        batch: tokens of a step on each rank; None takes the whole trace as one step.
        chunks: parts of a step whose exchange and products overlap (the schedule); 1 is none.
        context: tokens of each sequence that the cache holds already.
        span: tokens of a step that belong to one sequence; 1 in decode.
        fused: by this project's kernels, launched without waiting for the host; else as plain torch runs.
        few_choices: of an expert in the mean, up to which fused steps compute it at one of its holders alone
            (``replicas.is_small``); 0 lets replicas take turns always.
    """

    layout: str = "ep"
    batch: int | None = None
    chunks: int = 1
    context: int = 0
    span: int = 1
    fused: bool = False
    few_choices: int = SMALL_BATCH_CHOICES

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout ({self.layout!r}) must be one of {', '.join(LAYOUTS)}")
        for name, least in (("batch", 1), ("chunks", 1), ("context", 0), ("span", 1)):
            value = getattr(self, name)
            if not (name == "batch" and value is None) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least {least}")
        if self.chunks > 1 and self.layout not in CHUNKED:
            raise ValueError(
                f"chunks ({self.chunks}) must be 1 with layout {self.layout}: only exact exchanges overlap"
            )
        if self.layout == "peer" and not self.fused:
            raise ValueError("layout 'peer' needs fused: plain torch has no such exchange")


class Replay:
    """One replay as it goes from layer to layer; its arrays are ``simulate.Simulation``'s."""

    def __init__(
        self, plan: ExpertPlan, trace: RoutingTrace, model: TimeModel, execution: Execution, spread: Spread
    ) -> None:
        self.plan, self.trace, self.model, self.execution, self.spread = plan, trace, model, execution, spread
        self.world = plan.world_size
        self.per_node = min(plan.ranks_per_node or self.world, self.world)
        self._deal(trace.num_tokens)
        layers = plan.num_layers
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
        in_step = tokens if batch is None else batch * self.world
        index_T = np.arange(tokens)
        self.step_T, place_T = np.divmod(index_T, in_step)
        self.steps = int(self.step_T[-1]) + 1
        self.tokens_S = np.bincount(self.step_T)
        self.home_T = place_T * self.world // self.tokens_S[self.step_T]
        key_T = self.step_T * self.world + self.home_T
        rows_G = np.bincount(key_T, minlength=self.steps * self.world)
        self.row_T = index_T - (rows_G.cumsum() - rows_G)[key_T]
        short_T, longer_T = np.divmod(rows_G[key_T], chunks)
        boundary_T = longer_T * (short_T + 1)
        late_T = longer_T + (self.row_T - boundary_T) // np.maximum(short_T, 1)
        chunk_T = np.where(self.row_T < boundary_T, self.row_T // (short_T + 1), late_T)
        self.groups, self.group_T = self.steps * chunks, self.step_T * chunks + chunk_T

    def _keep_last_rows(self) -> None:
        """Leaves the last row of every prompt, and the last of a step."""
        place_T = np.arange(len(self.step_T)) - (self.tokens_S.cumsum() - self.tokens_S)[self.step_T]
        last_T = ((place_T + 1) % self.execution.span == 0) | (place_T + 1 == self.tokens_S[self.step_T])
        for name in ("kept_T", "step_T", "home_T", "row_T", "group_T"):
            setattr(self, name, getattr(self, name)[last_T])
        if self.lead_T is not None:
            self.lead_T = self.lead_T[last_T]
        self.tokens_S = np.bincount(self.step_T)

    def layer(self, layer: int) -> None:
        """Replays one layer and adds what it found; of prompts' rows the last layer's attention passes on the last."""
        holders, layout = Holders.of(self.plan, layer), self.execution.layout
        all_SW = self._tokens_SW()
        no_capacity = self.plan.cold_capacity_factor is None  # which rows would lose theirs depends on all of them
        if self.execution.span > 1 and layer + 1 == self.plan.num_layers and no_capacity:
            self._keep_last_rows()
        tokens_SW = self._tokens_SW()
        experts_TK = self._cut(layer, holders)
        run = {"tp": self._split_width, "tp_ep": self._replicated, "static": self._static,
               "peer": self._through_memory}.get(layout, self._exchanged)  # fmt: skip
        ranks_TK, work = run(layer, holders, experts_TK)
        times_P = [self._attention_s(all_SW, tokens_SW), self.model.gate_s(tokens_SW).max(-1), *work]
        if self._launched:
            counts = self.model.kernels
            host_P = [self.model.launches_s(n) for n in (counts.attention, counts.gate, 0, counts.experts, 0)]
            times_P = [np.maximum(device, host) for device, host in zip(times_P, host_P, strict=True)]
            work = times_P[2:]
        self.phases_LP[layer] = [np.sum(seconds) for seconds in times_P]
        self.hidden_L[layer] = self._hidden_s(*work)
        self._count_loads(layer, ranks_TK, experts_TK.shape[1])

    def peak_and_mean(self) -> tuple[np.ndarray, np.ndarray]:
        """Choices of the busiest rank and of the mean one, [L], summed over steps."""
        peaks = np.array([loads_SW.max(1).sum() for loads_SW in self.loads_LSW], float)
        return peaks, np.array([loads_SW.mean(1).sum() for loads_SW in self.loads_LSW])

    def _tokens_SW(self) -> np.ndarray:
        """Rows of each step that each rank has in attention and gate."""
        if self.execution.layout in ("tp", "tp_ep"):
            return np.repeat(self.tokens_S[:, None], self.world, 1)
        return self._per_rank(self.step_T, self.home_T, self.steps)

    def _cut(self, layer: int, holders: Holders) -> np.ndarray:
        experts_TK = self.trace.experts[self.kept_T, layer].astype(np.int64)
        weights = self.trace.weights
        if self.execution.layout == "tp":
            return experts_TK
        if self.execution.layout == "tp_ep":
            home_SE, place_T = np.tile(holders.holds_WE.all(0), (self.steps, 1)), self.step_T
        else:
            home_SE = np.tile(holders.holds_WE, (self.steps, 1))
            place_T = self.step_T * self.world + self.home_T
        weights_TK = None if weights is None else weights[self.kept_T, layer]
        experts_TK, self.dropped_L[layer], self.rerouted_L[layer] = cut_to_capacity(
            self.plan, home_SE, experts_TK, weights_TK, place_T
        )
        return experts_TK

    def _split_width(self, layer: int, holders: Holders, experts_TK: np.ndarray):
        num_experts = self.plan.num_experts
        keys_TK = self.step_T[:, None] * num_experts + experts_TK
        counts_SE = np.bincount(keys_TK.ravel(), minlength=self.steps * num_experts).reshape(self.steps, -1)
        experts_S = self.model.experts_s(counts_SE, split=self.world)
        return None, (np.zeros(self.steps), experts_S, self._sum_everywhere(layer))

    def _replicated(self, layer: int, holders: Holders, experts_TK: np.ndarray):
        source_T = np.zeros_like(self.home_T)
        if self.execution.fused and self.execution.span == 1:  # no counts are taken in a graph
            place_T = np.arange(len(self.step_T)) - (self.tokens_S.cumsum() - self.tokens_S)[self.step_T]
            turns_TK = holders.assign_in_turn(experts_TK, source_T, place_T, rows_are_everywhere=True)
            ranks_TK, waits = self._one_holder_of_few(self.tokens_S, holders, experts_TK, turns_TK), 0.0
        else:
            everywhere = {"rows_are_everywhere": True}
            ranks_TK = holders.assign(experts_TK, source_T, self.step_T, self.steps, self.spread, **everywhere)
            waits = self.model.hardware.sync_s if holders.has_choice(True) else 0.0
        return ranks_TK, (
            np.full(self.steps, waits), self._experts_s(self.step_T, self.steps, ranks_TK, experts_TK),
            self._sum_everywhere(layer),
        )  # fmt: skip

    def _static(self, layer: int, holders: Holders, experts_TK: np.ndarray):
        ranks_TK = holders.assign_in_turn(experts_TK, self.home_T, self.row_T)
        shape, model = self.model.shape, self.model
        room_S = self._per_rank(self.step_T, self.home_T, self.steps).max(1)
        out_S, back_S = room_S * (shape.row_bytes + shape.packed_bytes), room_S * shape.row_bytes
        self._add_links(layer, (1 - np.eye(self.world)) * (out_S + back_S).sum())
        launches = model.launches_s(model.kernels.dispatch), model.launches_s(model.kernels.combine)
        dispatch_S = launches[0] + model.all_gather_s(out_S) + model.all_gather_s(0.0)
        combine_S = launches[1] + model.all_gather_s(back_S)
        return ranks_TK, (
            dispatch_S, self._experts_s(self.step_T, self.steps, ranks_TK, experts_TK), combine_S
        )  # fmt: skip

    def _through_memory(self, layer: int, holders: Holders, experts_TK: np.ndarray):
        """Kernels that reach into the other ranks' memory: a row goes to each of its ranks once and comes back."""
        turns_TK = holders.assign_in_turn(experts_TK, self.home_T, self.row_T)
        rows_S = self._per_rank(self.step_T, self.home_T, self.steps).max(1) * self.world  # each rank has that many
        ranks_TK = self._one_holder_of_few(rows_S, holders, experts_TK, turns_TK)
        home_T1, row_bytes = self.home_T[:, None], float(self.model.shape.row_bytes)
        row_N, from_N, to_N = _pairs(once_per_member(ranks_TK) & (ranks_TK != home_T1), home_T1, ranks_TK)
        counts_WW = np.bincount(from_N * self.world + to_N, minlength=self.world**2).reshape(self.world, -1)
        self._add_links(layer, (counts_WW + counts_WW.T) * row_bytes)
        step_N = self.step_T[row_N]
        out_SW, into_SW = (row_bytes * self._per_rank(step_N, ranks_N, self.steps) for ranks_N in (from_N, to_N))
        way_S = self.model.peer_exchange_s(out_SW, into_SW) / 2
        return ranks_TK, (way_S, self._experts_s(self.step_T, self.steps, ranks_TK, experts_TK), way_S)

    def _one_holder_of_few(self, rows_S, holders: Holders, experts_TK: np.ndarray, turns_TK: np.ndarray) -> np.ndarray:
        """In steps of few rows an expert's one holder for all of its choices; ``turns_TK`` in the others."""
        few_S = rows_S * experts_TK.shape[1] <= self.execution.few_choices * self.plan.num_experts
        return np.where(few_S[self.step_T][:, None], holders.assign_to_one(experts_TK), turns_TK)

    def _exchanged(self, layer: int, holders: Holders, experts_TK: np.ndarray):
        """Exact exchanges: the pairs of ranks that rows travel between, stage by stage."""
        ranks_TK = holders.assign(experts_TK, self.home_T, self.group_T, self.groups, self.spread)
        self.away_L[layer] = ((ranks_TK >= 0) & (ranks_TK != self.home_T[:, None])).sum()
        shape, model = self.model.shape, self.model
        out_bytes, choice = shape.row_bytes + shape.packed_bytes, holders.has_choice(False)
        kernels = model.kernels.dispatch + choice * model.kernels.replicas
        start = model.launches_s(kernels) + (3 + choice) * model.hardware.sync_s
        end = model.launches_s(model.kernels.combine)
        stages = self._stages(ranks_TK)
        dispatch_G = start + sum(self._travel(layer, stage, out_bytes, messages=3) for stage in stages)
        if choice:
            dispatch_G = dispatch_G + model.all_gather_s(8.0 * shape.num_experts)  # counts, to spread evenly
        experts_G = self._experts_s(self.group_T, self.groups, ranks_TK, experts_TK)
        if self.execution.layout == "coherent":
            dispatch_G = dispatch_G + model.all_gather_s(0.0) + model.hardware.sync_s  # is any row split?
            returns = [self._move_homes(ranks_TK)]
        else:
            returns = [(row_N, to_N, from_N) for row_N, from_N, to_N in reversed(stages)]
        combine_G = end + sum(self._travel(layer, stage, shape.row_bytes, messages=1) for stage in returns)
        return ranks_TK, (dispatch_G, experts_G, combine_G)

    def _stages(self, ranks_TK: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each exchange on the way out: number of every row that travels, and from which rank to which."""
        home_T1 = self.home_T[:, None]
        if self.execution.layout == "two_stage":
            nodes_TK = np.where(ranks_TK < 0, -1, ranks_TK // self.per_node)
            holder_TK = nodes_TK * self.per_node + home_T1 % self.per_node
            across_TK = once_per_member(nodes_TK) & (nodes_TK != home_T1 // self.per_node)
            inside_TK = once_per_member(ranks_TK) & (ranks_TK != holder_TK)
            return [_pairs(across_TK, home_T1, holder_TK), _pairs(inside_TK, holder_TK, ranks_TK)]
        members_TK = ranks_TK
        if self.execution.layout == "coherent":
            members_TK = np.concatenate([ranks_TK, _first_kept(ranks_TK, self.home_T)[:, None]], 1)
        return [_pairs(once_per_member(members_TK) & (members_TK != home_T1), home_T1, members_TK)]

    def _move_homes(self, ranks_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows stay at their heaviest choice; the parts that other ranks computed travel there."""
        self.home_T = _first_kept(ranks_TK, self.home_T)
        home_T1 = self.home_T[:, None]
        return _pairs(once_per_member(ranks_TK) & (ranks_TK != home_T1), ranks_TK, home_T1)

    def _travel(self, layer: int, pairs: tuple[np.ndarray, ...], row_bytes: int, messages: int) -> np.ndarray:
        """Adds the bytes of an exchange; its seconds for each group."""
        row_N, from_N, to_N = pairs
        counts_WW = np.bincount(from_N * self.world + to_N, minlength=self.world**2).reshape(self.world, -1)
        self._add_links(layer, counts_WW * float(row_bytes))
        group_N, across_N = self.group_T[row_N], from_N // self.per_node != to_N // self.per_node
        out, into = [], []
        for mine_N in (~across_N, across_N)[: 1 if self.per_node == self.world else 2]:
            out.append(row_bytes * self._per_rank(group_N[mine_N], from_N[mine_N], self.groups))
            into.append(row_bytes * self._per_rank(group_N[mine_N], to_N[mine_N], self.groups))
        return self.model.exchange_s(out, into, messages)

    def _sum_everywhere(self, layer: int) -> np.ndarray:
        """All-reduce of every row: bytes on the links of a ring; seconds for each step."""
        size_S = self.tokens_S * float(self.model.shape.row_bytes)
        ring_WW = np.roll(np.eye(self.world), 1, axis=1) * (self.world > 1)
        self._add_links(layer, ring_WW * ring_share(self.world) * size_S.sum())
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
        tokens_SW = self._per_rank(self.step_T, self.home_T, self.steps)
        if self._split > 1:
            tokens_SW = self.tokens_S[:, None]
        span = self.execution.span if len(self.kept_T) == self.trace.num_tokens else 1
        seconds = sum(self.model.head_s(tokens_W / span, self._split).max() for tokens_W in tokens_SW)
        seconds += self.steps * self.model.between_steps_s()
        if self.execution.layout == "coherent":
            seconds += sum(self.model.all_gather_s(tokens_SW.max(1) * float(self.model.shape.row_bytes)))
        return float(seconds)

    def _experts_s(self, group_T, groups: int, ranks_TK: np.ndarray, experts_TK: np.ndarray) -> np.ndarray:
        """Seconds of the busiest rank in each group."""
        kept_TK = ranks_TK >= 0
        group_N = np.broadcast_to(group_T[:, None], ranks_TK.shape)[kept_TK]
        place_N = (group_N * self.world + ranks_TK[kept_TK]) * self.plan.num_experts + experts_TK[kept_TK]
        place_P, rows_P = np.unique(place_N, return_counts=True)
        seconds_GW = np.bincount(
            place_P // self.plan.num_experts, self.model.expert_s(rows_P), minlength=groups * self.world
        )
        most_G = np.zeros(groups)
        np.maximum.at(most_G, place_P // (self.plan.num_experts * self.world), rows_P)
        return self.model.experts_start_s(most_G) + seconds_GW.reshape(groups, self.world).max(1)

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
    def _launched(self) -> bool:
        """Whether the host launches fused kernels one by one, no faster than it can: it waits for counts in between."""
        return self.execution.fused and self.execution.layout in ("ep", "two_stage", "coherent")

    @property
    def _split(self) -> int:
        """Ranks that share attention and vocabulary."""
        return self.world if self.execution.layout in ("tp", "tp_ep") else 1

    def _count_loads(self, layer: int, ranks_TK: np.ndarray | None, choices: int) -> None:
        if ranks_TK is None:
            loads_SW = np.repeat(self.tokens_S[:, None] * (choices / self.world), self.world, 1)
        else:
            kept_TK = ranks_TK >= 0
            steps_TK = np.broadcast_to(self.step_T[:, None], ranks_TK.shape)
            loads_SW = self._per_rank(steps_TK[kept_TK], ranks_TK[kept_TK], self.steps)
            self._count_crossings(_first_kept(ranks_TK, self.home_T))
        self.loads_LSW.append(loads_SW)
        self.rows_LW[layer] = loads_SW.sum(0)

    def _count_crossings(self, lead_T: np.ndarray) -> None:
        if self.lead_T is not None:
            self.crossings += int((lead_T != self.lead_T).sum())
            self.node_crossings += int((lead_T // self.per_node != self.lead_T // self.per_node).sum())
        self.lead_T = lead_T

    def _add_links(self, layer: int, bytes_WW: np.ndarray) -> None:
        self.links_WW += bytes_WW
        self.bytes_L[layer] += bytes_WW.sum()

    def _per_rank(self, group_N: np.ndarray, rank_N: np.ndarray, groups: int) -> np.ndarray:
        """How many fall on each rank of each group: [G, W]."""
        return np.bincount(group_N * self.world + rank_N, minlength=groups * self.world).reshape(groups, -1)


def _first_kept(ranks_TK: np.ndarray, otherwise_T: np.ndarray) -> np.ndarray:
    """Rank of each row's heaviest choice that was kept; ``otherwise_T`` for a row that lost all."""
    kept_TK = ranks_TK >= 0
    first_T = np.take_along_axis(ranks_TK, kept_TK.argmax(1)[:, None], 1)[:, 0]
    return np.where(kept_TK.any(1), first_T, otherwise_T)


def _pairs(travels_TK: np.ndarray, from_TK: np.ndarray, to_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, giver and taker of every row that travels."""
    row_N = travels_TK.nonzero()[0]
    return row_N, *(np.broadcast_to(x, travels_TK.shape)[travels_TK] for x in (from_TK, to_TK))
