"""Shadows: copies of hot experts on every rank, so that their rows are computed at home (FasterMoE, §4.1).

::

    counts ─ all-gather ─► choose_shadows ─► miss: broadcast from the owner ─┐
                                         └─► hit ────────────────────────────┴─► assigner with the copies as slots

What follows from the gathered counts is decided on every rank alike, so no rank has to be told. See
docs/shadowing.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.assignment import Assigner
from mixtralkit.moe.experts import Experts, RoutedRows, weighted_expert_sum
from mixtralkit.ops.counting import count_keys
from mixtralkit.planning.cost import ShadowModel, choose_shadows

if TYPE_CHECKING:
    from mixtralkit.moe.two_phase import PhaseReport

Send = Callable[[torch.Tensor, int], None]  # a tensor of the given rank to all, into the same tensor there


@dataclass(frozen=True)
class ShadowReport:
    """What one forward of a layer did with shadows; the same on every rank.

    Attributes:
        experts: those computed at home thanks to a copy, by rising id.
        broadcast: those among them whose weights moved for it.
        bytes_broadcast: size of those weights; each rank but an expert's owner received them once.
        phases: how the estimate fared, None where there was none.
    """

    experts: tuple[int, ...] = ()
    broadcast: tuple[int, ...] = ()
    bytes_broadcast: int = 0
    phases: PhaseReport | None = None


@dataclass(frozen=True)
class Home:
    """What a layer's rows find on this rank in this step.

    Attributes:
        x_TD: the rows.
        assigner: where each expert is, copies included.
        experts: weighted sums of this rank's rows over its own experts and copies.
        report: None where the layer has no shadows.
    """

    x_TD: torch.Tensor
    assigner: Assigner
    experts: Callable[[RoutedRows], torch.Tensor]
    report: ShadowReport | None = None


@dataclass(frozen=True)
class ShadowedExperts:
    """Own experts in the first slots, copies in those after them.

    The two are computed by a call each and added: one call would need their weights in one tensor, and with it a
    copy of either in every step.
    """

    own: Experts
    w13_PGD: torch.Tensor
    w2_PDF: torch.Tensor

    def __call__(self, rows: RoutedRows) -> torch.Tensor:
        is_copy_RK = rows.slots_RK >= self.own.w13.shape[0]
        own_RK = rows.slots_RK.masked_fill(is_copy_RK, -1)
        places_RK = (rows.slots_RK - self.own.w13.shape[0]).masked_fill(~is_copy_RK, -1)
        y_RD = self.own(RoutedRows(rows.x_RD, own_RK, rows.weights_RK))
        copies = RoutedRows(rows.x_RD, places_RK, rows.weights_RK)
        return y_RD + weighted_expert_sum(copies, self.w13_PGD, self.w2_PDF)


@dataclass(frozen=True)
class _Source:
    """Where a layer's experts come from: this rank's weights, and everyone's slots."""

    experts: Experts
    slots_WE: np.ndarray

    def owner(self, expert: int) -> tuple[int, int]:
        """First rank that holds the expert, and its slot there."""
        rank = int((self.slots_WE[:, expert] >= 0).argmax())
        return rank, int(self.slots_WE[rank, expert])

    @property
    def version(self) -> int:
        """A number that grows whenever this rank's weights are written to."""
        return self.experts.w13._version + self.experts.w2._version


@dataclass
class _Copy:
    """A resident copy: its place in the pool, its owner's version, and the mean gain (None before its first run)."""

    place: int
    version: int
    gain: float | None


