"""The time model of fused kernels: its formulas by hand, rows through memory, and what a hardware file must have."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mixtralkit.moe.weights import PLAIN, parse_weights
from mixtralkit.ops import all_reduce, symmetric_exchange
from mixtralkit.planning.cost import KernelCounts, ModelShape
from mixtralkit.planning.fused_cost import MOST_RANKS, FusedTimeModel
from mixtralkit.planning.hardware import FusedKernels, Hardware, nearest
from mixtralkit.planning.plan import contiguous, everywhere
from mixtralkit.planning.policies.registry import named_plan
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.replicas import TURNS, ReplicaTable
from mixtralkit.planning.simulate import sample_routing, simulate
from mixtralkit.planning.trace import RoutingTrace
from tests.configs import small_config
from tests.planning.machines import machine

SHAPE = ModelShape(dim=1000, hidden=2000, num_experts=8, top_k=2, heads=10, kv_heads=2, head_dim=100, vocab=5000)
FUSED = FusedKernels(
    memory_bandwidth=2e12, small_s=1e-6, step_s=5e-6,
    linear=((1, 2e-6, 1e12), (101, 4e-6, 1e14)), experts=((1, 3e-6, 1e12), (101, 9e-6, 5e13)),
    attention_bandwidth=5e11, attention_flops=1e13,
    members=4, sums=((1e3, 4e-6), (1e6, 2e-5), (2e6, 3e-5)), exchange=((1e3, 1e-5), (1e6, 5e-5), (3e6, 9e-5)),
)  # fmt: skip


def _hardware(**changes) -> Hardware:
    return replace(machine(across=True), fused=replace(FUSED, **changes))


def _model(world_size: int = 4, ranks_per_node: int | None = None, **changes) -> FusedTimeModel:
    return FusedTimeModel(SHAPE, _hardware(**changes), world_size, ranks_per_node)


def test_a_product_has_a_fixed_price_and_one_for_its_weights():
    """Between points both are on a line over the rows; before the first they stay, after the last the rate does."""
    model = _model()
    assert model.product_s(1, 1e6) == pytest.approx(2e-6 + 2e6 / 1e12)
    assert model.product_s(51, 1e6) == pytest.approx(3e-6 + (2 / 1e12 + 202 / 1e14) / 2 * 1e6)
    assert model.product_s(0.5, 1e6) == model.product_s(1, 1e6)
    assert model.product_s(202, 1e6) == pytest.approx(4e-6 + 2 * 202e6 / 1e14)
    assert model.product_s(0, 1e6) == 0
    rows = np.arange(1, 1000, 7)
    assert (np.diff(model.product_s(rows, 1e6)) >= 0).all()


def test_experts_in_fewer_bits_save_what_is_not_read():
    models = [
        FusedTimeModel(replace(SHAPE, weights=weights), _hardware()) for weights in (PLAIN, parse_weights("int8"))
    ]
    saved = (models[0].shape.expert_bytes - models[1].shape.expert_bytes) / 2e12
    for rows in (1, 101):
        plain, packed = (float(model.expert_s(rows)) for model in models)
        assert packed == pytest.approx(plain - saved)
    quick = FusedTimeModel(models[1].shape, _hardware(experts=((1, 0.0, 1e14), (101, 0.0, 1e14))))
    assert float(quick.expert_s(1)) == pytest.approx(2 * 3 * 1000 * 2000 / 1e14)  # as measured, not below nothing
    assert models[1].expert_s(0) == 0


def test_attention_in_eight_bits_saves_what_is_not_read():
    plain, packed = (
        FusedTimeModel(replace(SHAPE, attention_weights=weights), _hardware())
        for weights in (PLAIN, parse_weights("fp8"))
    )
    for part, weights in (("head_s", SHAPE.dim * SHAPE.vocab), ("attention_s", SHAPE.dim * 100 * (10 + 4 + 10))):
        more = () if part == "head_s" else (4999,)
        saved = getattr(plain, part)(np.array([1]), *more) - getattr(packed, part)(np.array([1]), *more)
        assert saved[0] == pytest.approx((2 * weights - packed.shape.projection_bytes(weights)) / 2e12)
    assert packed.shape.projection_bytes(1e6) == pytest.approx(1e6 * (1 + 4 / SHAPE.dim))


def test_experts_share_one_fixed_price():
    """By the rows of the mean expert that has any, as it was measured: sorting and copies are of all rows."""
    rows_WE = np.array([[101, 0, 1], [0, 0, 0]])
    weights = 3 * 1000 * 2000
    seconds = 6e-6 + weights * (2 * 101 / 5e13 + 2 / 1e12)
    np.testing.assert_allclose(_model().experts_s(rows_WE), [seconds, 0])
    halves = 6e-6 + weights / 2 * (2 * 101 / 5e13 + 2 / 1e12)
    np.testing.assert_allclose(_model().experts_s(rows_WE, split=2)[0], halves)


def test_weights_of_other_bytes_take_other_time():
    wide = FusedTimeModel(replace(SHAPE, data_bytes=4), _hardware())
    assert wide.product_s(1, 1e6) == pytest.approx(2e-6 + 2 * 2e6 / 1e12)


def test_attention_is_two_products_and_reading_the_cache():
    model, tokens = _model(), np.array([4])
    products = model.product_s(4, 1000 * 100 * (10 + 4)) + model.product_s(4, 1000 * 1000)
    cache = 4 * 5000 * 2 * 2 * 100 * 2
    assert model.attention_s(tokens, 4999)[0] == pytest.approx(float(products) + 1e-6 + cache / 5e11)
    prompt = (
        model.attention_s(np.array([512]), 0, span=512)[0] - model.product_s(512, 1.4e6) - model.product_s(512, 1e6)
    )
    assert prompt == pytest.approx(1e-6 + 4 * 512 * (513 / 2) * 1000 / 1e13)


def test_sums_over_the_ranks():
    assert _model(4).all_reduce_s(1e6) == pytest.approx(2e-5)
    assert _model(4).all_reduce_s(4e6) == pytest.approx(5e-5), "beyond the last at the pace of the last two"
    assert _model(4).all_reduce_s(10) == pytest.approx(4e-6)
    assert _model(2).all_reduce_s(1.5e6) == pytest.approx(2e-5), "2·(W-1)/W of the bytes leave each rank"
    assert _model(1).all_reduce_s(1e6) == 0
    assert _model(8, 4).all_reduce_s(8e6) > 1e-3, "across nodes by the collectives"
    assert _model(4, sums=None).all_reduce_s(8e6) == pytest.approx(2 * 3 / 4 * 8e6 / 1e10 + 1e-5)


def test_rows_through_memory_go_once_to_each_rank():
    """A row a rank: rank 0's stays, rank 1's goes to rank 2 as well, rank 2's to rank 0 once for two choices."""
    choices = [[[0, 1]], [[2, 5]], [[0, 1]], [[2, 3]]]
    trace = RoutingTrace(np.array(choices, np.int16), 8)
    plan, execution = contiguous(1, 8, 4), Execution("symmetric")
    found = simulate(plan, trace, replace(SHAPE, num_experts=8), _hardware(), execution)
    row = SHAPE.row_bytes
    home_T = np.arange(4)
    wanted_WW = np.zeros((4, 4))
    for row_T, ranks in zip(home_T, ([0], [1, 2], [0], [1]), strict=True):
        for rank in ranks:
            if rank != row_T:
                wanted_WW[row_T, rank] += row
                wanted_WW[rank, row_T] += row
    np.testing.assert_allclose(found.links_WW, wanted_WW)
    assert found.phases_LP[0, 2] + found.phases_LP[0, 4] == pytest.approx(
        float(_model().symmetric_exchange_s(np.array([0, row, row, row]), np.array([row, row, row, 0])))
    )


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", ["contiguous", "hot_cold+1", "balanced+3", "everywhere"])
def test_choices_are_computed_where_a_decode_step_computes_them(name, few):
    """Against the rules of replicas.py one choice at a time, for steps of 28 rows over 4 ranks, 7 of each where each
    has its own; which holder an expert keeps in small batches is the table's."""
    config = small_config()
    plan = named_plan(name, np.random.default_rng(3).random((config.n_layers, 8)), 4)
    trace = sample_routing(np.ones((config.n_layers, 8)), 56, 2)
    shape = ModelShape.of(config)
    how = {"small_choices": 64 * few}
    split = simulate(plan, trace, shape, _hardware(), Execution("replicated", 7, **how))
    own = simulate(plan, trace, shape, _hardware(), Execution("symmetric", 7, **how))

    def computes(layer: int, expert: int, row: int, sender: int | None) -> int:
        holders = np.flatnonzero(plan.holds_LWE[layer, :, expert]).tolist()
        if few:
            kept = int(ReplicaTable.of(plan, layer).small_E[expert])
            assert kept in holders
            return kept
        if sender is None:
            return holders[row % TURNS % len(holders)]
        return sender if sender in holders else holders[(row % TURNS + sender) % len(holders)]

    wanted_split, wanted_own = np.zeros((2, config.n_layers, 4))
    for layer in range(config.n_layers):
        for token, chosen in enumerate(trace.experts[:, layer].tolist()):
            row = token % 28
            for expert in chosen:
                wanted_split[layer, computes(layer, expert, row, None)] += 1
                wanted_own[layer, computes(layer, expert, row % 7, row // 7)] += 1
    np.testing.assert_array_equal(split.rows_LW, wanted_split)
    np.testing.assert_array_equal(own.rows_LW, wanted_own)


def test_a_plan_that_holds_all_experts_everywhere_sends_nothing():
    trace = sample_routing(np.ones((2, 8)), 64, 2)
    found = simulate(everywhere(2, 8, 4), trace, SHAPE, _hardware(), Execution("symmetric", small_choices=0))
    assert found.links_WW.sum() == 0
    assert found.rows_LW.sum() == 2 * 64 * 2


def test_each_step_has_a_pause_and_a_head():
    trace = sample_routing(np.ones((1, 8)), 8, 2)
    one = simulate(contiguous(1, 8, 1), trace, SHAPE, _hardware(), Execution("split_width", 8))
    assert one.ends_s == pytest.approx(5e-6 + 4e-6 + float(_model(1).product_s(8, 1000 * 5000)))


def test_replicas_cost_reading_where_few_rows_make_reading_all():
    """Unless one holder of each expert computes it."""
    trace = sample_routing(np.ones((1, 8)), 16, 2)
    plans = [named_plan(name, np.ones((1, 8)), 4) for name in ("contiguous", "everywhere")]
    turns, one = (
        [simulate(plan, trace, SHAPE, _hardware(), Execution("symmetric", small_choices=few)) for plan in plans]
        for few in (0, 64)
    )
    assert turns[0].step_s < turns[1].step_s
    assert one[0].step_s == one[1].step_s == turns[0].step_s


@pytest.mark.parametrize(("dispatcher", "world"), [("local", 1), ("split_width", 4), ("replicated", 4), ("exact", 4)])
def test_of_prompts_the_last_layer_passes_on_their_last_rows(dispatcher, world):
    """8 prompts of 16 tokens in two layers: the second's attention reads all rows, what follows has 8."""
    trace = sample_routing(np.ones((2, 8)), 128, 2)
    plan = contiguous(2, 8, world)
    found = simulate(plan, trace, SHAPE, _hardware(), Execution(dispatcher, span=16))
    assert found.rows_LW.sum(1).tolist() == [256, 16]
    assert (found.phases_LP[1] <= found.phases_LP[0]).all()
    assert found.phases_LP[1, 3] < found.phases_LP[0, 3]
    alone = simulate(plan, trace.take(np.arange(15, 128, 16)), SHAPE, _hardware(), Execution(dispatcher))
    assert found.ends_s == pytest.approx(alone.ends_s)
    np.testing.assert_allclose(found.phases_LP[1, 1:], alone.phases_LP[1, 1:])
    np.testing.assert_array_equal(found.rows_LW[1], alone.rows_LW[1])


def test_rows_of_an_expert_with_a_capacity_all_go_on():
    trace = sample_routing(np.ones((2, 8)), 128, 2)
    plan = replace(contiguous(2, 8, 4), cold_capacity_factor=1.0)
    found = simulate(plan, trace, SHAPE, _hardware(), Execution("exact", span=16))
    assert (found.rows_LW.sum(1) > 200).all()


def test_between_counted_rows_the_host_is_at_least_as_long_as_its_launches():
    """Where rows are few the host decides, where they are many the device."""
    kernels, hardware = KernelCounts(), _hardware(experts=((1, 3e-6, 1e14),))
    few, many = (
        simulate(contiguous(1, 8, 4), sample_routing(np.ones((1, 8)), rows, 2), SHAPE, hardware, Execution())
        for rows in (8, 200_000)
    )
    assert few.phases_LP[0, 1] == pytest.approx(kernels.gate * hardware.launch_s)
    assert few.phases_LP[0, 3] == pytest.approx(kernels.experts * hardware.launch_s)
    assert many.phases_LP[0, 3] > 10 * kernels.experts * hardware.launch_s


def test_the_machine_measured_among_the_nearest_number_of_ranks():
    two, four = (replace(_hardware(members=members), name=str(members)) for members in (2, 4))
    one = replace(_hardware(members=None, sums=None, exchange=None), name="None")
    for ranks, name in ((1, "None"), (2, "2"), (3, "2"), (4, "4"), (8, "4")):
        assert nearest([one, two, four], ranks).name == name


def test_what_must_be_known():
    with pytest.raises(ValueError, match=r"fused of hardware test \(null\) must be given"):
        FusedTimeModel(SHAPE, machine(), 4)
    trace = sample_routing(np.ones((1, 8)), 8, 2)
    with pytest.raises(ValueError, match=r"fused.exchange of hardware test \(null\)"):
        simulate(contiguous(1, 8, 4), trace, SHAPE, _hardware(exchange=None), Execution("symmetric"))
    for world_size, per_node in ((8, 4), (16, None)):
        with pytest.raises(ValueError, match="all ranks on one node, at most 8"):
            _model(world_size, per_node).symmetric_exchange_s(np.ones(world_size), np.ones(world_size))


def test_as_many_ranks_as_the_kernels_take():
    assert MOST_RANKS == all_reduce.MOST_RANKS == symmetric_exchange.MOST_RANKS


def test_saved_and_loaded_is_the_same(tmp_path):
    hardware = replace(_hardware(), gpu="NVIDIA H200")
    hardware.save(tmp_path / "it.json")
    assert Hardware.load(tmp_path / "it.json") == hardware
    alone = replace(hardware, fused=replace(FUSED, members=None, sums=None, exchange=None))
    alone.save(tmp_path / "it.json")
    assert Hardware.load(tmp_path / "it.json") == alone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"linear": []}, "fused: linear must have at least one triple"),
        ({"linear": [[1, 2]]}, r"fused.linear\[0\] \(\[1, 2\]\) must be a list of 3"),
        ({"experts": [[4, 0, 1e9], [2, 0, 1e9]]}, r"fused: experts: rows \(4, 2\) must rise"),
        ({"sums": [[1, -1]]}, r"fused: sums: seconds \(-1.0\) must be a number of at least 0"),
        ({"members": 1}, r"fused: members \(1\) must be a whole number of at least 2"),
        ({"small_s": None}, r"fused.small_s \(None\) must be a number"),
        ({"speed": 1}, "fused has unknown 'speed'"),
    ],
)
def test_bad_figures_are_named(tmp_path, change, words):
    content = _hardware().to_dict()
    content["fused"] |= change
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"bad\.json: .*{words}"):
        Hardware.load(tmp_path / "bad.json")
