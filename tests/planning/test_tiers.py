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
from mixtralkit.planning.memory import Room, rank_memory
from mixtralkit.planning.plan import contiguous, everywhere
from mixtralkit.planning.policies.tiers import GpuBudget, tiers
from mixtralkit.planning.simulate import sample_routing
from mixtralkit.planning.tiers import found_by_step, rows_by_step, share_misses, simulate_tiers
from mixtralkit.planning.trace import RoutingTrace

MIXTRAL = ModelConfig.from_file(shipped("models", "mixtral-8x7b"))
SEEDS = st.integers(0, 100_000)


def drawn(seed: int, layers: int = 3, experts: int = 6, steps: int = 14, batch: int = 1):
    rng = np.random.default_rng(seed)
    rows_SLE = rows_by_step(
        sample_routing(rng.dirichlet(np.ones(experts), layers) + 0.01, steps * batch, 2, seed), batch
    )
    places_L = rng.integers(0, experts, layers)
    return rows_SLE, places_L, rng.random((layers, experts)) < 0.5


def by_the_book(rule, rows_SE, places, start, decay):
    """Hits of each step: a list of residents, the last used (or most used) kept, lower ids first among equals."""
    experts = rows_SE.shape[1]
    cache = [e for e in range(experts) if start[e]][:places]
    score = dict.fromkeys(range(experts), -1.0 if rule == "lru" else 0.0)
    found = []
    for step, rows_E in enumerate(rows_SE):
        wanted = [e for e in range(experts) if rows_E[e]]
        found.append(sorted(set(cache)))
        for e in range(experts):
            if rule == "lru":
                score[e] = step if e in wanted else score[e]
            else:
                score[e] = decay * score[e] + (e in wanted)
        cache = sorted(set(cache) | set(wanted), key=lambda e: (-score[e], e))[:places]
    return found


@pytest.mark.parametrize("rule", ["lru", "lfu"])
@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_rules_by_the_book(rule, seed, batch):
    rows_SLE, places_L, start_LE = drawn(seed, batch=batch)
    found_SLE, came_SL = found_by_step(rule, rows_SLE, places_L, start_LE, decay=0.8)
    assert not came_SL.any()
    for layer in range(3):
        book = by_the_book(rule, rows_SLE[:, layer], places_L[layer], start_LE[layer], 0.8)
        assert [np.flatnonzero(found_E).tolist() for found_E in found_SLE[:, layer]] == book


def most_hits(wanted, experts, places):
    """Of all that can be kept from step to step, whatever is there at first: the most that are ever found."""
    states = {frozenset(c): 0 for n in range(places + 1) for c in itertools.combinations(range(experts), n)}
    for now in wanted:
        after: dict[frozenset, int] = {}
        for state, hits in states.items():
            total = hits + len(state & now)
            for n in range(places + 1):
                for kept in itertools.combinations(sorted(state | now), n):
                    key = frozenset(kept)
                    after[key] = max(after.get(key, -1), total)
        states = after
    return max(states.values())


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_nothing_finds_more_than_belady(seed, places):
    rows_SLE, _, start_LE = drawn(seed, layers=1, experts=5, steps=9)
    found_SLE, _ = found_by_step("belady", rows_SLE, np.array([places]), start_LE)
    wanted = [frozenset(np.flatnonzero(rows_E).tolist()) for rows_E in rows_SLE[:, 0]]
    assert (found_SLE & (rows_SLE > 0)).sum() == most_hits(wanted, 5, places)
    assert (found_SLE.sum(2) <= places).all()


def test_prefetch_finds_what_follows_the_layer_before():
    """Layer 1 follows layer 0 exactly, layer 0 is random: with one place, prefetch finds all once it has seen all."""
    first_T = np.random.default_rng(0).integers(0, 6, 200)
    trace = RoutingTrace(np.stack([first_T, (first_T + 1) % 6], 1)[:, :, None].astype(np.int16), 6)
    rows_SLE, ones = rows_by_step(trace, 1), np.ones(2, int)
    start_LE = np.zeros((2, 6), bool)
    found_SLE, came_SL = found_by_step("prefetch", rows_SLE, ones, start_LE, ahead=1)
    late = slice(60, None)
    assert (found_SLE & (rows_SLE > 0))[late, 1].sum() == 140
    lru_SLE, _ = found_by_step("lru", rows_SLE, ones, start_LE)
    assert (found_SLE[:, 0] == lru_SLE[:, 0]).all(), "nothing is known ahead of the first layer"
    changed = (np.diff(first_T[late.start - 1 :]) != 0).sum()
    assert came_SL[late, 1].sum() == changed  # what is there already does not come again
    assert (found_SLE.sum(2) <= 1).all()


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
    memory = rank_memory(MIXTRAL, ParallelConfig("dp", "ep"), made, room)
    size_LE = ModelShape.of(MIXTRAL).expert_bytes_LE(made)
    assert memory.total + made.meta["transit_gb"] <= 30.0
    assert 30.0 - memory.total - made.meta["transit_gb"] <= size_LE.max() / 1e9, "no expert more would fit"
    assert memory.host == pytest.approx((size_LE * made.on_host_LE).sum() / 1e9)
    share_LE = loads_LE / loads_LE.sum(1, keepdims=True)
    if precision is None:
        assert share_LE[~made.on_host_LE].min() >= share_LE[made.on_host_LE].max()
    assert tiers(plan, loads_LE, GpuBudget(400.0, MIXTRAL, room)).tier is None
    with pytest.raises(ValueError, match=r"gpu_memory_gb \(2\) must be at least .*, which is taken without any expert"):
        tiers(plan, loads_LE, GpuBudget(2.0, MIXTRAL, room))


def test_the_command_prints_every_rule(tmp_path, command_line):
    sample_routing(np.random.default_rng(0).dirichlet(np.full(8, 3.0), 32), 80, 2).save(tmp_path / "trace.npz")
    done = command_line(
        "simulate", tmp_path / "trace.npz", "--gpu_memory_gb", 24, "--quantize", "int4:128", "--hardware", "h200x2"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["tiers"]
    assert list(found) == ["static", "lru", "lfu", "prefetch", "belady"]
    assert all(0.3 < one["hit_rate"] < 1 for one in found.values())
    assert found["belady"]["hit_rate"] >= max(found[rule]["hit_rate"] for rule in ("static", "lru", "lfu"))
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
