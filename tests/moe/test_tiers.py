"""Experts in two memories: the cache against brute force, who answers a miss, copies, and what may go wrong."""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixtralkit.config import TierOptions
from mixtralkit.distributed import RankContext
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.experts import as_matrices, run_experts
from mixtralkit.moe.store import ExpertStore
from mixtralkit.moe.tiers import Costs, TierSetup
from mixtralkit.moe.tiers.bus import PlainBus
from mixtralkit.moe.tiers.cache import DECAY, PlaceCache
from mixtralkit.moe.tiers.memory import Geometry, HostExperts, Move, in_pieces
from mixtralkit.moe.tiers.setup import Answer
from mixtralkit.moe.tiers.warm import measure
from tests.moe.tier_parts import CPU_COSTS, BrokenBus, RatedBus, SlowBus, layout_of, make_store, resident, rows_of


class _Brute:
    """A cache that remembers every use and looks at all of them."""

    def __init__(self, places: int, policy: str) -> None:
        self.places, self.policy, self.uses, self.held, self.now = places, policy, [], set(), 0
        self.shares = None  # of layers, once they are settled

    def value(self, key) -> float:
        steps = [step for used, step in self.uses if used == key]
        if self.policy == "lru":
            return max(steps, default=-1)
        return sum(DECAY ** (self.now - step) for step in steps)

    def step(self, layer: int, keys: list) -> tuple[int, int]:
        self.uses += [(key, self.now) for key in keys]
        missing = [key for key in keys if key not in self.held]
        for key in missing:
            if len(self.held) == self.places:
                others = [other for other in self.held if other not in keys]
                if self.shares is not None:
                    own = [other for other in others if other[0] == layer]
                    over = [o for o in others if Counter(k[0] for k in self.held)[o[0]] > self.shares[o[0]]]
                    is_full = sum(k[0] == layer for k in self.held) >= self.shares[layer]
                    others = (own if is_full else over) or others
                order = {other: (round(self.value(other), 9), -((other[0] - layer) % 3), other) for other in others}
                self.held.remove(min(others, key=order.__getitem__))
            self.held.add(key)
        return len(keys) - len(missing), len(missing)


@pytest.mark.parametrize("policy", ["lru", "frequency"])
@pytest.mark.parametrize("places", [4, 9, 17, 24])
def test_the_cache_is_that_of_brute_force(policy: str, places: int) -> None:
    rng, brute, cache = random.Random(places), _Brute(places, policy), PlaceCache(places, 3, policy)
    for step in range(60):
        cache.next_step()
        brute.now = cache._now
        for layer in range(3):
            keys = [(layer, slot) for slot in rng.choices(range(8), [8, 5, 3, 2, 1, 1, 1, 1], k=2 + step % 2)]
            keys = list(dict.fromkeys(keys))
            missing = [key for key in keys if key not in cache.place_of]
            cache.use(keys)
            for key in missing:
                assert cache.take(key, keys, layer) is not None
            assert brute.step(layer, keys) == (len(keys) - len(missing), len(missing))
            assert set(cache.place_of) == brute.held
            assert len(set(cache.place_of.values())) == len(cache.place_of) <= places


@pytest.mark.parametrize("policy", ["lru", "frequency"])
def test_the_tiers_count_what_brute_force_counts(policy: str) -> None:
    options = TierOptions(misses="fetch", expert_cache=policy, expert_prefetch=False)
    store, brute = make_store(TierSetup(11, options, CPU_COSTS)), _Brute(11, policy)
    tiers, hits, misses = store.tiers, 0, 0
    for step in range(25):
        for layer in store.layers:
            rows = rows_of(1 + step % 2, 10 * step + layer)
            if not brute.held:
                tiers.begin(0)
                brute.held = set(tiers.cache.place_of)
                brute.shares = Counter(k[0] for k in brute.held)
                tiers.cache._now = 0  # the step that begins again
            brute.now = tiers.cache._now + (layer == 0)
            store.experts[layer](rows)
            found = brute.step(layer, [(layer, slot) for slot in sorted(set(rows.slots_RK.flatten().tolist()))])
            hits, misses = hits + found[0], misses + found[1]
            assert set(tiers.cache.place_of) == brute.held
    counts = tiers.counts
    assert (counts.hits, counts.misses, counts.fetches, counts.products) == (hits, misses, misses, 0)
    assert counts.fetched_bytes == misses * store.expert_bytes


