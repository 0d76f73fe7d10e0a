"""The MoE layer: route, dispatch, experts, combine."""

from __future__ import annotations

import torch
from torch import nn

from mixtralkit.config import ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.dispatch import (
    Dispatch,
    ExchangeDispatch,
    GatheredDispatch,
    PlanLookup,
    ReplicatedDispatch,
    SplitWidthDispatch,
)
from mixtralkit.moe.experts import Experts
from mixtralkit.moe.gate import Routing, TopKGate


class MoELayer(nn.Module):
    """Σ_k weight · expert(x) for every row, the experts wherever the plan has put them.

    Parameters are named as Mistral's ``feed_forward``: ``gate.weight`` [E, D] on every rank, ``w13`` and ``w2`` of
    this rank's slots.
    """

    def __init__(self, layer: int, layout: RankLayout, context: RankContext, dtype: torch.dtype) -> None:
        super().__init__()
        config = layout.config
        self.gate = TopKGate(config.dim, config.num_experts, config.num_experts_per_tok, dtype, context.device)
        hidden = layout.hidden[1] - layout.hidden[0]
        self.experts = Experts(len(layout.experts(layer)), config.dim, hidden, dtype, context.device)
        self.way = build_dispatch(layer, layout, context)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Rows [T, D] (T may be 0) to rows of the same order, and how they were routed. Collective over the ranks."""
        routing = self.gate(x_TD)
        rows, handle = self.way.dispatch(x_TD, routing)
        y_RD = self.experts(rows)
        return self.way.combine(y_RD, handle), routing


def build_dispatch(layer: int, layout: RankLayout, context: RankContext) -> Dispatch:
    """The way rows travel under the layout's attention and experts (DESIGN §2)."""
    lookup = PlanLookup(layout.plan, layer, context.device)
    match layout.parallel:
        case ParallelConfig("tp", "tp"):
            return SplitWidthDispatch(context)
        case ParallelConfig("dp", "tp"):
            return GatheredDispatch(context)
        case ParallelConfig("tp", "ep"):
            return ReplicatedDispatch(context, lookup)
        case _:
            return ExchangeDispatch(context, lookup)
