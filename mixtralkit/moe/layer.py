"""The MoE layer: route, cut to capacity, dispatch, experts, combine, for any expert plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mixtralkit.config import MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch import Dispatcher, Dispatchers
from mixtralkit.moe.dispatch.exact import ExactHandle
from mixtralkit.moe.dispatch.schedule import num_chunks, run_in_chunks
from mixtralkit.moe.router import Router, Routing
from mixtralkit.moe.shadow import ShadowReport, Shadows
from mixtralkit.moe.store import ExpertStore
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.capacity import CapacityRule
from mixtralkit.ops.hidden import Hidden, Norm, join

if TYPE_CHECKING:
    from mixtralkit.moe.two_phase import Flight

CHUNKED = ("exact", "two_stage")  # dispatchers whose exchange the smart schedule overlaps with the experts


@dataclass(frozen=True)
class StepRows:
    """What is known of a step's rows before they are routed.

    Attributes:
        per_rank: the most rows that any rank gives, where all ranks know that; lets exchanges keep static shapes.
        decode: one row a sequence.
        valid_T: int64, negative for a row that only fills the shape: it goes to no expert and counts for no capacity;
            None where there is no such row.
        flight: what the layer before has learnt and begun for this one (``moe/two_phase.py``).
    """

    per_rank: int | None = None
    decode: bool = False
    valid_T: torch.Tensor | None = None
    flight: Flight | None = None

    def take(self, rows_N: torch.Tensor) -> StepRows:
        """Of some of the rows."""
        return self if self.valid_T is None else replace(self, valid_T=self.valid_T[rows_N])


@dataclass(frozen=True)
class MoEReport:
    """What one forward of a layer did; tensors stay on the device.

    Attributes:
        routing: the router's choice, before any capacity.
        dropped, rerouted: int64 scalars, choices over a cold expert's capacity.
        handles: one for each chunk or piece: an ``exact.ExactHandle`` without its rows for exact exchanges, else None.
        shadows: experts that are on every rank by a copy, None in a layer without shadows.
    """

    routing: Routing
    dropped: torch.Tensor
    rerouted: torch.Tensor
    handles: tuple[ExactHandle | None, ...] = ()
    shadows: ShadowReport | None = None


class MoELayer(nn.Module):
    """Σ_k weight · expert(x) for every row, the experts wherever the plan has put them.

    Parameters are named as Mistral's ``feed_forward``: ``gate.weight`` [E, D] on every rank, ``w13`` and ``w2`` of
    this rank's slots, which the store owns.
    """

    def __init__(
        self,
        layer: int,
        context: RankContext,
        store: ExpertStore,
        dispatchers: Dispatchers,
        options: MoEOptions,
        shadows: Shadows | None = None,
    ) -> None:
        """``store``, ``dispatchers`` and ``shadows`` are those of all layers; None shadows nothing."""
        super().__init__()
        config = store.layout.config
        self.layer, self.context, self.store, self.dispatchers = layer, context, store, dispatchers
        self.options, self.shadows = options, shadows
        self.gate = Router(config.dim, config.num_experts, config.num_experts_per_tok, store.dtype, context.device)
        self.experts, self.table = store.experts[layer], store.tables[layer]
        self.nothing = torch.zeros((), dtype=torch.int64, device=context.device)  # is dropped

    @classmethod
    def alone(
        cls,
        layout: RankLayout,
        context: RankContext,
        dtype: torch.dtype,
        options: MoEOptions | None = None,
        layer: int = 0,
        **tools: Any,
    ) -> MoELayer:
        """One layer of the layout without a model around it; ``tools`` are those of ``Dispatchers.create``."""
        options = MoEOptions() if options is None else options
        store = ExpertStore(layout, context, dtype, layers=[layer])
        return cls(layer, context, store, Dispatchers.create(layout, context, options, **tools), options)

    def forward(
        self, hidden: Hidden, rows: StepRows | None = None, following: Norm | None = None
    ) -> tuple[Hidden, MoEReport]:
        """Rows [T, D] (T may be 0) and what happened to them. Collective over the ranks.

        Args:
            hidden: the residual stream with the norm in front of the router, or rows by themselves.
            following: the norm that comes next, which some dispatchers make as they add the sums to the stream.
        """
        rows = StepRows() if rows is None else rows
        routing, hidden = self.gate(hidden)
        phases = None if rows.flight is None else rows.flight.at(self.layer, routing.experts_TK)
        trains = self.experts.trains
        experts, table, report = self.experts, self.table, None
        if self.shadows is not None and trains:
            self.shadows.forget()  # the weights are about to change
            x_TD, lent = self.shadows.lend(self.layer, hidden.normed_TD, routing.experts_TK)
            hidden, experts, table, report = replace(hidden, normed_TD=x_TD), lent, lent.table, lent.report
        elif self.shadows is not None:
            report = self.shadows.report(self.layer, phases)
        cut = CutRouting.of(routing, table.local_E, self._rule, rows.valid_T, self.nothing)
        if self.store.tiers is not None:
            self.store.tiers.guess(self.layer, hidden)
        # no expert is brought or multiplied for rows that only fill; of a decode's few nobody would notice
        if self.store.tiers is not None or (rows.valid_T is not None and not rows.decode):
            cut = replace(cut, experts_TK=cut.kept_TK, is_cut=True)
        name = self.dispatchers.name(rows.per_rank is not None, rows.decode, torch.is_grad_enabled())
        dispatcher = self.dispatchers.by_name[name]
        if self.options.faster.schedule and name in CHUNKED:
            chunks = num_chunks(self.context.world_size, self.options.faster.group_size)
            hidden, handles = run_in_chunks(dispatcher, experts, hidden, cut, table, chunks, following)
        else:
            hidden, handles = self._run(name, dispatcher, experts, hidden, cut, table, rows.per_rank, following)
        if rows.flight is not None:
            rows.flight.ahead(self.layer)
        # a step keeps its layers' reports: with the rows in them each layer's would stay until the step ends
        kept = tuple(replace(handle, x_TD=None) if isinstance(handle, ExactHandle) else None for handle in handles)
        return hidden, MoEReport(routing, cut.dropped, cut.rerouted, kept, report)

    def _run(
        self, name: str, dispatcher: Dispatcher, experts, hidden: Hidden, cut: CutRouting, table: LayerTable,
        per_rank: int | None, following: Norm | None,
    ) -> tuple[Hidden, list[Any]]:  # fmt: skip
        """In one piece, or in as many as the memory between GPUs needs, the same number on every rank."""
        most = self.dispatchers.most_rows if name == "symmetric" else 0
        if not most or per_rank <= most:
            routed, handle = dispatcher.dispatch(hidden, cut, table, per_rank)
            return dispatcher.combine(experts(routed), handle, following), [handle]
        found, handles = [], []
        for start in range(0, per_rank, most):
            piece = slice(start, start + most)
            part, rows = cut.take(piece), min(most, per_rank - start)
            routed, handle = dispatcher.dispatch(hidden.take(piece), part, table, rows)
            found.append(dispatcher.combine(experts(routed), handle, following))
            handles.append(handle)
        return join(found), handles

    @property
    def _rule(self) -> CapacityRule | None:
        """The plan's, where experts are whole: with 'tp' every rank has a part of each, and none is cold."""
        layout = self.store.layout
        return CapacityRule.of(layout.plan) if layout.parallel.experts == "ep" else None