def test_a_use_in_turn_lets_go_what_comes_last() -> None:
    cache = PlaceCache(6, 4)
    for layer in range(3):
        for slot in range(2):
            cache.take((layer, slot), (), layer)
    assert cache.take((3, 0), {(2, 0), (2, 1)}, 2, in_turn=True)[1] in {(1, 0), (1, 1)}, "layer 1 has just run"
    full = PlaceCache(1, 4)
    full.take((0, 0), (), 0)
    assert full.take((1, 0), {(0, 0)}, 0) is None


def test_misses_are_dealt_to_end_early() -> None:
    costs = Costs(2.0, ((1, 1.5), (4, 6.0)))
    assert costs.cpu_s(1) == 1.5
    assert costs.cpu_s(2) == pytest.approx(3.0)
    assert costs.cpu_s(8) == pytest.approx(12.0)
    assert costs.deal({3: 1}) == ([3], [])
    cpu, bus = costs.deal({0: 4, 1: 1, 2: 1, 3: 1})
    assert sorted(cpu + bus) == [0, 1, 2, 3]
    assert 0 in bus, "the bus does not mind rows"
    assert costs.deal({0: 1, 1: 1}, "fetch") == ([], [0, 1])
    assert costs.deal({0: 1, 1: 1}, "cpu") == ([0, 1], [])
    assert Costs(2.0).deal({0: 1}, "cpu") == ([], [0]), "no product there"
    share = costs.cpu_share({0: 1, 1: 1})
    assert share * 2 * 1.5 == pytest.approx((1 - share) * 2 * 2.0), "both end together"
    assert Costs(1.0).cpu_share({0: 1}) == 0.0


@pytest.mark.parametrize(
    "weights", [None, "int8", "int4:64", "int4:32:zeros", "fp8:channel", "fp8:tensor", "fp8:block"]
)
def test_parts_of_an_expert_are_copied_or_silent(weights: str | None) -> None:
    """The last hidden columns come, w1 and w3 have zeros before them: their product is that of the last columns."""
    store = make_store(TierSetup(24, costs=CPU_COSTS), weights)
    kind, first, hidden = store.layout.weights, 128, 256
    host = store.tiers.hosts[1]
    places = tuple(part.zero_() for part in store._empty(3))
    here = Geometry(kind, hidden, places)
    there = Geometry(kind, hidden, host.tensors)
    PlainBus().copy(here.moves(2, there, 5))
    for mine, theirs in zip(places, host.tensors, strict=True):
        assert torch.equal(mine[2], theirs[5])
    PlainBus().copy(here.moves(1, there, 6))
    PlainBus().clear(here.silence(0, first))
    PlainBus().copy(here.moves(0, there, 6, first))
    moved = sum(move.nbytes for move in here.moves(0, there, 6, first))
    assert moved < 0.62 * store.expert_bytes
    assert moved + sum(move.nbytes for move in here.rest(0, there, 6, first)) == store.expert_bytes
    w13, w2 = as_matrices(kind, store._columns, places)
    x, weights_11 = torch.randn(1, 64), torch.ones(1, 1)
    part = run_experts(RoutedRows(x, torch.tensor([[0]]), weights_11), w13, w2)
    plain = [(w if kind.is_plain else w.float())[1] for w in (w13, w2)]
    gate, up = torch.nn.functional.linear(x, plain[0]).chunk(2, dim=1)
    h = torch.nn.functional.silu(gate) * up
    h[:, :first] = 0
    torch.testing.assert_close(part, torch.nn.functional.linear(h, plain[1]), rtol=2e-3, atol=2e-4)


def test_pieces_have_the_same_bytes() -> None:
    moves = [Move(1000, 5000, 100), Move(0, 7000, 10, 7, 20, 30), Move(2000, 9000, 300, 2, 400, 500)]

    def covered(moves: list[Move]) -> Counter:
        return Counter(
            (m.target + r * m.target_pitch + i, m.source + r * m.source_pitch + i)
            for m in moves for r in range(m.height) for i in range(m.width)
        )  # fmt: skip

    for most in (7, 35, 64, 1000):
        pieces = in_pieces(moves, most)
        assert covered(pieces) == covered(moves)
        assert all(move.nbytes <= most for move in pieces)