class ShadowCache:
    """Resident copies of experts, shared by all layers of a model under one memory budget.

    Every rank keeps the same copies in the same places. When there is no room, the copy with the least predicted gain
    makes room for one with more. The gain of a run is the seconds that the expert's rows would take beyond those of
    the layer's mean expert; of several runs, each counts half as much as the one after it.

    Attributes:
        places: how many copies the budget holds.
        changes: grows with every copy that comes or goes; a captured CUDA graph holds for one value of it.
    """

    def __init__(
        self, context: RankContext, dim: int, hidden: int, dtype: torch.dtype, memory_gb: float, most: int
    ) -> None:
        """``memory_gb`` (10⁹ bytes) is the budget of this rank; ``most`` the number of experts in all layers."""
        self.context, self.dim, self.hidden, self.dtype = context, dim, hidden, dtype
        self.bytes_each = 3 * dim * hidden * dtype.itemsize
        self.places = min(int(memory_gb * 1e9) // self.bytes_each, most)
        if self.places < 1:
            raise ValueError(f"shadow_memory_gb ({memory_gb}) must hold an expert: {self.bytes_each / 1e9:.4g} or more")
        self.changes = 0
        self._sources: dict[int, _Source] = {}
        self._copies: dict[tuple[int, int], _Copy] = {}

    @classmethod
    def for_model(
        cls, layout: RankLayout, context: RankContext, dtype: torch.dtype, options: MoEOptions
    ) -> ShadowCache | None:
        """The cache that a model's layers share; None where nothing is ever shadowed.

        Only rows that travel have a use for it: on one rank, and with attention or experts split over the ranks,
        every rank has all rows or a part of all experts anyway.
        """
        travels = context.world_size > 1 and layout.parallel == ParallelConfig("dp", "ep")
        if not (options.copies_experts and travels):
            return None
        config = layout.config
        most = config.n_layers * config.num_experts
        return cls(context, config.dim, config.hidden_dim, dtype, options.shadow_memory_gb, most)

    @cached_property
    def pool(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 [places, 2F, D] and w2 [places, D, F] of the copies; allocated when first asked for."""
        like = {"dtype": self.dtype, "device": self.context.device}
        shape = (self.places, self.dim, self.hidden)
        return torch.empty(self.places, 2 * self.hidden, self.dim, **like), torch.empty(shape, **like)

    def add_layer(self, layer: int, experts: Experts, slots_WE: np.ndarray) -> None:
        """Makes a layer's weights known; said again after its plan has changed, it forgets the layer's copies."""
        self._forget([key for key in self._copies if key[0] == layer])
        self._sources[layer] = _Source(experts, slots_WE)

    def places_of(self, layer: int) -> dict[int, int]:
        """Expert → place in the pool, for the layer's copies."""
        return {expert: copy.place for (of, expert), copy in self._copies.items() if of == layer}

    @torch.no_grad()
    def hint(self, layer: int, experts: Sequence[int]) -> tuple[int, ...]:
        """Copies experts that a plan or an estimate expects to be hot, before the step. Collective.

        The likeliest first. They push out what has the least gain, but nothing that was hinted and has not run yet.
        Those that every rank holds are skipped.

        Returns:
            The layer's copies, as many as there was room for.
        """
        for expert in experts:
            if not 0 <= expert < self._sources[layer].slots_WE.shape[1]:
                raise ValueError(f"hint: expert {expert} of layer {layer} does not exist")
        versions_W = self.context.all_gather(self.version(layer)).tolist()  # host sync
        wanted = [e for e in experts if (self._sources[layer].slots_WE[:, e] < 0).any()]
        for expert in wanted:
            if (layer, expert) not in self._copies and not self.fetch(layer, expert, None, versions_W):
                break
        return tuple(self.places_of(layer))

    def clear(self) -> None:
        """Forgets every copy; for who changes weights and then runs static exchanges, which ask no other rank."""
        self._forget(list(self._copies))

    def version(self, layer: int) -> torch.Tensor:
        """int64 scalar on the device, for the message to the other ranks: this rank's ``_Source.version``."""
        return torch.tensor(self._sources[layer].version, device=self.context.device)

    def drop_changed(self, layer: int, versions_W: Sequence[int]) -> None:
        """Forgets the layer's copies of weights that their owner has written to since."""
        source = self._sources[layer]
        keys = [(layer, expert) for expert in self.places_of(layer)]
        self._forget([key for key in keys if self._copies[key].version != versions_W[source.owner(key[1])[0]]])

    def refresh(self, layer: int, gain_E: Sequence[float]) -> None:
        """Takes a run's gains into the means of the layer's copies."""
        for (of, expert), copy in self._copies.items():
            if of == layer:
                copy.gain = gain_E[expert] if copy.gain is None else (copy.gain + gain_E[expert]) / 2

    @torch.no_grad()
    def fetch(
        self,
        layer: int,
        expert: int,
        gain: float | None,
        versions_W: Sequence[int],
        send: Send | None = None,
        in_use: int | None = None,
    ) -> bool:
        """Copies an expert, unless all room is taken by copies with as much gain (None has the most). Collective.

        Args:
            send: moves the weights; None does it before this returns.
            in_use: a layer whose copies stay.
        """
        place = self._make_room(gain, in_use)
        if place is None:
            return False
        source = self._sources[layer]
        owner, slot = source.owner(expert)
        own = (source.experts.w13, source.experts.w2)
        for copies, weights in zip(self.pool, own, strict=True):
            target = weights[slot] if owner == self.context.rank else copies[place]
            (send or self._send_now)(target, owner)
        self._copies[layer, expert] = _Copy(place, versions_W[owner], gain)
        self.changes += 1
        return True

    def _send_now(self, weights: torch.Tensor, owner: int) -> None:
        dist.broadcast(weights, group_src=owner, group=self.context.group)

    def _make_room(self, gain: float | None, in_use: int | None) -> int | None:
        taken = {copy.place for copy in self._copies.values()}
        if len(taken) < self.places:
            return next(place for place in range(self.places) if place not in taken)
        gains = {key: copy.gain for key, copy in self._copies.items() if copy.gain is not None and key[0] != in_use}
        victim = min(gains, key=lambda key: (gains[key], key), default=None)
        if victim is None or (gain is not None and gains[victim] >= gain):
            return None
        place = self._copies[victim].place
        self._forget([victim])
        return place

    def _forget(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            del self._copies[key]
        self.changes += len(keys)


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


class LayerShadows:
    """One layer's part: which experts to shadow in a step, and what the rows find at home then."""

    def __init__(
        self, layer: int, experts: Experts, slots_WE: np.ndarray, cache: ShadowCache, options: FasterOptions
    ) -> None:
        self.layer, self.experts, self.cache = layer, experts, cache
        self.slots_WE, self.context = slots_WE, cache.context
        self.copies_E = (slots_WE >= 0).sum(0)
        self.everywhere = frozenset(np.flatnonzero((slots_WE >= 0).all(0)).tolist())
        figures = {
            "d_model": cache.dim if options.d_model is None else options.d_model,
            "alpha": cache.hidden / cache.dim if options.alpha is None else options.alpha,
            "net_bandwidth": options.net_bandwidth,
            "gpu_throughput": options.gpu_throughput,
            "matrices": 3,
            "data_bytes": cache.dtype.itemsize,
        }
        self.inference, self.training = ShadowModel.for_inference(**figures), ShadowModel.for_training(**figures)
        self._overlay: tuple[dict[int, int], Assigner] | None = None
        cache.add_layer(layer, experts, slots_WE)

    def for_step(self, x_TD: torch.Tensor, experts_TK: torch.Tensor, may_wait: bool) -> Home:
        """What is at home for these rows. Collective where ``may_wait``.

        Args:
            experts_TK: int64 choices of this rank's rows, before any capacity.
            may_wait: choose by the counts of all ranks, which copies them to the host; otherwise resident copies
                serve as they are and no others come.
        """
        trains = torch.is_grad_enabled() and self.experts.w13.requires_grad
        if not may_wait:
            return self.home(x_TD, use_copies=not trains)
        counts_E = count_keys(experts_TK, len(self.copies_E))
        message = torch.cat([counts_E, self.cache.version(self.layer)[None]])
        gathered = self.context.all_gather(message).cpu().numpy()  # host sync: who is hot
        loads_E = gathered[:, :-1].sum(0) / self.copies_E
        if trains:
            return self._train(x_TD, loads_E)
        versions_W = gathered[:, -1].tolist()
        self.refresh(loads_E, versions_W)
        return self.home(x_TD, self.bring(loads_E, versions_W))

    def refresh(self, loads_E: np.ndarray, versions_W: Sequence[int]) -> None:
        """Takes a run's real loads into the gains of the copies, and drops those of weights that have changed."""
        self.cache.drop_changed(self.layer, versions_W)
        self.cache.refresh(self.layer, self._gains(loads_E))

    def bring(
        self,
        loads_E: np.ndarray,
        versions_W: Sequence[int],
        hidden_s: float = 0.0,
        send: Send | None = None,
        in_use: int | None = None,
    ) -> list[int]:
        """Chooses by these loads, for each replica of an expert, and copies what is missing; the experts that move.

        Collective. ``hidden_s`` is as in ``choose_shadows``, ``send`` and ``in_use`` as in ``ShadowCache.fetch``.
        """
        self.cache.drop_changed(self.layer, versions_W)
        at_home = self.everywhere | self.cache.places_of(self.layer).keys()
        chosen = choose_shadows(loads_E.tolist(), self.inference, at_home, self.cache.places, hidden_s)
        gain_E = self._gains(loads_E)
        missing = [e for e in chosen if e not in at_home]
        return [e for e in missing if self.cache.fetch(self.layer, e, gain_E[e], versions_W, send, in_use)]

    def home(
        self, x_TD: torch.Tensor, moved: Sequence[int] = (), phases: PhaseReport | None = None, use_copies: bool = True
    ) -> Home:
        """These rows, and the layer's copies; ``moved`` and ``phases`` are for the report."""
        places = self.cache.places_of(self.layer) if use_copies else {}
        experts = ShadowedExperts(self.experts, *self.cache.pool) if places else self.experts
        return Home(x_TD, self._assigner(places), experts, self._report(places, moved, phases))

    def _gains(self, loads_E: np.ndarray) -> list[float]:
        # Over the mean expert, not over the next one: so the order of gains is that of loads, whatever is at home now.
        return (self.inference.s_per_row * (loads_E - loads_E.mean()).clip(min=0.0)).tolist()

    def _train(self, x_TD: torch.Tensor, loads_E: np.ndarray) -> Home:
        """Weights change every step, so a shadow lasts for one; its gradients are added to its owner's."""
        chosen = choose_shadows(loads_E.tolist(), self.training, self.everywhere, self.cache.places)
        chosen = tuple(e for e in chosen if e not in self.everywhere)
        places = {expert: place for place, expert in enumerate(chosen)}
        experts = self.experts
        if chosen:
            source = _Source(self.experts, self.slots_WE)
            owners = [source.owner(e) for e in chosen]
            x_TD, *lent = _Lend.apply(x_TD, experts.w13, experts.w2, owners, self.context)
            experts = ShadowedExperts(self.experts, *lent)
        return Home(x_TD, self._assigner(places), experts, self._report(places, chosen))

    def _assigner(self, places: dict[int, int]) -> Assigner:
        """Copies numbered after each rank's own slots; a rank that holds an expert itself keeps to its own."""
        if self._overlay is None or self._overlay[0] != places:
            slots_WE = self.slots_WE.copy()
            own_W = (slots_WE >= 0).sum(1)
            for expert, place in places.items():
                lacks_W = slots_WE[:, expert] < 0
                slots_WE[lacks_W, expert] = own_W[lacks_W] + place
            self._overlay = places, Assigner(slots_WE, self.context, rows_are_everywhere=False)
        return self._overlay[1]

    def _report(self, places: dict[int, int], moved: Sequence[int], phases: PhaseReport | None = None) -> ShadowReport:
        return ShadowReport(tuple(sorted(places)), tuple(moved), len(moved) * self.cache.bytes_each, phases)
