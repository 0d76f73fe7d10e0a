"""The choice of layout and plan: the least predicted time that fits, the table, and the memory it counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.layout import RankLayout
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.moe.weights import parse_weights
from mixtralkit.ops.all_reduce import ONE_TRIP_ROWS, TWO_TRIP_ROWS, ReducerMemory
from mixtralkit.ops.symmetric_exchange import ExchangeMemory
from mixtralkit.planning.hardware import USUAL_HOST, Hardware
from mixtralkit.planning.memory import Room, rank_memory
from mixtralkit.planning.plan import contiguous
from mixtralkit.planning.policies.inputs import gb_above
from mixtralkit.planning.policies.registry import named_plan
from mixtralkit.planning.search import Situation, candidates, choose, squeezed, table
from mixtralkit.planning.simulate import sample_routing
from tests.configs import small_config

ROOT = Path(__file__).resolve().parents[2]
H200 = Hardware.load(ROOT / "configs" / "hardware" / "h200x4.json")
MIXTRAL = ModelConfig.from_file(ROOT / "configs" / "models" / "mixtral-8x7b.json")
UNIFORM = np.ones((32, 8))


def situation(batch: int = 64, max_seq_len: int = 1024, world_size: int = 4, **changes) -> Situation:
    values = {"config": MIXTRAL, "hardware": H200, "world_size": world_size}
    return Situation(**{**values, "room": Room(batch, max_seq_len, 8192, symmetric_rows=None), **changes})


# --- memory


@pytest.mark.parametrize("parallel", [ParallelConfig(a, e) for a in ("tp", "dp") for e in ("tp", "ep")], ids=str)
@pytest.mark.parametrize("name", ["contiguous", "hot_cold+2", "balanced+3", "everywhere"])
def test_weights_and_cache_are_those_of_the_fullest_rank(parallel, name):
    for config, world in ((MIXTRAL, 4), (small_config(), 2)):
        plan = named_plan(name, np.random.default_rng(0).random((config.n_layers, config.num_experts)), world)
        layouts = [RankLayout(config, parallel, plan, rank) for rank in range(world)]
        weights = max(sum(int(np.prod(shape)) for shape in layout.shapes().values()) for layout in layouts)
        found = rank_memory(config, parallel, plan, Room(6, 100, 50, data_bytes=4, page_size=16))
        assert found.weights == pytest.approx(4 * weights / 1e9)
        sequences = 6 if parallel.attention == "tp" else -(-6 // world)
        kind = (sequences, 100, torch.float32, torch.device("meta"), 16)
        caches = [KVCache.allocate(layout, *kind) for layout in layouts]
        sizes = [sum(x.nbytes for x in (c.keys, c.values, c.tables_SM, c.rope_SC)) for c in caches]
        assert found.cache == pytest.approx(max(sizes) / 1e9)


@pytest.mark.parametrize("name", ["int8", "int4:128:zeros", "fp8:block"])
@pytest.mark.parametrize("experts", ["tp", "ep"])
def test_experts_in_fewer_bits_take_what_their_tensors_do(experts, name):
    config, weights = replace(MIXTRAL, n_layers=2), parse_weights(name)
    parallel, plan = ParallelConfig("tp", experts), contiguous(2, 8, 4)
    layout = RankLayout(config, parallel, plan, 0, weights)
    sizes = {name: part.itemsize(2) for matrix in ("w13", "w2") for name, part in weights.parameters(matrix)}
    held = sum(int(np.prod(s)) * sizes.get(n.rpartition(".")[2], 2) for n, s in layout.shapes().items())
    found = rank_memory(config, parallel, plan, Room(6, 100, 50, weights=weights))
    assert found.weights == pytest.approx(held / 1e9)
    assert found.weights < 0.65 * rank_memory(config, parallel, plan, Room(6, 100, 50)).weights


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("attention", ["tp", "dp"])
def test_attention_in_eight_bits_takes_what_its_tensors_do(attention, name):
    config, parallel, plan = replace(MIXTRAL, n_layers=2), ParallelConfig(attention, "ep"), contiguous(2, 8, 4)
    weights = parse_weights(name, "quantize_attention")
    layout = RankLayout(config, parallel, plan, 0, attention_weights=weights)
    sizes = {part.name: part.itemsize(2) for part in weights.parts}
    held = sum(int(np.prod(s)) * sizes.get(n.rpartition(".")[2], 2) for n, s in layout.shapes().items())
    room = Room(6, 100, 50, attention_weights=weights)
    found, plain = (rank_memory(config, parallel, plan, r) for r in (room, Room(6, 100, 50)))
    assert found.weights == pytest.approx(held / 1e9)
    assert found.working - plain.working == pytest.approx(2 * np.prod(layout.projections["wqkv"]) / 1e9)


def test_a_budget_takes_fewer_bits_where_it_needs_them():
    room = replace(situation().room, weights=parse_weights("int4"))
    plain, packed = (min(c.memory.weights for c in candidates(situation(room=r))) for r in (situation().room, room))
    assert packed < 0.35 * plain


def test_exchange_memory_is_what_the_kernels_take():
    plan = contiguous(32, 8, 4)
    sums = ReducerMemory.places(4, ONE_TRIP_ROWS, TWO_TRIP_ROWS) * 4096 * 2
    assert rank_memory(MIXTRAL, ParallelConfig("tp", "ep"), plan, Room(1, 9, 9)).exchange == sums / 1e9
    rows = 2 * 16 * 4 * 4096 * 2
    words = ExchangeMemory.words_of(4, 16, 2) * 8
    found = rank_memory(MIXTRAL, ParallelConfig("dp", "ep"), plan, Room(64, 9, 9, symmetric_rows=None)).exchange
    assert found == pytest.approx((rows + words) / 1e9, rel=1e-4)
    assert rank_memory(MIXTRAL, ParallelConfig("dp", "ep"), plan, Room(64, 9, 9, symmetric_rows=0)).exchange == 0


@pytest.mark.parametrize(
    ("world", "batch", "prompt", "budget", "held", "peak"),
    [
        (1, 1, 128, 128, 93.557, 93.606),
        (1, 256, 128, 32768, 106.459, 110.329),
        (1, 8, 2048, 16384, 95.724, 97.952),
        (4, 256, 128, 32768, 26.94, 29.38),
    ],
)
def test_memory_is_near_what_the_gpus_had(world, batch, prompt, budget, held, peak):
    """benchmarks/results/model-h200.json and model-tp4-h200x4.json, GB of the fullest rank."""
    length = prompt + (256 if prompt == 128 else 1)
    parallel = ParallelConfig("tp", "tp")
    found = rank_memory(MIXTRAL, parallel, contiguous(32, 8, world), Room(batch, length, budget))
    assert found.total - found.working == pytest.approx(held, rel=0.02)
    assert found.total == pytest.approx(peak, rel=0.03)


# --- the choice


@pytest.mark.parametrize(("batch", "memory_gb"), [(1, None), (8, 80.0), (256, 40.0), (512, 80.0)])
def test_the_fastest_that_fits(batch, memory_gb):
    found = candidates(situation(batch))
    chosen = choose(found, memory_gb)
    fitting = [one for one in found if memory_gb is None or one.memory.total <= memory_gb]
    assert chosen in fitting
    alike = [one for one in fitting if one.step_ms <= 1.01 * min(other.step_ms for other in fitting)]
    assert chosen.memory.total == min(one.memory.total for one in alike)
    text = table(found, chosen, memory_gb)
    assert len(text.splitlines()) == len(found) + 2
    assert text.count("  chosen") == 1
    assert text.count("too large") == len(found) - len(fitting)
    rows = [float(line.split()[3]) for line in text.splitlines()[1:-1]]
    assert rows == sorted(rows)


def test_a_budget_changes_the_choice():
    """Of 1024 sequences a rank's own ones need no sums, but attention's weights are on every rank."""
    found = candidates(situation(1024, 2048))
    fast = choose(found, None)
    other = choose(found, fast.memory.total - 0.01)
    assert (fast.parallel.attention, other.parallel.attention) == ("dp", "tp")
    assert other.step_ms > fast.step_ms


def test_where_nothing_fits_the_error_says_what_the_smallest_needs():
    found = candidates(situation(256))
    least = min(one.memory.total for one in found)
    with pytest.raises(ValueError, match=rf"memory_gb \(20\) must be at least {gb_above(least, 20)} a rank") as caught:
        choose(found, 20)
    assert "keys and values" in str(caught.value)


def test_what_is_asked_for_is_kept():
    only = candidates(situation(attention="dp", experts="ep"))
    assert {(one.parallel.attention, one.parallel.experts, one.dispatcher) for one in only} == {
        ("dp", "ep", "symmetric")
    }
    assert "everywhere" in {one.name for one in only}
    assert [one.name for one in candidates(situation(world_size=1))] == ["split"]
    with pytest.raises(ValueError, match="no layout"):
        choose(candidates(situation(attention="dp", experts="tp")), None)


def test_without_symmetric_memory_decode_takes_static_shapes_and_is_slower():
    room = Room(64, 1024, 8192, symmetric_rows=0)
    plain = candidates(situation(attention="dp", room=room))
    graph = candidates(situation(attention="dp"))
    assert {one.dispatcher for one in plain} == {"static"}
    # collectives and small kernels of torch, in a graph as well: over two H200s a layer took up to 1.24 times as long
    assert all(slow.step_ms > 1.2 * fast.step_ms for slow, fast in zip(plain, graph, strict=True))


def test_a_trace_is_planned_by():
    """Half of all choices are expert 0's: a copy of it on every rank pays with many sequences."""
    loads = np.tile([7.0, *[1.0] * 7], (32, 1))
    trace = sample_routing(loads, 4096, 2)
    found = {one.name: one.step_ms for one in candidates(situation(2048, 256, attention="dp", trace=trace))}
    assert found["hot_cold+1"] < found["contiguous"]
    wrong = replace(MIXTRAL, n_layers=4)
    with pytest.raises(ValueError, match=r"trace: layers \(32\) must be 4"):
        situation(config=wrong, trace=trace)