SETUPS = [
    TierSetup(8, TierOptions(), CPU_COSTS),
    TierSetup(13, TierOptions(expert_cache="frequency"), Costs(1.0)),
    TierSetup(13, TierOptions(misses="cpu"), CPU_COSTS),
    TierSetup(9, TierOptions(misses="fetch", expert_prefetch=False), CPU_COSTS, piece_rows=3),
    TierSetup(24, TierOptions(), None),
]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("weights", [None, "int8", "int4:64", "fp8:channel"])
def test_rows_get_the_bits_of_one_memory(setup: TierSetup, weights: str | None) -> None:
    """For any places and whoever answers; batches, single rows, no row."""
    if weights == "fp8:channel":  # torch's product, which takes other rows together otherwise
        setup = replace(setup, piece_rows=None)
    store = make_store(setup, weights)
    for step, count in enumerate([40, 1, 2, 0, 1, 7, 1, 33, 2, 1]):
        for layer in store.layers:
            rows = rows_of(count, 7 * step + layer)
            assert torch.equal(store.experts[layer](rows), resident(store, layer, rows))
    counts = store.tiers.counts
    assert (counts.misses == 0) == (setup.places == 24)
    assert (counts.products > 0) == (setup.costs is CPU_COSTS and setup.options.misses != "fetch")


def test_choices_of_other_ranks_bring_nothing() -> None:
    store = make_store(TierSetup(8, TierOptions(misses="fetch"), CPU_COSTS))
    rows = rows_of(5, 0)
    slots = rows.slots_RK.masked_fill(rows.slots_RK > 1, -1)
    rows = replace(rows, slots_RK=slots)
    assert torch.equal(store.experts[2](rows), resident(store, 2, rows))
    assert store.tiers.counts.hits + store.tiers.counts.misses <= 2


@pytest.mark.parametrize("weights", [None, "int8", "int4:64"])
@pytest.mark.parametrize(("policy", "is_slow"), [("lru", False), ("frequency", True)])
def test_split_experts_stay(weights: str | None, policy: str, is_slow: bool) -> None:
    """Rows that always want the same ones find them, whole, after a few steps; what is spare is never what is kept."""
    options = TierOptions(expert_cache=policy)
    store = make_store(TierSetup(12, options, Costs(1.0, ((1, 1.0),)), splits=True), weights)
    tiers = store.tiers
    tiers.begin(0)
    tiers.bus = SlowBus() if is_slow else tiers.bus
    rows, missed = {layer: rows_of(1, layer) for layer in store.layers}, []
    for step in range(30):
        for layer in store.layers:
            if step % 5 == 4:  # somebody else in between
                store.experts[layer](rows_of(1, 7 * step + layer))
            before = tiers.counts.misses
            y, wanted = store.experts[layer](rows[layer]), resident(store, layer, rows[layer])
            missed.append(tiers.counts.misses - before)
            torch.testing.assert_close(y, wanted, rtol=2e-3, atol=2e-4)
            assert not {*tiers.cache.place_of.values()} & {*tiers._spare}
            assert len({*tiers.cache.place_of.values(), *tiers._spare, *tiers.cache._free}) == 12
    counts = tiers.counts
    assert sum(missed[:6]) > sum(missed[-6:])
    assert counts.hits > 60
    assert counts.splits == counts.products > 10
    assert counts.misses == counts.splits + counts.expected
    for key, place in tiers.cache.place_of.items():
        if key not in tiers._arriving and key not in dict(tiers._staying):
            assert all(
                torch.equal(mine[place], theirs[key[1]])
                for mine, theirs in zip(tiers.pool, tiers.hosts[key[0]].tensors, strict=True)
            ), key


def test_a_guess_keeps_what_the_step_needs_and_is_right_when_late() -> None:
    """Experts that are on their way are waited for, vain ones make way, and places in use are never taken."""
    store = make_store(TierSetup(8, TierOptions(misses="fetch"), CPU_COSTS))
    tiers, bus = store.tiers, SlowBus()
    tiers.bus, rng = bus, random.Random(1)
    for step in range(40):
        for layer in store.layers:
            rows = rows_of(1, 50 * step + layer)
            guess = [rng.choice(rows_of(1, 50 * step + layer + 1).slots_RK[0].tolist()), rng.randrange(8)]
            tiers._guessed = torch.tensor([guess])
            before = dict(tiers.cache.place_of)
            assert torch.equal(store.experts[layer](rows), resident(store, layer, rows))
            bus.has_run()
            used = {(layer, slot) for slot in rows.slots_RK[0].tolist()}
            assert used <= tiers.cache.place_of.keys(), "in use while the next is fetched"
            assert not any(key in before and tiers.cache.place_of[key] != before[key] for key in used)
            assert len(tiers.cache.place_of) <= 8
    assert tiers.counts.expected > 10
    assert bus.waiting


