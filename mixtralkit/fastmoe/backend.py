"""Mixtral's experts through the real FastMoE library (package ``fmoe``), where it is installed.

The gate, the experts' weights and their products are ours; counting, scattering and gathering rows over the ranks
are the library's public functions.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import nn

from mixtralkit.config import MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.layer import MoEReport, StepRows
from mixtralkit.moe.router import Router
from mixtralkit.moe.store import ExpertStore
from mixtralkit.ops.experts import swiglu_grouped
from mixtralkit.ops.hidden import Hidden, Norm, add
from mixtralkit.planning.plan import contiguous

DEVICE_TYPES = ("cuda",)  # the library's kernels exist for these


class FastMoELayer(nn.Module):
    """``MoELayer`` in name, parameters and results; rows travel by ``fmoe.functions``.

    The library knows one plan, ``contiguous`` with equal ranks, without a capacity, each rank with its own rows.
    """

    def __init__(self, layer: int, context: RankContext, store: ExpertStore, options: MoEOptions) -> None:
        super().__init__()
        _check_supported(store.layout, options)
        self.functions = load_functions(context.device)
        config = store.layout.config
        self.context, self.slots = context, len(store.layout.experts(layer))
        self.gate = Router(config.dim, config.num_experts, config.num_experts_per_tok, store.dtype, context.device)
        self.experts = store.experts[layer]

    def forward(
        self, hidden: Hidden, rows: StepRows | None = None, following: Norm | None = None
    ) -> tuple[Hidden, MoEReport]:
        """As ``MoELayer.forward``; the library's exchange has exact splits, whatever ``rows`` says."""
        routing, hidden = self.gate(hidden)
        x_TD, (tokens, top_k) = hidden.normed_TD, routing.experts_TK.shape
        x_ND, experts_NK = x_TD, routing.experts_TK
        if rows is not None and rows.valid_T is not None:
            experts_NK = experts_NK.masked_fill((rows.valid_T < 0)[:, None], -1)
        if tokens == 0:  # CUDA refuses to start a kernel for no rows; one row without an expert is harmless
            x_ND, experts_NK = x_TD.new_zeros(1, x_TD.shape[1]), experts_NK.new_full((1, top_k), -1)
        y_NKD = self._through_experts(x_ND, experts_NK).unflatten(0, experts_NK.shape)[:tokens]
        y_TD = (y_NKD.float() * routing.weights_TK[..., None]).sum(1).type_as(x_TD)
        none = torch.zeros((), dtype=torch.int64, device=x_TD.device)
        return add(y_TD, hidden.x_TD, following), MoEReport(routing, none, none)

    def _through_experts(self, x_ND: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
        """One row [N·K, D] for each choice, zero where it is -1."""
        functions, world = self.functions, self.context.world_size
        if world > 1:
            functions.ensure_comm(x_ND, self.context.group)
        pos, local, everyone, per_expert, received = functions.prepare_forward(experts_NK, self.slots, world)
        row_N = pos.div(experts_NK.shape[1], rounding_mode="floor")
        x_RD = functions.MOEScatter.apply(x_ND, row_N, local, everyone, received, world)
        y_RD = swiglu_grouped(x_RD, per_expert.to(x_RD.device), *self.experts.matrices)
        return functions.MOEGather.apply(y_RD, pos, local, everyone, experts_NK.numel(), world)


def load_functions(device: torch.device) -> ModuleType:
    """The module ``fmoe.functions``; ValueError where the library is missing or cannot serve ``device``."""
    try:
        functions = importlib.import_module("fmoe.functions")
    except ImportError as error:
        raise ValueError(
            f"moe_backend 'fastmoe' needs the package fmoe ({error}): build it against CUDA and NCCL "
            "from https://github.com/laekov/fastmoe, or use moe_backend 'mixtralkit'"
        ) from None
    if device.type not in DEVICE_TYPES:
        raise ValueError(f"moe_backend 'fastmoe' needs device 'cuda', not '{device.type}'")
    return functions


def _check_supported(layout: RankLayout, options: MoEOptions) -> None:
    plan, world, config = layout.plan, layout.world_size, layout.config
    needs = "with moe_backend 'fastmoe'"
    if world > 1 and (layout.parallel.attention, layout.parallel.experts) != ("dp", "ep"):
        got = f"attention ({layout.parallel.attention!r}), experts ({layout.parallel.experts!r})"
        raise ValueError(f"{got} must be 'dp' and 'ep' {needs} over several ranks")
    layout.check_one_format("moe_backend 'fastmoe'")
    if config.num_experts % world:
        raise ValueError(f"num_experts ({config.num_experts}) must be a multiple of world_size ({world}) {needs}")
    plain = contiguous(plan.num_layers, plan.num_experts, world)
    if plan.slots_LWS.tolist() != plain.slots_LWS.tolist():
        raise ValueError(f"plan ({plan.policy}) must be contiguous {needs}, without replicas")
    if plan.cold_capacity_factor is not None:
        raise ValueError(f"cold_capacity_factor ({plan.cold_capacity_factor}) must be null {needs}")
    for name in ("schedule", "shadow"):
        if getattr(options.faster, name):
            raise ValueError(f"faster_{name} must be off {needs}: it belongs to moe_backend 'mixtralkit'")
