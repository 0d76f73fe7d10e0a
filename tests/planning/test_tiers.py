"""Experts behind a GPU: every rule against a loop that does it by the book, and Belady against all that can be done."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtralkit.config import ModelConfig, ParallelConfig, shipped
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.fused_cost import FusedTimeModel
from mixtralkit.planning.hardware import USUAL_HOST, Hardware, HostRates
from mixtralkit.planning.memory import RESERVE_GB, Room, rank_memory, room_for_experts
from mixtralkit.planning.plan import contiguous, everywhere
from mixtralkit.planning.policies.tiers import GpuBudget, tiers
from mixtralkit.planning.simulate import sample_routing
from mixtralkit.planning.tiers import RULES, found_by_step, rows_by_step, share_misses, simulate_tiers
from mixtralkit.planning.trace import RoutingTrace

MIXTRAL = ModelConfig.from_file(shipped("models", "mixtral-8x7b"))
SEEDS = st.integers(0, 100_000)


def drawn(seed: int, layers: int = 3, experts: int = 6, steps: int = 14, batch: int = 1):
    rng = np.random.default_rng(seed)
    rows_SLE = rows_by_step(
        sample_routing(rng.dirichlet(np.ones(experts), layers) + 0.01, steps * batch, 2, seed), batch
    )
    return rows_SLE, rng.random((layers, experts)) < rng.uniform(0.1, 0.9)


def by_the_book(rule, rows_SLE, start_LE, decay):
    """Residents as each layer asks: a list, of which the last used (or most used) are kept, the first among equals."""
    steps, layers, experts = rows_SLE.shape
    cache = [tuple(place) for place in np.argwhere(start_LE).tolist()]
    places, score, found = len(cache), {}, []
    for step in range(steps):
        score = {place: decay * uses for place, uses in score.items()} if rule == "frequency" else score
        for layer in range(layers):
            found.append(sorted(expert for of, expert in cache if of == layer))
            wanted = [(layer, expert) for expert in range(experts) if rows_SLE[step, layer, expert]]
            for place in wanted:
                score[place] = score.get(place, 0.0) + 1 if rule == "frequency" else step * layers + layer + 1
            if set(wanted) - set(cache):
                cache = sorted(set(cache) | set(wanted), key=lambda place: (-score.get(place, 0.0), place))[:places]
    return found


@pytest.mark.parametrize("rule", ["lru/layer", "frequency/layer"])
def test_a_cache_of_each_layer_is_that_layer_alone(rule):
    rows_SLE, _ = drawn(7, steps=40)
    start_LE = np.tile(np.arange(6) < 2, (3, 1))
    found_SLE, _ = found_by_step(rule, rows_SLE, start_LE)
    for layer in range(3):
        one = slice(layer, layer + 1)
        alone_SLE, _ = found_by_step(rule.removesuffix("/layer"), rows_SLE[:, one], start_LE[one])
        np.testing.assert_array_equal(found_SLE[:, one], alone_SLE)


@pytest.mark.parametrize("rule", ["lru", "frequency"])
@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_rules_by_the_book(rule, seed, batch):
    rows_SLE, start_LE = drawn(seed, batch=batch)
    found_SLE, came_SL = found_by_step(rule, rows_SLE, start_LE, decay=0.8)
    assert not came_SL.any()
    found = [np.flatnonzero(found_E).tolist() for found_LE in found_SLE for found_E in found_LE]
    assert found == by_the_book(rule, rows_SLE, start_LE, 0.8)


def most_found(wanted_N, everything, places):
    """Of all that can be kept from one request to the next, whatever is there at first: the most that are found."""
    states = {frozenset(c): 0 for n in range(places + 1) for c in itertools.combinations(everything, n)}
    for now in wanted_N:
        after: dict[frozenset, int] = {}
        for state, hits in states.items():
            total = hits + len(state & now)
            for n in range(places + 1):
                for kept in itertools.combinations(sorted(state | now), n):
                    key = frozenset(kept)
                    after[key] = max(after.get(key, -1), total)
        states = after
    return max(states.values())


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_nothing_finds_more_than_belady(seed, places):
    rows_SLE, start_LE = drawn(seed, layers=2, experts=3, steps=6)
    start_LE = np.arange(6).reshape(2, 3) < places
    found_SLE, _ = found_by_step("belady", rows_SLE, start_LE)
    everything = list(itertools.product(range(2), range(3)))
    wanted = [frozenset(place for place in everything if place[0] == layer and rows_SLE[step, place[0], place[1]])
              for step in range(6) for layer in range(2)]  # fmt: skip
    assert (found_SLE & (rows_SLE > 0)).sum() == most_found(wanted, everything, places)


def test_prefetch_finds_what_follows_the_layer_before():
    """Layer 1 follows layer 0 exactly, layer 0 is random: with two places, prefetch finds all once it has seen all."""
    first_T = np.random.default_rng(0).integers(0, 6, 200)
    trace = RoutingTrace(np.stack([first_T, (first_T + 1) % 6], 1)[:, :, None].astype(np.int16), 6)
    rows_SLE = rows_by_step(trace, 1)
    start_LE = np.arange(12).reshape(2, 6) < 2
    found_SLE, came_SL = found_by_step("prefetch", rows_SLE, start_LE, ahead=1)
    late = slice(60, None)
    assert (found_SLE & (rows_SLE > 0))[late, 1].sum() == 140
    assert (found_SLE & (rows_SLE > 0))[late, 0].sum() < 60, "nothing is known ahead of the first layer"
    changed = (np.diff(first_T[late.start - 1 :]) != 0).sum()
    assert came_SL[late, 1].sum() == changed  # what is there already does not come again


def test_misses_end_soonest():
    host = HostRates(50e9, 30e9)
    for count in range(7):
        size = count * 1e8
        least = min(max(n * 1e8 / 50e9, (count - n) * 1e8 / 30e9) for n in range(count + 1))
        over_bus, seconds = share_misses(np.array([count]), np.array([size]), host)
        assert seconds[0] == pytest.approx(least)
        assert max(over_bus[0] / 50e9, (size - over_bus[0]) / 30e9) == pytest.approx(least)


def test_a_step_takes_what_its_parts_do():
    """One layer: attention, router and head; the GPU's experts beside the missing ones; and the bound."""
    shape = ModelShape.of(MIXTRAL)
    machine = Hardware.load(shipped("hardware", "h200x2"))
    model = FusedTimeModel(shape, machine)
    plan = contiguous(1, 8, 1)
    plan = type(plan)(plan.slots_LWS, 8, tier=[["gpu"] * 4 + ["host"] * 4])
    trace = RoutingTrace(np.array([[[0, 4]], [[1, 2]], [[6, 7]]], np.int16), 8)
    found = simulate_tiers(plan, trace, model, USUAL_HOST, rules=("static",))["static"]
    assert found.hit_rate == pytest.approx(0.5)
    size = shape.expert_bytes
    assert found.missing_bytes == pytest.approx(size)
    waits = [size / 57e9, 0.0, size / 55e9]  # the second of two missing experts comes over the bus
    one_s, two_s = (float(model.experts_start_s(1.0) + n * model.expert_s(1)) for n in (1, 2))
    one = np.array([1.0])
    around = float(model.attention_s(one, 0)[0] + model.gate_s(one)[0]) + machine.sync_s
    ends = float(model.head_s(one)[0]) + model.between_steps_s()
    expected = (max(one_s, waits[0]) + max(two_s, waits[1]) + waits[2]) / 3 + around + ends
    assert found.step_s == pytest.approx(expected)
    halves = sum(np.maximum([one_s, two_s, 0.0], [n * size / 112e9 for n in (1, 0, 2)])) / 3 + around + ends
    assert found.split_step_s == pytest.approx(halves)
    assert found.bus_bytes == pytest.approx(size / 3)
    assert found.cpu_s == pytest.approx(2 * size / 57e9 / 3)
    assert found.bound_s == pytest.approx(size / 112e9)