# --- one GPU that is too small


def one_gpu(**changes) -> Situation:
    room = Room(1, 2048, 2048, symmetric_rows=0)
    return situation(**{"world_size": 1, "room": room, "may_round": True, "host": USUAL_HOST, **changes})


@pytest.mark.parametrize(
    ("memory_gb", "name", "tiers"), [(60.0, "bits", False), (31.0, "bits", False), (23.3, "tiers", True)]
)
def test_fewer_bits_come_before_other_memory(memory_gb, name, tiers):
    assert not any(one.fits(memory_gb) for one in candidates(one_gpu()))
    found = squeezed(one_gpu(), memory_gb)
    first = next(one for one in found if one.fits(memory_gb))
    assert first.name.startswith(name)
    assert (first.plan.tier is not None) == tiers
    assert memory_gb - first.memory.total < 0.7, "what is there is used"
    assert {"int8", "int4:128"} <= {one.name for one in found}
    whole = {one.name: one for one in found}
    if name == "bits":
        assert first.memory.host == 0
        assert whole["int4:128"].memory.total < first.memory.total
        assert set(first.plan.counts()["precision"]) <= {"plain", "int8", "int4:32", "int4:64", "int4:128"}
    else:
        assert not any(one.fits(memory_gb) for one in found if one.plan.tier is None)
        assert first.plan.counts()["precision"] == {"int4:128": 256}
        assert first.step_s > whole["int4:128"].step_s, "misses cost"


