"""The expert store: the only owner of a rank's expert weights, of its plan's slots and of copies that come and go.

::

    storage   │ layer 0's slots │ layer 1's slots │ … │ copies of other ranks' experts, of whatever layer │
    table     layer i, expert e ─► rank, slot ─► place in the storage          (moe/table.py, on the device)

Shadows, two phases and new plans all come down to weights that are written to a place and a table that names it. Both
are done in stream order, so that a step in flight reads what was there when it was launched, and a captured graph goes
on with whatever the tables say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext, SymmetricMemory
from mixtralkit.layout import RankLayout
from mixtralkit.moe.experts import Experts
from mixtralkit.moe.table import LayerTable
from mixtralkit.moe.tiers import TieredExperts, Tiers, TierSetup
from mixtralkit.moe.transfers import MoveReport, move_experts, stays_in_place, transfers
from mixtralkit.moe.weights import ExpertWeights
from mixtralkit.planning.replicas import ReplicaTable

# (weights, owner, theirs), bytes: the owner's weights into this rank's; ``theirs`` is its memory, None where nobody
# reaches it.
Carry = Callable[[torch.Tensor, int, "torch.Tensor | None"], None]


@dataclass(frozen=True)
class Copy:
    """A copy on every rank: its place in the storage, and its number among the layer's copies."""

    place: int
    number: int