@pytest.mark.parametrize(("world", "precision"), [(1, None), (2, None), (1, [["int8"] * 4 + ["int4"] * 4] * 32)])
def test_the_policy_fills_the_gpu_with_what_is_asked_for_most(world, precision):
    loads_LE = np.random.default_rng(0).random((32, 8))
    plan = contiguous(32, 8, world) if world == 1 else everywhere(32, 8, world)
    plan = type(plan)(plan.slots_LWS, 8, precision=precision)
    room = Room(1, 2048, 2048)
    made = tiers(plan, loads_LE, GpuBudget(30.0, MIXTRAL, room))
    parallel = ParallelConfig("dp", "ep")
    memory, left = rank_memory(MIXTRAL, parallel, made, room), room_for_experts(MIXTRAL, parallel, plan, room, 30.0)
    size_LE = ModelShape.of(MIXTRAL).expert_bytes_LE(made)
    held = float(ModelShape.of(MIXTRAL).rank_bytes(made)[0].max()) / 1e9
    assert held <= left.left <= held + size_LE.max() / 1e9, "no expert more would fit"
    assert memory.total + RESERVE_GB <= left.taken + held <= 30.0
    assert memory.host == pytest.approx((size_LE * made.on_host_LE).sum() / 1e9)
    share_LE = loads_LE / loads_LE.sum(1, keepdims=True)
    if precision is None:
        assert share_LE[~made.on_host_LE].min() >= share_LE[made.on_host_LE].max()
    assert tiers(plan, loads_LE, GpuBudget(400.0, MIXTRAL, room)).tier is None
    with pytest.raises(ValueError, match=r"gpu_memory_gb \(2\) must be at least .* for all but experts"):
        tiers(plan, loads_LE, GpuBudget(2.0, MIXTRAL, room))


