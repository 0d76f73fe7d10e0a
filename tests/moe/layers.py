"""MoE layers on ranks, set up from one whole layer so that every arrangement can be compared with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mixtralkit.config import ModelConfig, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.dispatch import Dispatchers
from mixtralkit.moe.layer import MoELayer, MoEReport, StepRows
from mixtralkit.moe.shadow import Shadows
from mixtralkit.moe.store import ExpertStore
from mixtralkit.ops.hidden import Hidden
from mixtralkit.planning.plan import ExpertPlan

EXPERT_BYTES = 3 * 16 * 24 * 4  # of a ``Whole`` as it is by default


@dataclass(frozen=True)
class Whole:
    """A layer in one place. ``bias_E`` in the gate's last column skews the routing: inputs end with a 1."""

    dim: int = 16
    hidden: int = 24
    num_experts: int = 8
    top_k: int = 2
    seed: int = 0
    skew: dict[int, float] = field(default_factory=dict)

    def config(self, n_layers: int = 1) -> ModelConfig:
        return ModelConfig(
            dim=self.dim, n_layers=n_layers, head_dim=4, hidden_dim=self.hidden, n_heads=8, n_kv_heads=8, vocab_size=8,
            num_experts=self.num_experts, num_experts_per_tok=self.top_k,
        )  # fmt: skip

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate [E, D], w13 [E, 2F, D], w2 [E, D, F]."""
        generator = torch.Generator().manual_seed(self.seed)
        gate = torch.randn(self.num_experts, self.dim, generator=generator)
        for expert, bias in self.skew.items():
            gate[expert, -1] = bias
        w13 = torch.randn(self.num_experts, 2 * self.hidden, self.dim, generator=generator) * 0.3
        w2 = torch.randn(self.num_experts, self.dim, self.hidden, generator=generator) * 0.3
        return gate, w13, w2

    def rows(self, tokens: int, rank: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        x_TD = torch.randn(tokens, self.dim, generator=generator)
        x_TD[:, -1] = 1.0
        return x_TD


def build(
    whole: Whole,
    plan: ExpertPlan,
    context: RankContext,
    attention: str = "dp",
    experts: str = "ep",
    options: MoEOptions | None = None,
    **tools: Any,
) -> MoELayer:
    """This rank's part of the layer; ``tools`` as ``MoELayer.alone`` takes them."""
    layout = RankLayout(whole.config(), ParallelConfig(attention, experts), plan, context.rank)
    layer = MoELayer.alone(layout, context, torch.float32, options, **tools)
    fill(layer, whole)
    return layer


def stack(
    wholes: Sequence[Whole], plan: ExpertPlan, context: RankContext, options: MoEOptions, room: int = 64, **tools: Any
) -> tuple[list[MoELayer], Shadows]:
    """Layers that share a store with ``room`` for copies; the plan's first layer is that of each."""
    plan = replace(plan, slots_LWS=plan.slots_LWS[:1].repeat(len(wholes), 0))
    layout = RankLayout(wholes[0].config(len(wholes)), ParallelConfig("dp", "ep"), plan, context.rank)
    store = ExpertStore(layout, context, torch.float32, room)
    shadows, dispatchers = Shadows(store, options.faster), Dispatchers.create(layout, context, options, **tools)
    layers = [MoELayer(number, context, store, dispatchers, options, shadows) for number in range(len(wholes))]
    for layer, whole in zip(layers, wholes, strict=True):
        fill(layer, whole)
    return layers, shadows


@torch.no_grad()
def fill(layer: MoELayer, whole: Whole) -> None:
    """This rank's part of the weights."""
    gate, w13, w2 = whole.weights()
    layout = layer.store.layout
    mine, part = list(layout.experts(layer.layer)), slice(*layout.hidden)
    w1, w3 = w13[mine].chunk(2, dim=1)
    layer.gate.weight.copy_(gate)
    layer.experts.w13.copy_(torch.cat([w1[:, part], w3[:, part]], dim=1))
    layer.experts.w2.copy_(w2[mine][:, :, part])


def run_layer(layer: MoELayer, x_TD: torch.Tensor, **known: Any) -> tuple[torch.Tensor, MoEReport]:
    """Rows by themselves through the layer; ``known`` is what ``StepRows`` takes. Gradients where weights train."""
    with torch.set_grad_enabled(layer.experts.w13.requires_grad):
        hidden, report = layer(Hidden(None, x_TD), StepRows(**known))
    return hidden.rows_TD, report


def random_plan(seed: int, num_experts: int, world_size: int, **changes) -> ExpertPlan:
    """Every expert somewhere, some on several ranks, some on all; ranks with unequal numbers of experts."""
    rng = np.random.default_rng(seed)
    holds_WE = rng.random((world_size, num_experts)) < 0.25
    holds_WE[:, rng.random(num_experts) < 0.2] = True
    for expert in range(num_experts):
        holds_WE[rng.integers(world_size), expert] = True
    slots = [[rng.permutation(np.flatnonzero(holds)).tolist() for holds in holds_WE]]
    most = max(map(len, slots[0]))
    filled = [[rank + [-1] * (most - len(rank)) for rank in slots[0]]]
    return ExpertPlan(np.array(filled), num_experts, policy="random", **changes)


def sent_rows(report: MoEReport) -> list[int]:
    """Rows this rank sent to each rank, over all chunks of an exact exchange."""
    return np.sum([handle.send for handle in report.handles], axis=0).tolist()