def test_what_takes_the_place_of_a_vain_guess_comes_behind_its_last_copy() -> None:
    """All of it begun, it counts as there, and as the least worth it makes way at once."""
    store = make_store(TierSetup(8, TierOptions(misses="fetch"), CPU_COSTS))
    tiers, bus, vain = store.tiers, SlowBus(), 0
    tiers.bus = bus
    for step in range(40):
        for layer in store.layers:
            rows = rows_of(1, 50 * step + layer)
            tiers._guessed = torch.tensor([[step % 8]])
            assert torch.equal(store.experts[layer](rows), resident(store, layer, rows))
            bus.has_run()
            for arrival in tiers._arriving._of.values():
                while arrival.moves:  # but for the last, all pieces have come
                    arrival.ticket.end()
                    tiers.pump()
                vain += not arrival.ticket.done
    assert vain > 10


def test_prompts_fetch_the_next_layers_in_turn() -> None:
    store = make_store(TierSetup(16, TierOptions(), Costs(1.0)))
    tiers = store.tiers
    for number in range(4):
        before = replace(tiers.counts)
        for layer in store.layers:
            store.experts[layer](rows_of(64, layer + 10 * number))
        counts, misses = tiers.counts, tiers.counts.misses - before.misses
        unexpected = misses - (counts.expected - before.expected)
        assert unexpected <= (8 if number < 2 else 0), "behind one prompt nobody knows of another"
        assert misses >= 8
        fetched = counts.fetches - before.fetches
        assert fetched <= misses + 8 * (number == 1), "the first layers of a third one are there before it comes"


@pytest.mark.parametrize("policy", ["lru", "frequency"])
@pytest.mark.parametrize(
    ("rows", "idle", "right"), [(1, 8.0, 0.5), (1, 0.1, 0.9), (2, 2.0, 0.0), (6, 1.0, 0.7), (64, 1.0, 0.0)]
)
def test_no_more_is_fetched_than_is_missed(policy: str, rows: int, idle: float, right: float) -> None:
    """Of guesses, ``right`` of which come true, and of next layers; layers take ``idle`` copies of an expert.

    A batch that named three quarters of a layer's experts fetched all of the next two layers: half as much again as was
    missed, in place of what the step needed.
    """
    store = make_store(TierSetup(16, TierOptions(misses="fetch", expert_cache=policy), Costs(1.0)))
    tiers, rng = store.tiers, random.Random(rows)
    tiers.begin(0)
    tiers.bus = bus = RatedBus(tiers.expert_bytes)
    steps = {(step, layer): rows_of(rows, 50 * step + layer) for step in range(61) for layer in store.layers}
    guessed_in_demand = 0
    for step in range(60):
        for layer in store.layers:
            following = steps[step + (layer == 2), (layer + 1) % 3].slots_RK.flatten().tolist()
            if rows <= 6:
                tiers._guessed = torch.tensor([[e if rng.random() < right else rng.randrange(8) for e in following]])
            store.experts[layer](steps[step, layer])
            guessed_in_demand += bus.free_at[1] > bus.now and bus.free_at[0] > bus.now and rows <= 6
            until = bus.now + idle
            while bus.now < until:
                bus.now += 0.05
                tiers.pump()
    counts = tiers.counts
    assert counts.misses > 100
    assert counts.fetched_bytes <= 1.1 * counts.misses * tiers.expert_bytes
    assert not guessed_in_demand
    if right > 0.4 or rows == 64:
        assert counts.expected > 0.02 * counts.misses, "an idle bus is used"


def test_a_copy_that_fails_is_told_and_forgotten() -> None:
    store = make_store(TierSetup(8, TierOptions(misses="fetch", expert_prefetch=False), CPU_COSTS))
    store.experts[0](rows_of(2, 0))
    missing = replace(rows_of(2, 0), slots_RK=torch.tensor([[0, 1], [2, 3]]))
    missing.slots_RK.add_(4 * ((1, 0) in store.tiers.cache.place_of))
    store.tiers.bus = BrokenBus(1)
    with pytest.raises(RuntimeError, match="could not be copied"):
        store.experts[1](missing)
    store.tiers.bus = PlainBus()
    for seed in range(6):
        rows = rows_of(2, seed)
        assert torch.equal(store.experts[1](rows), resident(store, 1, rows)), "nothing half copied counts as there"