def test_what_is_chosen_more_often_stays_and_keeps_its_bits():
    trace = sample_routing(np.tile([9.0, *[1.0] * 7], (32, 1)), 2048, 2)
    kept = squeezed(one_gpu(trace=trace), 34.0)[0].plan
    size = {"plain": 16, "int8": 8, "int4:32": 4.5, "int4:64": 4.25, "int4:128": 4.125}
    assert min(size[row[0]] for row in kept.precision) > max(size[word] for row in kept.precision for word in row[1:])
    behind = next(one for one in squeezed(one_gpu(trace=trace), 15.0) if one.plan.tier is not None)
    assert not behind.plan.on_host_LE[:, 0].any()


def test_a_format_that_is_said_is_kept():
    room = replace(one_gpu().room, weights=parse_weights("int8"))
    found = squeezed(one_gpu(room=room, may_round=False), 40.0)
    assert [one.name for one in found] == ["tiers int8"]
    assert found[0].plan.precision is None
    assert found[0].fits(40.0)
    assert squeezed(one_gpu(room=room, may_round=False, host=None), 40.0) == []


# --- plans by name


@pytest.mark.parametrize("world", [2, 3, 4])
def test_named_plans(world):
    loads = np.random.default_rng(1).random((5, 8)) + 0.1
    assert named_plan("hot_cold", loads, world).holds_LWE.all(1).sum(1).tolist() == [1] * 5
    for extra in (0, 1, 2, 4, 8):
        plan = named_plan(f"balanced+{extra}", loads, world)
        held = plan.holds_LWE.sum((1, 2))
        assert held.tolist() == [8 + extra] * 5
        assert plan.meta["name"] == f"balanced+{extra}"
        spread = plan.holds_LWE.sum(2)
        assert spread.max() - spread.min() <= 2
    assert named_plan("everywhere", loads, world).holds_LWE.all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ballanced+2", "must be one of contiguous, hot_cold"),
        ("balanced+9", r"9 extra slots must be at most 8"),
        ("hot_cold+9", r"hot_experts \(9\) must lie in"),
    ],
)
def test_names_that_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        named_plan(name, UNIFORM, 2)
