"""The MoE layer: route, dispatch, experts, combine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mixtralkit.config import MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.assignment import Assigner
from mixtralkit.moe.capacity import CutRouting, cold_capacity, cut_to_capacity
from mixtralkit.moe.coherent import CoherentDispatch
from mixtralkit.moe.dispatch import (
    Dispatch,
    ExchangedDispatch,
    GatheredDispatch,
    ReplicatedDispatch,
    SplitWidthDispatch,
    StaticDispatch,
    TwoStageDispatch,
)
from mixtralkit.moe.experts import Experts
from mixtralkit.moe.gate import Routing, TopKGate
from mixtralkit.moe.move import MoveReport, move_experts
from mixtralkit.moe.peer import PeerDispatch
from mixtralkit.moe.schedule import num_chunks, run_in_chunks
from mixtralkit.moe.shadow import Home, LayerShadows, ShadowCache, ShadowReport
from mixtralkit.ops.symmetric_exchange import ExpertPlaces, SymmetricExchange
from mixtralkit.planning.replicas import is_small, one_holder

if TYPE_CHECKING:
    from mixtralkit.moe.two_phase import Flight


@dataclass(frozen=True)
class MoEReport:
    """What one forward of a layer did; tensors stay on the device.

    Attributes:
        routing: the gate's choice, before any capacity.
        dropped, rerouted: int64 scalars, choices over a cold expert's capacity.
        handles: what dispatch learnt, one for each chunk (``exchange.ExchangeHandle`` for exact exchanges).
        shadows: experts computed at home by a copy, None in a layer without shadows.
    """

    routing: Routing
    dropped: torch.Tensor
    rerouted: torch.Tensor
    handles: tuple[Any, ...]
    shadows: ShadowReport | None = None


class MoELayer(nn.Module):
    """Σ_k weight · expert(x) for every row, the experts wherever the plan has put them.

    Parameters are named as Mistral's ``feed_forward``: ``gate.weight`` [E, D] on every rank, ``w13`` and ``w2`` of
    this rank's slots.

    ``leaves_parts``, for rows that are on every rank, leaves the sum of the ranks' parts to the caller.
    """

    def __init__(
        self,
        layer: int,
        layout: RankLayout,
        context: RankContext,
        dtype: torch.dtype,
        options: MoEOptions | None = None,
        nodes: tuple[RankContext, RankContext] | None = None,
        shadow_cache: ShadowCache | None = None,
        peers: SymmetricExchange | None = None,
    ) -> None:
        """``nodes`` (``context.split_nodes(…)``) makes the exchange two-stage: across nodes, then inside.

        ``shadow_cache`` (``ShadowCache.for_model(…)``) is the one of all layers; None shadows nothing. So is ``peers``
        (see ``use_peers``); None leaves exchanges of static shape to collectives.
        """
        super().__init__()
        config = layout.config
        self.leaves_parts = False
        self.layer, self.layout, self.context, self.nodes, self.peers = layer, layout, context, nodes, peers
        self.options = MoEOptions() if options is None else options
        self.gate = TopKGate(config.dim, config.num_experts, config.num_experts_per_tok, dtype, context.device)
        hidden = layout.hidden[1] - layout.hidden[0]
        self.experts = Experts(len(layout.experts(layer)), config.dim, hidden, dtype, context.device)
        self.way = self._choose_way()
        faster = self.options.faster
        self.in_chunks = faster.schedule and self._rows_travel(self.way)
        if self.in_chunks and not faster.schedule_force:  # at no size did it pay there (docs/smart-schedule.md)
            self.in_chunks = not context.gpus_reach_each_other()
        self._look_up(shadow_cache)

    def _look_up(self, shadow_cache: ShadowCache | None) -> None:
        """What follows from the slots of this layer in the layout's plan."""
        slots_WE = self.layout.plan.slot_of_LWE[self.layer]
        self.assigner = Assigner(slots_WE, self.context, self.layout.parallel.attention == "tp")
        self.places = self.few_places = None
        if self.peers is not None:
            self.use_peers(self.peers)
        self.shadows = None
        if shadow_cache is not None:
            self.shadows = LayerShadows(self.layer, self.experts, slots_WE, shadow_cache, self.options.faster)

    def use_peers(self, peers: SymmetricExchange) -> None:
        """From now on, exchanges of static shape with up to ``peers.max_rows`` rows a rank go through ``peers``.

        Every rank must do so before the same call.
        """
        self.peers = peers
        slots_WE = self.layout.plan.slot_of_LWE[self.layer]
        self.places, self.few_places = (
            ExpertPlaces.of(held_WE, self.context.rank, self.context.device)
            for held_WE in (slots_WE, one_holder(slots_WE))
        )

    def adopt(self, layout: RankLayout) -> MoveReport:
        """Goes over to this layer's slots in another plan, between two steps. Collective.

        Experts that a rank lacks come from others, copies for shadows are forgotten; results stay the same.

        Raises:
            ValueError: another model, ranks or ranks_per_node; experts 'tp'; weights that train.
            RankFailed: another rank had no memory for it; then nothing has changed.
        """
        old, new = self.layout.plan, layout.plan
        if layout.parallel.experts != "ep":
            raise ValueError(f"experts ({layout.parallel.experts!r}) must be 'ep' for a new plan between steps")
        if self.experts.w13.requires_grad:
            raise ValueError("a new plan between steps needs weights that do not train")
        ranks = [(plan.world_size, plan.ranks_per_node) for plan in (old, new)]
        if replace(layout, plan=old) != self.layout or ranks[0] != ranks[1]:
            raise ValueError("a new plan between steps must have the model, ranks and ranks_per_node of the old one")
        slots = (plan.slot_of_LWE[self.layer] for plan in (old, new))
        report = move_experts(self.experts, *slots, self.context, new.ranks_per_node)
        self.layout = layout
        self._look_up(None if self.shadows is None else self.shadows.cache)
        return report

    def forward(
        self, x_TD: torch.Tensor, rows_per_rank: int | None = None, flight: Flight | None = None
    ) -> tuple[torch.Tensor, MoEReport]:
        """Rows [T, D] (T may be 0) to rows of the same order, and what happened. Collective over the ranks.

        Args:
            rows_per_rank: a promise that no rank has more rows; lets the exchange keep static shapes.
            flight: what the layer before has learnt and begun for this one (``moe/two_phase.py``).
        """
        routing = self.gate(x_TD)
        way, home, cut = self.arrange(x_TD, routing, rows_per_rank, flight)
        if self.in_chunks and self._rows_travel(way):
            chunks = num_chunks(self.context.world_size, self.options.faster.group_size)
            y_TD, handles = run_in_chunks(way, home.experts, home.x_TD, cut, home.assigner, chunks)
        else:
            rows, handle = way.dispatch(home.x_TD, cut, home.assigner)
            y_TD, handles = home.experts(rows), [handle]
            if not self.leaves_parts:
                y_TD = way.combine(y_TD, handle)
        return y_TD, MoEReport(routing, cut.dropped, cut.rerouted, tuple(handles), home.report)

    def forward_moving(self, x_TD: torch.Tensor, ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same sums, left where they are computed: rows that live here from now on [M, D], and their ids [M].

        Context-coherent routing (``moe/coherent.py``): a row moves to the rank of its heaviest choice, by one exchange,
        and stays until a later layer moves it on. For rows that each rank has of its own. Collective.

        Args:
            ids_T: int64 numbers below 2^24 that tell the rows of all ranks apart; they travel with them.
        """
        if not self._rows_travel(self.way):
            raise ValueError("rows can only move with attention 'dp' and experts 'ep'")
        routing, way = self.gate(x_TD), CoherentDispatch(self.context)
        _, home, cut = self.arrange(x_TD, routing)
        rows, handle = way.dispatch(home.x_TD, cut, home.assigner, ids_T)
        return way.combine(home.experts(rows), handle)

    def arrange(
        self, x_TD: torch.Tensor, routing: Routing, rows_per_rank: int | None = None, flight: Flight | None = None
    ) -> tuple[Dispatch, Home, CutRouting]:
        """How these rows will travel, what is at home for them, and which of their choices fit. Collective."""
        way = self._way_for(rows_per_rank)
        home = Home(x_TD, self.assigner, self.experts)
        if flight is not None and self.shadows is not None and self._rows_travel(way):
            home = flight.at(self.shadows, x_TD, routing.experts_TK)
        elif self.shadows is not None:
            home = self.shadows.for_step(x_TD, routing.experts_TK, may_wait=self._rows_travel(way))
        capacity, plan = self._capacity(x_TD.shape[0]), self.layout.plan
        return way, home, cut_to_capacity(routing, home.assigner.at_home_E, capacity, plan.overflow, plan.cut_order)

    def _capacity(self, tokens: int) -> int | None:
        if self.layout.parallel.experts == "tp":
            return None  # every rank has a part of every expert: none is cold
        return cold_capacity(self.layout.plan, tokens, self.gate.top_k)

    def _choose_way(self) -> Dispatch:
        """The way rows travel under the layout's attention and experts (DESIGN §2)."""
        match self.layout.parallel:
            case ParallelConfig("tp", "tp"):
                return SplitWidthDispatch(self.context)
            case ParallelConfig("dp", "tp"):
                return GatheredDispatch(self.context)
            case ParallelConfig("tp", "ep"):
                return ReplicatedDispatch(self.context)
        if self.nodes is not None:
            return TwoStageDispatch(self.context, *self.nodes)
        return ExchangedDispatch(self.context)

    def _way_for(self, rows_per_rank: int | None) -> Dispatch:
        if rows_per_rank is None or not self._rows_travel(self.way) or self.options.exchange == "exact":
            return self.way
        fits = self.peers is not None and rows_per_rank <= self.peers.max_rows
        # copies of experts would change the places from step to step
        if fits and self.shadows is None and self.nodes is None and not torch.is_grad_enabled():
            few = is_small(rows_per_rank * self.context.world_size, self.gate.top_k, self.layout.plan.num_experts)
            return PeerDispatch(self.peers, self.few_places if few else self.places, rows_per_rank)
        return StaticDispatch(self.context, rows_per_rank)

    @staticmethod
    def _rows_travel(way: Dispatch) -> bool:
        """Whether rows go just where they are needed, in numbers that the host knows."""
        return isinstance(way, ExchangedDispatch | TwoStageDispatch)