def test_the_command_prints_every_rule(tmp_path, command_line):
    sample_routing(np.random.default_rng(0).dirichlet(np.full(8, 3.0), 32), 80, 2).save(tmp_path / "trace.npz")
    done = command_line(
        "simulate", tmp_path / "trace.npz", "--gpu_memory_gb", 24, "--quantize", "int4:128", "--hardware", "h200x2"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["tiers"]
    assert list(found) == list(RULES)
    assert all(0.2 < one["hit_rate"] < 1 for one in found.values())
    assert found["belady"]["hit_rate"] >= max(found[rule]["hit_rate"] for rule in RULES)
    assert found["belady"]["step_s"] > found["belady"]["bound_s"]
    assert "bus 55 GB/s, CPU 57 GB/s" in done.stdout
    words = (
        "--policy",
        "tiers",
        "--world_size",
        1,
        "--quantize",
        "int4:128",
        "--batch",
        1,
        "--output",
        tmp_path / "p.json",
    )
    done = command_line("plan", tmp_path / "trace.npz", "--gpu_memory_gb", 16, *words)
    assert done.returncode == 0, done.stderr
    assert "of 16 GB " in done.stdout
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tier"]["host"] > 50
    assert figures["memory_gb_per_rank"] + figures["host_memory_gb_per_rank"] == pytest.approx(
        32 * 8 * ModelShape.of(MIXTRAL, weights=parse_weights("int4:128")).expert_bytes / 1e9
    )
    replayed = command_line("simulate", tmp_path / "trace.npz", "--plan", tmp_path / "p.json", "--dispatcher", "local")
    assert "Tiers, per step" in replayed.stdout
    for words, sentence in (
        (("--gpu_memory_gb", 1), "gpu_memory_gb (1) must be at least"),
        (("--gpu_memory_gb", 24, "--tier_rules", "fifo"), "tier_rules ('fifo') must be of static, lru"),
        (
            ("--gpu_memory_gb", 24, "--batch", 100, "--max_seq_len", 64),
            "trace: tokens (40) must be at least the 100 of a step",
        ),
        (("--gpu_memory_gb", 24, "--plan", "contiguous", "everywhere"), "must be one with gpu_memory_gb"),
    ):
        done = command_line("simulate", tmp_path / "trace.npz", *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert sentence in done.stderr
