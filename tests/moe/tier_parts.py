"""Stores whose experts lie in two memories of one machine, rows for them, and buses that are slow or break."""

from __future__ import annotations

from dataclasses import replace

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.experts import run_experts
from mixtralkit.moe.store import ExpertStore
from mixtralkit.moe.tiers import Costs, TierSetup
from mixtralkit.moe.tiers.bus import PlainBus
from mixtralkit.moe.tiers.memory import Move
from mixtralkit.moe.weights import parse_weights
from tests.configs import small_config

CONFIG = small_config(dim=64, hidden_dim=256, n_layers=3)
CPU_COSTS = Costs(1.0, ((1, 0.9), (2, 1.5), (4, 4.0)))


def layout_of(weights: str | None = None) -> RankLayout:
    return replace(RankLayout.single(CONFIG), weights=parse_weights(weights))


def make_store(setup: TierSetup, weights: str | None = None, seed: int = 0) -> ExpertStore:
    store = ExpertStore(layout_of(weights), RankContext(), torch.float32, tiers=setup)
    generator = torch.Generator().manual_seed(seed)
    for layer in store.layers:
        (dim, hidden), tensors = store._columns, []
        for shape in ((8, 2, hidden, dim), (8, 1, dim, hidden)):
            w = torch.randn(shape, generator=generator) * 0.1
            parts = (w,) if store.layout.weights.is_plain else store.layout.weights.quantize(w).tensors
            tensors += [part.flatten(1, 2) for part in parts]
        for mine, tensor in zip(store.experts[layer].tensors, tensors, strict=True):
            mine.copy_(tensor)
    return store


def rows_of(count: int, seed: int, experts: int = 8) -> RoutedRows:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, experts, generator=generator)
    return RoutedRows(
        torch.randn(count, CONFIG.dim, generator=generator), scores.topk(2).indices,
        torch.rand(count, 2, generator=generator), torch.randn(count, CONFIG.dim, generator=generator),
    )  # fmt: skip


def resident(store: ExpertStore, layer: int, rows: RoutedRows) -> torch.Tensor:
    """What the rows give where all experts are in one memory."""
    return run_experts(rows, *store.experts[layer].matrices)


class SlowBus(PlainBus):
    """Urgent copies end at once; the others when somebody lets them.

    An urgent copy to where one of the others goes, that is not known to have ended and that nothing orders before it,
    fails: on a GPU either could be the last.
    """

    def __init__(self) -> None:
        self.waiting: list[_Slow] = []
        self.open = 0

    def copy(self, moves, urgent: bool = True):
        if urgent:
            moves = list(moves)
            begun = [
                move for ticket in self.waiting if not (ticket.is_known or ticket.is_followed) for move in ticket.moves
            ]
            assert not any(_meet(one, other) for one in moves for other in begun), "two copies race for a place"
            return super().copy(moves)
        self.waiting.append(_Slow(self, list(moves)))
        return self.waiting[-1]

    def wait(self, ticket) -> None:
        if isinstance(ticket, _Slow):
            ticket.end()
            ticket.is_waited = True

    def has_run(self) -> None:
        """The device has run what came behind the copies that it waits for."""
        for ticket in self.waiting:
            ticket.is_known |= ticket.is_waited

    def follow(self, ticket) -> None:
        if isinstance(ticket, _Slow):
            ticket.is_followed = True


def _meet(one: Move, other: Move) -> bool:
    ends = [move.target + move.width + (move.height - 1) * move.target_pitch for move in (one, other)]
    return one.target < ends[1] and other.target < ends[0]


class _Slow:
    def __init__(self, bus: SlowBus, moves: list[Move]) -> None:
        self.bus, self.moves, self.asked, self.done = bus, moves, 0, False
        # Somebody has seen that it is done, the device waits for it, or copies come behind it.
        self.is_known = self.is_waited = self.is_followed = False

    def end(self) -> None:
        if not self.done:
            PlainBus.copy(self.bus, self.moves)
            self.done = True

    def query(self) -> bool:
        self.asked += 1
        if self.asked > 3:
            self.end()
        self.is_known |= self.done
        return self.done


class RatedBus(PlainBus):
    """A bus that takes its time, by a clock of its own: what is urgent in front of what is not."""

    def __init__(self, rate: float) -> None:
        self.rate, self.now, self.free_at = rate, 0.0, [0.0, 0.0]  # when urgent copies are done, and the others

    def copy(self, moves, urgent: bool = True):
        moves = list(moves)
        super().copy(moves)
        start = max(self.now, self.free_at[0] if urgent else max(self.free_at))
        end = start + sum(move.nbytes for move in moves) / self.rate
        self.free_at[0 if urgent else 1] = end
        return _Timed(self, end)

    def wait(self, ticket) -> None:
        self.now = max(self.now, getattr(ticket, "end", 0.0))


class _Timed:
    def __init__(self, bus: RatedBus, end: float) -> None:
        self.bus, self.end = bus, end

    def query(self) -> bool:
        self.bus.now += 1e-3  # who asks for ever is answered some day
        return self.bus.now >= self.end


class BrokenBus(PlainBus):
    def __init__(self, after: int) -> None:
        self.left = after

    def copy(self, moves, urgent: bool = True):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("an expert could not be copied from host memory to the GPU (CUDA error 999)")
        return super().copy(moves, urgent)