def test_a_split_that_fails_leaves_nothing_behind() -> None:
    """An expert whose last columns never came would have been taken to stay."""
    store = make_store(TierSetup(12, TierOptions(), Costs(1.0, ((1, 1.0),)), splits=True), "int8")
    tiers = store.tiers
    tiers.begin(0)
    missing = next(slot for slot in range(8) if (1, slot) not in tiers.cache.place_of)
    here = next(slot for slot in range(8) if (1, slot) in tiers.cache.place_of)
    rows = replace(rows_of(1, 0), slots_RK=torch.tensor([[here, missing]]))
    tiers.bus = BrokenBus(0)
    with pytest.raises(RuntimeError, match="could not be copied"):
        store.experts[1](rows)
    tiers.bus = PlainBus()
    held = replace(rows, slots_RK=torch.tensor([[here, here]]))
    for asked in (held, rows, rows, held, rows):
        torch.testing.assert_close(store.experts[1](asked), resident(store, 1, asked), rtol=2e-3, atol=2e-4)
        assert not {*tiers.cache.place_of.values()} & {*tiers._spare}


def test_no_more_experts_stay_than_the_bus_completes() -> None:
    store = make_store(TierSetup(20, TierOptions(), Costs(1.0, ((1, 1.0),)), splits=True), "int8")
    tiers = store.tiers
    tiers.begin(0)
    tiers.bus, most = RatedBus(1e-3), 0
    for step in range(40):
        for layer in store.layers:
            rows = rows_of(1, 7 * step + layer)
            torch.testing.assert_close(store.experts[layer](rows), resident(store, layer, rows), rtol=2e-3, atol=2e-4)
            most = max(most, tiers._arriving.staying + len(tiers._staying))
    assert most == 4


def test_shares_follow_who_was_late() -> None:
    """The bus is slower beside a product than alone, or faster: from step to step CPU and bus come to end together."""
    store = make_store(TierSetup(12, TierOptions(), Costs(1.0, ((1, 1.0),)), splits=True))
    tiers, missing = store.tiers, {(1, 0): 1}
    bus = SlowBus()
    first = tiers._to_split(missing, 2)[1]
    assert first == 128, "a half"
    for is_late, times, wanted in ((True, 30, 192), (False, 30, 128), (False, 900, 64), (True, 900, 192)):
        for _ in range(times):
            tiers.balance(Answer((), (0,), (bus.copy([], urgent=not is_late),), (0,), first))
        assert tiers._to_split(missing, 2)[1] == wanted
    assert tiers._to_split({(1, 0): 1, (1, 1): 1}, 2)[1] == 128, "two have a share of their own"


def test_too_few_places_and_copies_between_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="room for 7 experts: there must be room for 8"):
        make_store(TierSetup(7, costs=CPU_COSTS))
    with pytest.raises(ValueError, match="not with gpu_memory_gb"):
        ExpertStore(layout_of(), RankContext(), torch.float32, room=2, tiers=TierSetup(8))
    store = make_store(TierSetup(8, costs=CPU_COSTS))
    with pytest.raises(ValueError, match="not with gpu_memory_gb"):
        store.adopt(0, store.layout)


def test_the_plan_says_what_is_there_at_first() -> None:
    tier = tuple(tuple("gpu" if (layer + expert) % 2 else "host" for expert in range(8)) for layer in range(3))
    layout = replace(layout_of(), plan=replace(layout_of().plan, tier=tier))
    store = ExpertStore(layout, RankContext(), torch.float32, tiers=TierSetup(12, costs=CPU_COSTS))
    store.tiers.begin(0)
    assert set(store.tiers.cache.place_of) == {(a, b) for a in range(3) for b in range(8) if (a + b) % 2}
    even = make_store(TierSetup(12, costs=CPU_COSTS))
    even.tiers.begin(0)
    assert Counter(layer for layer, _ in even.tiers.cache.place_of) == {0: 4, 1: 4, 2: 4}


def test_an_expert_is_one_block() -> None:
    store = make_store(TierSetup(8, costs=CPU_COSTS), "int4:64")
    host: HostExperts = store.tiers.hosts[0]
    bytes_ = ctypes.string_at(host.blocks[3].data_ptr(), host.blocks.shape[1])
    for part in host.tensors:
        start = part[3].data_ptr() - host.blocks[3].data_ptr()
        assert start % 64 == 0
        assert bytes_[start : start + part[3].nbytes] == part[3].contiguous().view(torch.uint8).numpy().tobytes()
    assert len(bytes_) - store.expert_bytes < 64 * len(host.tensors)
    assert np.isfinite(measure(store.tiers).fetch_s)