class ExpertStore:
    """Expert weights of some layers on this rank. Every rank's store has the same copies in the same places.

    Attributes:
        experts, tables: by layer.
        tiers: host memory behind the GPU's (``moe/tiers``); None where all experts are on the device.
        copies: (layer, expert) → copy.
        room: how many copies there are places for.
        relocations: grows when captured graphs are void: experts have other addresses, or are looked up otherwise.
    """

    def __init__(
        self,
        layout: RankLayout,
        context: RankContext,
        dtype: torch.dtype,
        room: int = 0,
        layers: Sequence[int] | None = None,
        tiers: TierSetup | None = None,
    ) -> None:
        """``room`` is for copies; ``layers`` None means all; ``tiers`` keeps experts in host memory, None keeps none.

        Raises:
            ValueError: ``tiers`` with copies, or with too few places.
        """
        self.layout, self.context, self.dtype, self.room = layout, context, dtype, room
        self.copies: dict[tuple[int, int], Copy] = {}
        self._memories: tuple[SymmetricMemory, ...] | None = None  # of the parts, where other ranks read them
        self._first_W: dict[int, np.ndarray] = {}  # by layer, place of each rank's first slot in these
        self.relocations = 0
        self.layers = list(range(layout.config.n_layers)) if layers is None else list(layers)
        self.experts: dict[int, Experts] = {}
        self.tables: dict[int, LayerTable] = {}
        self.tiers: Tiers | None = None
        if tiers is not None:
            if room:
                raise ValueError("faster_shadow and dynamic copy experts from GPU to GPU: not with gpu_memory_gb")
            self.tiers = Tiers(layout, context, dtype, tiers, self._empty, self.layers)
            self.experts = {layer: TieredExperts(self.tiers, layer) for layer in self.layers}
            self.tables = {layer: LayerTable(self.replicas(layer), context) for layer in self.layers}
        else:
            self._allocate()

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert, or of this rank's part of its hidden width."""
        return self.layout.weights.expert_bytes(*self._columns, self.dtype.itemsize)

    @property
    def _columns(self) -> tuple[int, int]:
        """Of w13 and of w2."""
        return self.layout.config.dim, self.layout.hidden[1] - self.layout.hidden[0]

    def _empty(
        self, slots: int, device: str | None = None, weights: ExpertWeights | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Memory for the parts of w13, then of w2; None is the layout's format."""
        (dim, hidden), weights = self._columns, self.layout.weights if weights is None else weights
        shapes = [(part, weights.shape(part, hidden, dim, 2)) for part in weights.parts]
        shapes += [(part, weights.shape(part, dim, hidden)) for part in weights.parts]
        dtypes = [self.dtype if part.dtype is None else getattr(torch, part.dtype) for part, _ in shapes]
        return tuple(
            torch.empty(slots, *shape, dtype=dtype, device=device or self.context.device)
            for (_, shape), dtype in zip(shapes, dtypes, strict=True)
        )

    def _storage(self, slots_LW: np.ndarray) -> tuple[torch.Tensor, ...]:
        """One memory for all layers and copies, which other ranks read where GPUs reach each other. Collective.

        As large on every rank as the one with most slots needs: such memory has one size.
        """
        self._memories = None
        like = self._empty(int(slots_LW.sum(0).max()) + self.room, "meta")
        memories = [self.context.symmetric_memory(tuple(part.shape), part.dtype, 0) for part in like]
        if None in memories:
            return self._empty(int(slots_LW[:, self.context.rank].sum()) + self.room)
        self._memories = tuple(memories)
        firsts_LW = slots_LW.cumsum(0) - slots_LW
        self._first_W = dict(zip(self.layers, firsts_LW, strict=True))
        return tuple(memory.own for memory in memories)

    def _slots_LW(self) -> np.ndarray:
        """How many slots each rank has in each layer."""
        return np.array([(self.slots_WE(layer) >= 0).sum(1) for layer in self.layers])

    def _allocate(self) -> None:
        """Memory of every layer by itself, or one for all where copies need places that any layer can name."""
        slots_L = [len(self.layout.experts(layer)) for layer in self.layers]
        storage = self._storage(self._slots_LW()) if self.room else None
        self._held = storage
        first = 0
        for layer, slots in zip(self.layers, slots_L, strict=True):
            groups, storage_S = self.layout.groups(layer), None
            if storage is None:
                own = [part for g in groups for part in self._empty(len(g.slots), weights=g.weights)]
            else:
                own = tuple(weights[first : first + slots] for weights in storage)
                storage_S = self._own_places(slots)
                storage_S += first
            stored = None if storage is None else (storage, storage_S)
            self.experts[layer] = Experts(own, stored, groups, self._columns)
            self.tables[layer] = LayerTable(self.replicas(layer), self.context, self.room > 0)
            first += slots
        self._places = list(range(first, first + self.room))

    @property
    def _most_copies(self) -> int:
        """Of one layer."""
        return min(self.room, self.layout.config.num_experts)

    def _own_places(self, slots: int) -> torch.Tensor:
        """Places of a layer's slots from its first on; those for copies name nothing yet."""
        return torch.arange(slots + self._most_copies, device=self.context.device).clamp(max=max(slots - 1, 0))

    def slots_WE(self, layer: int) -> np.ndarray:
        """The plan's slots of a layer, -1 where a rank lacks an expert; where experts are split all have all."""
        if self.layout.parallel.experts == "tp":
            return np.tile(np.arange(self.layout.config.num_experts), (self.layout.world_size, 1))
        return self.layout.plan.slot_of_LWE[layer]

    def replicas(self, layer: int, numbers: Mapping[int, int] | None = None) -> ReplicaTable:
        """Who computes what in a layer: copies, by expert their numbers, have slots after each rank's own.

        Args:
            numbers: None for the copies that are there now.
        """
        if numbers is None:
            numbers = {expert: copy.number for (of, expert), copy in self.copies.items() if of == layer}
        slots_WE = self.slots_WE(layer).copy()
        own_W = (slots_WE >= 0).sum(1)
        for expert, number in numbers.items():
            lacks_W = slots_WE[:, expert] < 0
            slots_WE[lacks_W, expert] = own_W[lacks_W] + number
        return ReplicaTable(slots_WE, self.layout.plan.ranks_per_node, self.layout.parallel.attention == "tp")

    def owner(self, layer: int, expert: int) -> tuple[int, int]:
        """First rank that holds the expert by the plan, and its slot there."""
        slots_W = self.slots_WE(layer)[:, expert]
        rank = int((slots_W >= 0).argmax())
        return rank, int(slots_W[rank])

    def copied(self, layer: int) -> frozenset[int]:
        """Experts of the layer that are on every rank thanks to a copy."""
        return frozenset(expert for of, expert in self.copies if of == layer)

    @torch.no_grad()
    def fetch(self, layer: int, expert: int, carry: Carry | None = None) -> None:
        """Brings a copy of an expert to a free place on every rank; ``publish`` lets rows use it. Collective.

        Where GPUs reach each other's memory each rank reads the owner's, by its copy engine; else the owner broadcasts.

        Args:
            carry: moves the weights, beside what this rank computes; the caller has heard of all ranks since their
                weights last changed. None does it in stream order.
        """
        taken = {copy.place for copy in self.copies.values()}
        place = next(place for place in self._places if place not in taken)
        numbers = {copy.number for (of, _), copy in self.copies.items() if of == layer}
        owner, slot = self.owner(layer, expert)
        experts, memories = self.experts[layer], self._memories or [None] * len(self._held)
        if carry is None and self._memories is not None:
            self._memories[0].meet()
        for storage, own, memory in zip(self._held, experts.tensors, memories, strict=True):
            target = own[slot] if owner == self.context.rank else storage[place]
            theirs = None if memory is None else memory.of_rank(owner)[self._first_W[layer][owner] + slot]
            (carry or self._carry)(_bytes(target), owner, None if theirs is None else _bytes(theirs))
        number = next(n for n in range(self._most_copies) if n not in numbers)
        self.copies[layer, expert] = Copy(place, number)

    def _carry(self, weights: torch.Tensor, owner: int, theirs: torch.Tensor | None) -> None:
        if theirs is None:
            dist.broadcast(weights, group_src=owner, group=self.context.group)
        elif owner != self.context.rank:
            weights.copy_(theirs)

    def retier(self, setup: TierSetup, layout: RankLayout) -> None:
        """Goes over to other places on the GPU, and to the tiers of the layout's plan, between two steps."""
        self.layout = layout
        self.tiers.restart(setup, layout)
        self.relocations += 1

    def drop(self, keys: Iterable[tuple[int, int]]) -> None:
        """Gives up copies, (layer, expert) each; their layers' rows do without them from now on."""
        layers = set()
        for key in list(keys):
            del self.copies[key]
            layers.add(key[0])
        for layer in sorted(layers):
            self.publish(layer)

    def publish(self, layer: int) -> None:
        """Lets rows use the layer's copies as they are now."""
        experts, own = self.experts[layer], len(self.layout.experts(layer))
        self.tables[layer].update(self.replicas(layer))
        places = {copy.number: copy.place for (of, _), copy in self.copies.items() if of == layer}
        if places:
            numbers_C = torch.tensor([[own + number, place] for number, place in places.items()])
            slot_C, place_C = numbers_C.T.to(self.context.device, non_blocking=True)
            experts.storage[2][slot_C] = place_C

    def adopt(self, layer: int, layout: RankLayout) -> MoveReport:
        """Goes over to the layer's slots in another plan, between two steps. Collective.

        Experts that a rank lacks come from others; copies of the layer are dropped. Where every rank has as many slots
        as before, weights keep their addresses.

        Raises:
            ValueError: another model, ranks or ranks_per_node; experts 'tp'; weights that train.
            RankFailed: another rank had no memory for it; then nothing has changed.
        """
        self._check_fits(layout, layer)
        self.drop([key for key in self.copies if key[0] == layer])
        old_WE, new_WE = self.layout.plan.slot_of_LWE[layer], layout.plan.slot_of_LWE[layer]
        moves = transfers(old_WE, new_WE, layout.plan.ranks_per_node)
        if self._memories is not None:
            self._memories[0].meet()  # others may be reading what changes now
        in_place, experts = stays_in_place(old_WE, new_WE), self.experts[layer]
        targets = move_experts(experts.tensors, old_WE, new_WE, moves, in_place, self.context)
        self.layout = layout
        if not in_place:
            self._relocate(layer, targets)
        self.relocations += self.tables[layer].update(self.replicas(layer)) or not in_place
        return MoveReport(moves, len(moves) * self.expert_bytes, in_place)

    def _check_fits(self, layout: RankLayout, layer: int) -> None:
        old, new = self.layout.plan, layout.plan
        for one in (self.layout, layout):
            one.check_one_format("a new plan between steps")
        if layout.parallel.experts != "ep":
            raise ValueError(f"experts ({layout.parallel.experts!r}) must be 'ep' for a new plan between steps")
        if self.tiers is not None:
            raise ValueError("a new plan between steps needs all experts on the GPUs: not with gpu_memory_gb")
        if self.experts[layer].tensors[0].requires_grad:
            raise ValueError("a new plan between steps needs weights that do not train")
        ranks = [(plan.world_size, plan.ranks_per_node) for plan in (old, new)]
        if replace(layout, plan=old) != self.layout or ranks[0] != ranks[1]:
            raise ValueError("a new plan between steps must have the model, ranks and ranks_per_node of the old one")

    def _relocate(self, layer: int, targets: Sequence[torch.Tensor]) -> None:
        """New memory for the layer, or for all where they share one."""
        if not self.room:
            for weights, target in zip(self.experts[layer].tensors, targets, strict=True):
                weights.data = target
            return
        old = {of: [w.data for w in experts.tensors] for of, experts in self.experts.items()} | {layer: targets}
        self.drop(list(self.copies))
        slots = [len(old[of][0]) for of in self.layers]
        storage, first = self._storage(self._slots_LW()), 0
        self._held = storage
        for of, count in zip(self.layers, slots, strict=True):
            experts = self.experts[of]
            for weights, memory, values in zip(experts.tensors, storage, old[of], strict=True):
                weights.data = memory[first : first + count].copy_(values)
            storage_S = self._own_places(count) + first
            experts.store_in(storage, storage_S)
            first += count
        self._places = list(range(first, first + self.room))


def _bytes(weights: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes, which collectives carry of any format."""
    return weights.view(torch.uint8)
