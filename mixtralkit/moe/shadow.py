"""Shadows: copies of hot experts on every rank, so that their rows need not travel (FasterMoE, §4.1).

::

    counts of a step, all ranks' ─► choose_shadows ─► missing: copied from the owner ─► the store's table names it
                                    (between steps)   resident: stays, or makes room for one with more gain

A step never waits for it: what one step counted decides what the next one finds. Every rank decides alike from the same
counts, so none has to be told. In training weights change every step: there copies are lent for one forward and their
gradients return (``lend``). See docs/shadowing.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.experts import Experts, run_experts
from mixtralkit.moe.store import Carry, ExpertStore
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.counting import count_keys
from mixtralkit.planning.cost import ShadowModel, choose_shadows
from mixtralkit.planning.replicas import is_small

if TYPE_CHECKING:
    from mixtralkit.moe.two_phase import PhaseReport

RESIDENT_STEPS = 64  # over which a copy that stays pays for its broadcast


@dataclass(frozen=True)
class ShadowReport:
    """What one forward of a layer found of shadows; the same on every rank.

    Attributes:
        experts: those on every rank thanks to a copy, by rising id.
        broadcast: those among them whose weights moved since the layer's last forward.
        bytes_broadcast: size of those weights; each rank but an expert's owner received them once.
        phases: how the estimate fared, None where there was none.
    """

    experts: tuple[int, ...] = ()
    broadcast: tuple[int, ...] = ()
    bytes_broadcast: int = 0
    phases: PhaseReport | None = None


def shadow_room(layout: RankLayout, context: RankContext, dtype: torch.dtype, options: MoEOptions) -> int:
    """For how many copies the options' budget of memory has places, over all layers; 0 where nothing is ever copied.

    Only rows that travel have a use for copies: on one rank, and with attention or experts split over the ranks, every
    rank has all rows or a part of all experts anyway.
    """
    travels = context.world_size > 1 and layout.parallel == ParallelConfig("dp", "ep")
    if not (options.copies_experts and travels):
        return 0
    layout.check_one_format("copying experts (faster_shadow, dynamic)")
    config = layout.config
    expert_bytes = layout.weights.expert_bytes(config.dim, config.hidden_dim, dtype.itemsize)
    room = min(int(options.shadow_memory_gb * 1e9) // expert_bytes, config.n_layers * config.num_experts)
    if room < 1:
        least = expert_bytes / 1e9
        raise ValueError(f"shadow_memory_gb ({options.shadow_memory_gb}) must hold an expert: {least:.4g} or more")
    return room


class Shadows:
    """Which experts are copied: by the gain that FasterMoE's model predicts, under the store's room.

    When there is no room, the copy with the least gain makes way for one with more. The gain of a run is the seconds
    that the expert's rows would take beyond those of the layer's mean expert; of several runs, each counts half as much
    as the one after it. A copy that was hinted and has not run yet has the most.
    """

    def __init__(self, store: ExpertStore, options: FasterOptions, one_holder: bool = False) -> None:
        """``one_holder``: small batches compute an expert at one of its holders, so that copies are no use to them."""
        config = store.layout.config
        self.store, self.context, self.one_holder = store, store.context, one_holder
        figures = {
            "d_model": config.dim if options.d_model is None else options.d_model,
            "alpha": config.hidden_dim / config.dim if options.alpha is None else options.alpha,
            "net_bandwidth": options.net_bandwidth,
            "gpu_throughput": options.gpu_throughput,
            "matrices": 3,
            "data_bytes": store.dtype.itemsize,
            "weight_bytes": store.expert_bytes / (3 * config.dim * config.hidden_dim),
        }
        self.inference, self.training = ShadowModel.for_inference(**figures), ShadowModel.for_training(**figures)
        self.resident = replace(self.inference, broadcast_bandwidth=RESIDENT_STEPS * self.inference.net_bandwidth)
        self._gains: dict[tuple[int, int], float | None] = {}
        self._moved: dict[int, list[int]] = {}

    def everywhere(self, layer: int) -> frozenset[int]:
        """Experts that the plan has on every rank."""
        return frozenset(np.flatnonzero((self.store.slots_WE(layer) >= 0).all(0)).tolist())

    def replicas_E(self, layer: int) -> np.ndarray:
        """How many ranks hold each expert by the plan."""
        return (self.store.slots_WE(layer) >= 0).sum(0)

    def between_steps(self, counts_LE: np.ndarray) -> None:
        """Takes a step's counts, of all ranks and by layer of the store, and brings what they ask for. Collective."""
        for layer, counts_E in zip(self.store.layers, counts_LE, strict=True):
            loads_E = counts_E / self.replicas_E(layer)
            self.refresh(layer, loads_E)
            is_of_use = not (self.one_holder and is_small(int(counts_E.sum()), 1, len(counts_E)))
            if is_of_use and self.bring(layer, loads_E, model=self.resident):
                self.store.publish(layer)

    def refresh(self, layer: int, loads_E: np.ndarray) -> None:
        """Takes a run's real loads into the gains of the layer's copies."""
        gain_E = self._gains_of(loads_E)
        for expert in self.store.copied(layer):
            before = self._gains.get((layer, expert))
            self._gains[layer, expert] = gain_E[expert] if before is None else (before + gain_E[expert]) / 2

    def bring(
        self, layer: int, loads_E: np.ndarray, hidden_s: float = 0.0, carry: Carry | None = None,
        in_use: int | None = None, model: ShadowModel | None = None,
    ) -> list[int]:  # fmt: skip
        """Chooses by these loads, for each replica of an expert, and copies what is missing; the experts that move.

        Collective. The caller publishes them.

        Args:
            hidden_s: as in ``choose_shadows``.
            carry: as in ``ExpertStore.fetch``.
            in_use: a layer whose copies stay.
            model: decides; None is that of a copy for one step.
        """
        here = self.everywhere(layer) | self.store.copied(layer)
        chosen = choose_shadows(loads_E.tolist(), model or self.inference, here, self.store.room, hidden_s)
        gain_E = self._gains_of(loads_E)
        return [e for e in chosen if e not in here and self._fetch(layer, e, gain_E[e], carry, in_use)]

    def hint(self, layer: int, experts: Sequence[int]) -> tuple[int, ...]:
        """Copies experts that a plan or an estimate expects to be hot, the likeliest first. Collective.

        They push out what has the least gain, but nothing that was hinted and has not run yet. Those that every rank
        holds are skipped. Returns the layer's copies, as many as there was room for.
        """
        for expert in experts:
            if not 0 <= expert < self.store.layout.config.num_experts:
                raise ValueError(f"hint: expert {expert} of layer {layer} does not exist")
        missing = [e for e in experts if e not in self.everywhere(layer) | self.store.copied(layer)]
        for expert in missing:
            if not self._fetch(layer, expert, None, None, None):
                break
        self.store.publish(layer)
        return tuple(e for e in experts if e in self.store.copied(layer))

    def report(self, layer: int, phases: PhaseReport | None = None) -> ShadowReport:
        """Of a forward of the layer; what has moved is told once."""
        moved = [e for e in self._moved.pop(layer, []) if e in self.store.copied(layer)]
        size = len(moved) * self.store.expert_bytes
        return ShadowReport(tuple(sorted(self.store.copied(layer))), tuple(moved), size, phases)

    def forget(self) -> None:
        """Drops every copy; for who changes weights."""
        self.store.drop(list(self.store.copies))
        self._gains.clear()

    def _fetch(self, layer: int, expert: int, gain: float | None, carry: Carry | None, in_use: int | None) -> bool:
        """Whether there was room: a free place, or a copy with less gain (None is the most)."""
        store = self.store
        if len(store.copies) == store.room:
            gains = {key: self._gains[key] for key in store.copies if self._gains[key] is not None and key[0] != in_use}
            victim = min(gains, key=lambda key: (gains[key], key), default=None)
            if victim is None or (gain is not None and gains[victim] >= gain):
                return False
            store.drop([victim])
        store.fetch(layer, expert, carry)
        self._gains[layer, expert] = gain
        self._moved.setdefault(layer, []).append(expert)
        return True

    def _gains_of(self, loads_E: np.ndarray) -> list[float]:
        # Over the mean expert, not over the next one: so the order of gains is that of loads, whatever is copied now.
        return (self.inference.s_per_row * (loads_E - loads_E.mean()).clip(min=0.0)).tolist()

    def lend(self, layer: int, x_TD: torch.Tensor, experts_TK: torch.Tensor) -> tuple[torch.Tensor, Lent]:
        """For a forward of training: the rows, tied to the loan, and the layer with its shadows. Collective.

        Weights change every step, so a shadow lasts for one; its gradients are added to its owner's.
        """
        counts_E = self.context.all_reduce(count_keys(experts_TK, self.store.layout.config.num_experts))
        loads_E = counts_E.cpu().numpy() / self.replicas_E(layer)  # host sync: who is hot
        everywhere, experts = self.everywhere(layer), self.store.experts[layer]
        chosen = choose_shadows(loads_E.tolist(), self.training, everywhere, self.store.room)
        chosen = tuple(e for e in chosen if e not in everywhere)
        copies = None
        if chosen:
            owners = [self.store.owner(layer, e) for e in chosen]
            x_TD, *copies = _Lend.apply(x_TD, experts.w13, experts.w2, owners, self.context)
        numbers = {expert: number for number, expert in enumerate(chosen)}
        table = LayerTable(self.store.replicas(layer, numbers), self.context)
        report = ShadowReport(tuple(sorted(chosen)), chosen, len(chosen) * self.store.expert_bytes)
        return x_TD, Lent(experts, copies, table, report)


