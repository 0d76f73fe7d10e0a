"""A rank's experts in two memories: who computes what a layer's rows ask for, and what is brought for later.

::

    slots of the rows ─► host ─► ask: here │ on its way │ fetched │ on the CPU
    GPU   experts that are here ────────► late ones, behind the bus ─► sum of the parts
    CPU   product where the expert lies ────────────────────────────────┘
    bus   what is wanted now │ what the next layers want

When the host asks for a layer it has waited for that layer's router, so every kernel of the layers before is done: a
place that this layer does not use may be written at once. ``look_ahead`` comes when the layer's products have been
launched or may begin: it writes no place that they read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.experts import as_matrices
from mixtralkit.moe.tiers.arrivals import Arrivals
from mixtralkit.moe.tiers.bus import CudaBus, PlainBus, Ticket
from mixtralkit.moe.tiers.cache import Key, PlaceCache
from mixtralkit.moe.tiers.memory import Empty, Geometry, HostExperts, MappedExperts, Move
from mixtralkit.moe.tiers.setup import Answer, TierCounts, TierSetup
from mixtralkit.moe.tiers.tables import Tables
from mixtralkit.moe.tiers.warm import fill, measure
from mixtralkit.moe.weights import ExpertWeights
from mixtralkit.ops.experts import expert_sum
from mixtralkit.ops.gate import gate
from mixtralkit.ops.hidden import Hidden, Norm

if TYPE_CHECKING:
    from mixtralkit.moe.tiers.desk import Desk

SURE_ROWS = 8  # of an expert in the mean: rows that touch all of a layer so often are sure to touch all of the next
LAYERS_AHEAD = 2  # that are fetched for such rows
MOST_GUESSED_ROWS = 16  # rows for which the next layer's router is asked
MOST_SPLIT_ROWS = 16  # choices up to which an expert is split between CPU and bus
MOST_STAYING = 4  # split experts whose first columns are on their way: more would take places before the bus has time
LEANING, MOST_LEANING = 1.02, 2.0  # how the CPU's share of a split expert follows who was late, and how far it may go
SPLIT_COLUMNS = 64  # a split is at a multiple of so many hidden columns, and of the format's unit
MORE_SILENT = 4  # such multiples that are cleared beyond a split, since the next one may be a little larger


class Tiers:
    """Host memory, places and the cache of a rank's layers.

    Attributes:
        hosts: by layer.
        matrices: w13 and w2 of all places; ``pool`` are their parts.
        expert_bytes: of an expert in a place.
        tables: where experts are.
        counts: since the start.
        routers: by layer, norm and weight of the next layer's router; none guesses nothing.
    """

    def __init__(
        self,
        layout: RankLayout,
        context: RankContext,
        dtype: torch.dtype,
        setup: TierSetup,
        empty: Empty,
        layers: Sequence[int],
        bus: PlainBus | CudaBus | None = None,
    ) -> None:
        """Takes the memory. ``empty`` makes a format's tensors for so many experts; ``bus`` None is the device's.

        Raises:
            ValueError: too few places for a layer's experts at once, or experts of several formats.
        """
        layout.check_one_format("gpu_memory_gb")
        config, weights, device = layout.config, layout.weights, context.device
        self.dtype = dtype
        self.context, self.layers = context, list(layers)
        self.weights, self.columns = weights, (config.dim, layout.hidden[1] - layout.hidden[0])
        self.bus = bus or (CudaBus(device) if device.type == "cuda" else PlainBus())
        self.slots = {layer: len(layout.experts(layer)) for layer in layers}
        self.costs = setup.costs
        self.routers: dict[int, tuple[Norm, torch.Tensor]] = {}
        wanted = device.type == "cuda" if setup.splits is None else setup.splits
        self.splits = wanted and setup.options.misses == "auto" and _has_product(weights)
        pinned = device.type == "cuda"
        in_file = () if setup.mapped is None else setup.mapped.layers
        self.hosts = {
            layer: MappedExperts(setup.mapped, layer) if layer in in_file else HostExperts(empty, slots, pinned)
            for layer, slots in self.slots.items()
        }
        hidden = self.columns[1]
        self._split_unit = max(SPLIT_COLUMNS, weights.unit, weights.height or 1)
        self._host_matrices = {
            layer: as_matrices(weights, self.columns, host.tensors) for layer, host in self.hosts.items()
        }
        self._sources = {layer: Geometry(weights, hidden, host.tensors) for layer, host in self.hosts.items()}
        self._empty = empty
        self.restart(setup, layout)

    def restart(self, setup: TierSetup, layout: RankLayout) -> None:
        """Takes other places, which the tiers of the layout's plan fill before the next step; nothing may be running.

        Raises:
            ValueError: too few places for a layer's experts at once.
        """
        config, device = layout.config, self.context.device
        most, spare = max(self.slots.values()), config.num_experts_per_tok if self.splits else 0
        if setup.places < most + spare:
            raise ValueError(
                f"gpu_memory_gb leaves room for {setup.places} experts: there must be room for {most + spare}, those "
                f"of a layer{f' and {spare} more' if spare else ''}"
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # nothing is on its way to the old places any more
        self.setup, self.layout, self.counts = setup, layout, TierCounts()
        self.pool = self.matrices = ()
        self.pool = tuple(part.zero_() for part in self._empty(setup.places, str(device)))
        self.matrices = as_matrices(self.weights, self.columns, self.pool)
        self._places = Geometry(self.weights, self.columns[1], self.pool)
        self.cache = PlaceCache(setup.places - spare, config.n_layers, setup.options.expert_cache)
        self._spare = list(range(setup.places - spare, setup.places))
        self._silent = dict.fromkeys(self._spare, 0)
        self.expert_bytes = sum(part[0].nbytes for part in self.pool)
        self._arriving = Arrivals(self._copy)
        self._split: list[tuple[Key, int, int]] = []  # expert, spare place and first column that is there
        self._staying: dict[Key, list[Move]] = {}  # what brings their first columns once these rows are done
        self._sure, self._was_sure = False, False
        self._in_use: Mapping[Key, int] = {}
        self.tables = Tables(config.n_layers, most, self.cache, device)
        self._guessed: torch.Tensor | None = None
        self._is_warm = False
        self._lean: dict[int, float] = {}  # by how many are split: what a layer costs besides counts more for one
        self._widest = 0  # first columns of a split so far
        self.desk: Desk | None = None

    # products

    def product(
        self, layer: int, x_ND: torch.Tensor, slots_N1: torch.Tensor, weights_N1: torch.Tensor,
        places_S: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """float32 [N, D]: weight · expert(x) of a choice a row on the GPU, zero for slot -1.

        ``places_S`` is where the slots are, None for what the layer's table says.
        """
        out_ND = torch.empty(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        slots = self.slots[layer]
        storage_S = self.tables.places_LS[layer, :slots] if places_S is None else places_S
        return expert_sum(
            x_ND, slots_N1, weights_N1, *self.matrices, out_RD=out_ND, storage_S=storage_S, likely_slots=slots
        )

    def product_on_cpu(
        self, layer: int, x_RD: torch.Tensor, slots_RK: torch.Tensor, weights_RK: torch.Tensor,
        first: int | None = None, out_RD: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """float32 [R, D]: rows' sums over their choices, zeros for slots -1, on the CPU where the experts lie.

        ``first`` hidden columns of them, None for all.
        """
        if out_RD is None:
            out_RD = torch.empty(x_RD.shape, dtype=torch.float32)
        self.hosts[layer].check()
        matrices = self._host_matrices[layer]
        self.counts.products += len({*slots_RK.flatten().tolist()} - {-1})
        if slots_RK.numel() > MOST_SPLIT_ROWS:
            chosen_C = (slots_RK >= 0).any(1).nonzero()[:, 0]
            given = (x_RD[chosen_C], slots_RK[chosen_C], weights_RK[chosen_C])
            found_CD = expert_sum(*given, *matrices, out_RD=out_RD.new_empty(len(chosen_C), x_RD.shape[1]))
            return out_RD.zero_().index_copy_(0, chosen_C, found_CD)
        if first is None:
            return expert_sum(x_RD, slots_RK, weights_RK, *matrices, out_RD=out_RD)
        from mixtralkit.ops.cpu.products import expert_sum_cpu

        return expert_sum_cpu(x_RD, slots_RK, weights_RK, *matrices, out_RD=out_RD, hidden=first)

    def product_call(self, layer: int, *given: torch.Tensor) -> Callable[[int | None], None] | None:
        """``product_on_cpu`` of the same memory again and again, for ``compute``; None where that is not to be had.

        ``given``: rows, slots, weights and what takes the sums.
        """
        if not _has_product(self.weights) or given[1].numel() > MOST_SPLIT_ROWS:
            return None
        from mixtralkit.ops.cpu.products import expert_sum_call

        *rows, out_RD = given
        return expert_sum_call(*rows, *self._host_matrices[layer], None, out_RD)

    def compute(self, layer: int, call: Callable[[int | None], None], answer: Answer) -> None:
        """The CPU's part of an answer, by ``product_call``."""
        self.hosts[layer].check()
        self.counts.products += len(answer.cpu)
        call(answer.first)

    # decisions

    def warm_up(self) -> None:
        """Once, before the first step: the first experts come, and the machine is measured."""
        if not self._is_warm:
            self._is_warm = True
            fill(self)
            self.costs = self.costs or measure(self)

    def begin(self, layer: int) -> None:
        """A layer's turn: what has come by now counts as here."""
        self.warm_up()
        if layer == self.layers[0]:
            self.next_step()
        self.take_in(layer)

    def next_step(self) -> None:
        """The first layer comes next."""
        self.cache.next_step()
        self._was_sure, self._sure = self._sure, False

    def take_in(self, layer: int | None = None) -> None:
        """Counts as here what has come: guesses for the layer, and what stays."""
        for key, ticket in self._arriving.done(layer):
            self.bus.wait(ticket)
            self.tables.note(key)

    def ask(self, layer: int, rows: Mapping[int, int]) -> Answer:
        """What becomes of the experts that have rows; begins the copies. The layers before have run.

        Args:
            rows: how many rows name a slot, of those that any names.
        """
        needed = {(layer, slot): count for slot, count in rows.items()}
        self._in_use, self._split = needed, []
        self._complete(needed)
        came, counts, place_of = self._use(layer, needed), self.counts, self.cache.place_of
        expected = [key for key in needed if key in self._arriving]
        missing = {key: count for key, count in needed.items() if key not in place_of}
        here = [key for key in needed if key in place_of and key not in self._arriving]
        misses = len(missing) + len(expected)
        self._arriving.missed_bytes += misses * self.expert_bytes
        counts.hits, counts.misses = counts.hits + len(here) - came, counts.misses + misses
        counts.expected += len(expected)
        tickets = [ticket for key in expected for ticket in self._arriving.finish(key)]
        for key in expected:
            self.tables.note(key)
        split, first = self._to_split(missing, sum(rows.values())) if missing else ([], 0)
        if split:
            self._split = [(key, place, first) for key, place in zip(split, self._spare, strict=False)]
            return _answer(here, [*expected, *split], [*tickets, self._fetch_parts(first)], split, first)
        self._complete(self._staying)
        on_cpu, fetched = self.costs.deal(missing, self.setup.options.misses) if missing else ([], [])
        tickets += [self._fetch(key) for key in fetched]
        return _answer(here, [*expected, *fetched], tickets, on_cpu, None)

    def found(self, layer: int, slots: Collection[int]) -> None:
        """A layer has run that found all it needed."""
        needed = dict.fromkeys(((layer, slot) for slot in slots), 1)
        self.counts.hits += len(needed) - self._use(layer, needed)
        self.cache.use(needed)

    def _use(self, layer: int, needed: Mapping[Key, int]) -> int:
        """Rows name experts; how many of these had been brought for them, which counts as missed."""
        for key in self._arriving.in_vain(layer, needed):
            self._give_up(key)
        came = len(self._arriving.asked(layer, needed))
        self._arriving.missed_bytes += came * self.expert_bytes
        self.counts.misses += came
        self.counts.expected += came
        return came

    def _to_split(self, missing: Mapping[Key, int], choices: int) -> tuple[list[Key], int]:
        """Experts that CPU and bus share, and how many hidden columns the CPU takes of each.

        ``choices``: of all the layer's rows.
        """
        few = 0 < len(missing) <= len(self._spare) and choices <= MOST_SPLIT_ROWS
        if not few or not self.splits or not self.costs.product_s:
            return [], 0
        hidden, unit = self.columns[1], self._split_unit
        first = round(self.costs.cpu_share(missing, self._lean.get(len(missing), 1.0)) * hidden / unit) * unit
        return (list(missing), first) if 0 < first < hidden else ([], 0)

    def _fetch(self, key: Key) -> Ticket:
        """Begins to bring an expert that rows are waiting for."""
        place = self._take(key, self._in_use)
        self.counts.fetches += 1
        try:
            ticket = self._copy(self._places.moves(place, self._source(key[0]), key[1]), True)
        except BaseException:
            self.cache.drop(key)
            raise
        self.tables.note(key)
        return ticket

    def _fetch_parts(self, first: int) -> Ticket:
        """Begins to bring all but the first hidden columns of experts to spare places."""
        moves = []
        for key, place, _ in self._split:
            if self._silent[place] < first:
                self.bus.clear(self._places.silence(place, first))
            self._silent[place] = first
            self.tables.lend(key, place)
            moves += self._places.moves(place, self._source(key[0]), key[1], first)
        self.counts.splits += len(self._split)
        return self._copy(moves, True)

    def _source(self, layer: int) -> Geometry:
        """A layer's experts in the host, from which bytes are to be copied."""
        self.hosts[layer].check()
        return self._sources[layer]

    def bring(self, key: Key, place: int) -> Ticket:
        """Begins to copy an expert to a place; neither table nor counters hear of it."""
        return self.bus.copy(self._places.moves(place, self._source(key[0]), key[1]), True)

    def _copy(self, moves: list[Move], urgent: bool) -> Ticket:
        self.counts.fetched_bytes += sum(move.nbytes for move in moves)
        ticket = self.bus.copy(moves, urgent)
        if urgent:
            self._arriving.demand(ticket)
        return ticket

    def _take(self, key: Key, keep: Collection[Key]) -> int:
        """A place for what rows wait for: of nothing that is in use or, if it can be, on its way."""
        found = self.cache.take(key, {*keep, *self._arriving}, key[0])
        while found is None:
            self._give_up(next(k for k in self._arriving if k not in keep))
            found = self.cache.take(key, {*keep, *self._arriving}, key[0])
        self.tables.forget(found[1])
        return found[0]

    # what may be wanted next

    def take_guess(self) -> torch.Tensor | None:
        """The last guess, once."""
        guessed, self._guessed = self._guessed, None
        return guessed

    def guess(self, layer: int, hidden: Hidden) -> None:
        """Asks the next layer's router about the stream as it is in front of this layer's experts."""
        self._guessed = None
        if layer in self.routers and hidden.x_TD is not None and 0 < len(hidden) <= MOST_GUESSED_ROWS and self.guesses:
            norm, weight = self.routers[layer]
            self._guessed = gate(hidden.x_TD, weight, self.top_k, norm).experts_TK

    @property
    def top_k(self) -> int:
        return self.layout.config.num_experts_per_tok

    def is_sure(self, rows: float) -> bool:
        """Whether so many rows of a layer are sure to touch all of its experts."""
        return rows * self.top_k >= SURE_ROWS * max(self.slots.values())

    @property
    def guesses(self) -> bool:
        """Whether single experts are fetched ahead: not where misses are split, which whole ones would only delay."""
        return self.setup.options.expert_prefetch and not self.splits

    def look_ahead(self, layer: int, rows: Mapping[int, int], guessed: np.ndarray | None = None) -> None:
        """Begins to bring what the next layers are likely to want, of places that this one does not use.

        Args:
            rows: how many rows named a slot of this layer, as ``ask`` was told.
            guessed: experts that the next layer's router would choose.
        """
        split, self._split = self._split, []
        self.cache.use(self._in_use)
        if not self.setup.options.expert_prefetch:
            return
        self._complete(self._staying)  # of layers before, whose rows are done
        for one in split:
            self._keep(*one)
        if len(rows) == self.slots[layer] > 0 and self.is_sure(sum(rows.values()) / self.top_k):
            self._sure = True
            at = self.layers.index(layer)
            for distance in range(1, min(LAYERS_AHEAD, len(self.layers) - 1) + 1):
                if at + distance < len(self.layers) or self._was_sure:  # else nobody knows of a step behind this
                    self._bring_all(layer, self.layers[(at + distance) % len(self.layers)], distance)
        elif guessed is not None and self.guesses and layer != self.layers[-1]:
            following = self.layers[self.layers.index(layer) + 1]
            own = self.layout.experts(following)
            self._bring_guessed([(following, own.index(e)) for e in dict.fromkeys(guessed.tolist()) if e in own])
        self.pump()

    def _keep(self, key: Key, place: int, first: int) -> None:
        """A split expert stays where its last columns are, and the place of one that is worth less is spare instead."""
        if len(self._staying) + self._arriving.staying >= MOST_STAYING:
            return
        found = self.cache.exchange(key, place, {*self._in_use, *self._arriving, *self._staying})
        if found is None:
            return
        spare, victim = found
        self.tables.forget(victim)
        self._spare[self._spare.index(place)] = spare
        del self._silent[place]
        self._silent[spare] = 0
        self._staying[key] = self._places.rest(place, self._source(key[0]), key[1], first)
        if victim is None or victim[0] == key[0]:  # nothing that runs reads it: it is cleared while nobody waits
            self._widest = max(self._widest, first)
            likely = min(self._widest + MORE_SILENT * self._split_unit, self.columns[1])
            self.bus.clear(self._places.silence(spare, likely))
            self._silent[spare] = likely

    def _complete(self, keys: Collection[Key]) -> None:
        """Lets come what is missing of experts that stay, if they are among some."""
        for key in [key for key in self._staying if key in keys]:
            self._arriving.complete(key, self._staying.pop(key))

    def _bring_all(self, layer: int, following: int, distance: int) -> None:
        """Experts of a layer so far ahead, all of which are sure to be wanted."""
        wanted = [(following, slot) for slot in range(self.slots[following])]
        # Nothing makes way that comes before it.
        keep = {k for k in self.cache.place_of if (k[0] - layer) % self.cache.layers <= distance}
        for key in sorted(wanted, key=self.cache.value, reverse=True):
            if key not in self.cache.place_of and not self._bring(key, {*keep, *wanted}, layer, in_turn=True):
                return

    def _bring_guessed(self, wanted: Sequence[Key]) -> None:
        """Experts of the next layer, in place of what is less likely to be used than guesses come true."""
        for key in wanted:
            if key not in self.cache.place_of and self._arriving.may_guess(self.expert_bytes):
                self._bring(key, wanted, key[0], most=self._arriving.right)

    def _bring(self, key: Key, keep: Collection[Key], layer: int, **how: object) -> bool:
        found = self.cache.take(key, {*self._in_use, *keep, *self._arriving}, layer, **how)
        if found is None:
            return False
        self.tables.forget(found[1])
        self.counts.fetches += 1
        moves = self._places.moves(found[0], self._source(key[0]), key[1])
        (self._arriving.begin if "in_turn" in how else self._arriving.guess)(key, moves)
        return True

    def pump(self) -> None:
        """Begins the next piece of what is guessed."""
        self._arriving.pump()

    def _give_up(self, key: Key) -> None:
        """Of what was expected and nobody wants, the place is free when its last copy is done; all begun, it stays.

        It may have to make way before it is there: whatever comes to its place then is behind it.
        """
        ticket = self._arriving.give_up(key)
        if ticket is None:
            self.cache.drop(key)
        else:
            self.bus.wait(ticket)
            self.bus.follow(ticket)
            self.tables.note(key)

    # ends

    def wait(self, answer: Answer) -> None:
        """What the GPU does from now on comes after the copies."""
        for ticket in answer.tickets:
            self.bus.wait(ticket)

    def balance(self, answer: Answer) -> None:
        """The CPU has done its part: who was late, it or the bus, has less to do the next time."""
        if answer.first is not None:
            is_late = not all(ticket.query() for ticket in answer.tickets)
            split = len(answer.cpu)
            lean = self._lean.get(split, 1.0) * (LEANING if is_late else 1 / LEANING)
            self._lean[split] = min(max(lean, 1 / MOST_LEANING), MOST_LEANING)

    def on_host(self, values: torch.Tensor) -> np.ndarray:
        """Waits for the device, and begins pieces of what is guessed meanwhile."""
        if values.device.type == "cpu":
            return values.numpy()
        held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        while not done.query():
            self.pump()
        return held.numpy()

    @contextlib.contextmanager
    def at(self, desk: Desk | None) -> Iterator[None]:
        """What is launched meanwhile asks the host at ``desk``; None has the host decide before it launches."""
        self.desk = desk
        try:
            yield
        finally:
            self.desk = None


def _has_product(weights: ExpertWeights) -> bool:
    """Whether a CPU has kernels for the format, and a compiler for these."""
    from mixtralkit.ops.cpu.build import kernels

    return (weights.is_plain or weights.cpu_type is not None) and kernels() is not None


def _answer(here, late, tickets, on_cpu, first: int | None) -> Answer:
    slots = [tuple(slot for _, slot in keys) for keys in (here, late, on_cpu)]
    return Answer(slots[0], slots[1], tuple(tickets), slots[2], first)