@dataclass(frozen=True)
class Lent:
    """A layer with copies in the slots after its own. The two are computed by a call each and added, since one call
    would need their weights in one tensor, and with it a copy of either in every step.

    Attributes:
        copies: w13 and w2 of the lent experts; None without any.
    """

    own: Experts
    copies: list[torch.Tensor] | None
    table: LayerTable
    report: ShadowReport

    def __call__(self, rows: RoutedRows) -> torch.Tensor:
        if self.copies is None:
            return self.own(rows)
        slots = self.own.slots
        is_copy_RK = rows.slots_RK >= slots
        own = RoutedRows(rows.x_RD, rows.slots_RK.masked_fill(is_copy_RK, -1), rows.weights_RK, rows.residual_RD)
        copies = RoutedRows(rows.x_RD, (rows.slots_RK - slots).masked_fill(~is_copy_RK, -1), rows.weights_RK)
        return self.own(own) + run_experts(copies, *self.copies)


class _Lend(torch.autograd.Function):
    """Copies (owner, slot) experts to every rank; their gradients go back, summed.

    The rows pass through unchanged. They tie the ranks together: every rank's output depends on its rows, so every
    rank comes to ``backward``, whether or not it used a copy, and only when the layer's exchanges are behind it.
    """

    @staticmethod
    def forward(ctx, x_TD, w13_SGD, w2_SDF, owners, context):
        ctx.owners, ctx.context, ctx.shapes = owners, context, (w13_SGD.shape, w2_SDF.shape)
        lent = [weights.new_empty(len(owners), *weights.shape[1:]) for weights in (w13_SGD, w2_SDF)]
        for copies, weights in zip(lent, (w13_SGD, w2_SDF), strict=True):
            for copy, (owner, slot) in zip(copies, owners, strict=True):
                if owner == context.rank:
                    copy.copy_(weights[slot])
                dist.broadcast(copy, group_src=owner, group=context.group)
        return x_TD.view_as(x_TD), *lent

    @staticmethod
    def backward(ctx, grad_TD, *lent_grads):
        own_grads = []
        for shape, grads in zip(ctx.shapes, lent_grads, strict=True):
            own_grads.append(grads.new_zeros(shape))
            for grad, (owner, slot) in zip(grads.contiguous().clone(), ctx.owners, strict=True):
                dist.reduce(grad, group_dst=owner, group=ctx.context.group)
                if owner == ctx.context.rank:
                    own_grads[-1][slot] = grad
        return grad_TD, *own_grads, None, None
