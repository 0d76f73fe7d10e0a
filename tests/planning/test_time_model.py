"""The time model's formulas by hand on a machine of round figures, and its predictions for other systems' layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixtralkit.moe.weights import PLAIN, parse_weights
from mixtralkit.planning.cost import KernelCounts, ModelShape, ShadowModel, TimeModel
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import contiguous
from mixtralkit.planning.policies.registry import named_plan
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import sample_routing, simulate
from tests.configs import small_config
from tests.planning.machines import machine

SHAPE = ModelShape(dim=1000, hidden=2000, num_experts=8, top_k=2, heads=10, kv_heads=2, head_dim=100, vocab=5000)
FREE = KernelCounts(0, 0, 0, 0, 0, 0)


def _model(world_size: int = 4, ranks_per_node: int | None = None, **changes) -> TimeModel:
    return TimeModel(SHAPE, machine(across=True, **changes), world_size, ranks_per_node, FREE)


def test_few_rows_take_as_long_as_reading_the_weights_and_many_as_their_arithmetic():
    model = _model(memory_bandwidth=1e11)
    weights = 3 * 1000 * 2000
    assert model.product_s(1, weights) == pytest.approx(weights * 2 / 1e11)
    assert model.product_s(0, weights) == 0
    assert model.product_s(1000, weights) == pytest.approx(2 * weights * 1000 / 1e14)
    rows = np.arange(0, 3000, 7)
    assert (np.diff(model.product_s(rows, weights)) >= -1e-12).all(), "more rows never take less time"


def test_an_expert_is_its_products_and_the_copies_of_its_rows():
    copies = 300 * (4 * 1000 + 6 * 2000) * 2 / 1e12
    assert _model().expert_s(300) == pytest.approx(6 * 1000 * 2000 * 300 / 1e14 + copies)
    half = 6 * 1000 * 1000 * 300 / 1e14 + 300 * (4 * 1000 + 6 * 1000) * 2 / 1e12
    assert _model().expert_s(300, split=2) == pytest.approx(half)
    assert _model().expert_s(0) == 0


def test_experts_in_fewer_bits_are_read_sooner_and_move_sooner():
    packed = ModelShape.of(small_config(dim=1024, hidden_dim=2048), 2, parse_weights("int4:128"))
    plain = replace(packed, weights=PLAIN)
    size = 3 * 1024 * 2048
    assert (plain.expert_bytes, packed.expert_bytes) == (2 * size, size * (4 + 16 / 128) / 8)
    slow = machine(across=True, memory_bandwidth=1e11)
    models = [TimeModel(shape, slow, 4, None, FREE) for shape in (plain, packed)]
    one, many = ([model.expert_s(rows) for model in models] for rows in (1, 100_000))
    assert one[0] - one[1] == pytest.approx((plain.expert_bytes - packed.expert_bytes) / 1e11)
    assert many[0] == many[1]  # arithmetic is the same
    shadows = [ShadowModel.from_hardware(shape, machine()) for shape in (plain, packed)]
    assert shadows[0].s_per_row == shadows[1].s_per_row
    assert shadows[1].s_per_shadow == pytest.approx(shadows[0].s_per_shadow * 4.125 / 16)


def test_attention_in_eight_bits_is_read_sooner():
    plain = ModelShape.of(small_config(dim=1024, hidden_dim=2048))
    packed, slow = replace(plain, attention_weights=parse_weights("int8")), machine(memory_bandwidth=1e9)
    seconds = [TimeModel(shape, slow, 1, None, FREE).head_s(np.array([1]))[0] for shape in (plain, packed)]
    assert seconds[0] / seconds[1] == pytest.approx(2 / (1 + 4 / 1024))


def test_formats_of_a_plan_cost_what_a_run_in_one_format_does():
    """All experts in one format by the plan, on one rank and on several, and a mixture between both."""
    shape, trace = replace(ModelShape.of(small_config()), num_experts=4), sample_routing(np.ones((2, 4)), 64, 2)
    slow = replace(machine(), memory_bandwidth=1e9)  # so that reading weights is what takes time
    for world, kind in ((1, "local"), (2, "exact"), (2, "split_width")):
        plan, run = contiguous(2, 4, world), Execution(kind, batch=4)
        plain, packed = (
            simulate(plan, trace, replace(shape, weights=weights), slow, run)
            for weights in (PLAIN, parse_weights("int8"))
        )
        said = simulate(replace(plan, precision=[["int8"] * 4] * 2), trace, shape, slow, run)
        some = simulate(replace(plan, precision=[["int8"] * 4, [None] * 4]), trace, shape, slow, run)
        np.testing.assert_array_equal(said.phases_LP, packed.phases_LP)
        np.testing.assert_array_equal(some.phases_LP[:1], packed.phases_LP[:1])
        np.testing.assert_array_equal(some.phases_LP[1:], plain.phases_LP[1:])
        assert said.step_s < plain.step_s
        both = [["int8", "int4:32"] * 2] * 2
        less = simulate(replace(plan, precision=both), trace, shape, replace(slow, launch_s=0.0), run)
        more = simulate(replace(plan, precision=both), trace, shape, slow, run)
        start_s = TimeModel(shape, slow, world).experts_start_s(1.0) * said.steps
        assert more.phases_LP[0, 3] - less.phases_LP[0, 3] == pytest.approx(2 * start_s), "the kernels of two formats"


def test_bytes_of_a_rank_are_those_of_its_experts():
    shape, rng = ModelShape.of(small_config()), np.random.default_rng(0)
    names, tiers = ["plain", "int8", "int4:128", None], ["gpu", "host", None]
    plan = replace(
        named_plan("hot_cold+1", np.ones((3, 8)), 2),
        precision=rng.choice(np.array(names, object), (3, 8)).tolist(),
        tier=rng.choice(np.array(tiers, object), (3, 8)).tolist(),
    )
    gpu_W, host_W = np.zeros(2), np.zeros(2)
    for layer in range(3):
        for rank in range(2):
            for expert in plan.experts_of(layer, rank):
                weights = parse_weights(None if plan.precision[layer][expert] in ("plain", None) else
                                        plan.precision[layer][expert])  # fmt: skip
                into = host_W if plan.tier[layer][expert] == "host" else gpu_W
                into[rank] += weights.expert_bytes(shape.dim, shape.hidden, 2)
    found = shape.rank_bytes(plan)
    np.testing.assert_array_equal(found, (gpu_W, host_W))
    assert host_W.min() > 0


def test_experts_of_a_rank_add_up():
    rows_WE = np.array([[10, 0, 200], [0, 0, 0]])
    model = _model()
    np.testing.assert_allclose(model.experts_s(rows_WE), [model.expert_s(10) + model.expert_s(200), 0])


def test_an_exchange_lasts_as_long_as_its_busiest_rank_in_its_busier_direction():
    out, into = np.array([1e6, 5e6, 0, 0]), np.array([0, 0, 6e6, 0])
    assert _model().exchange_s([out], [into], messages=3) == pytest.approx(6e6 / 1e10 + 3e-5)


def test_the_slower_network_decides():
    near, far = np.array([8e6, 0, 0, 0]), np.array([1e6, 0, 0, 0])
    none = np.zeros(4)
    assert _model(4, 2).exchange_s([near, far], [none, none]) == pytest.approx(1e6 / 1e9 + 1e-4)
    assert _model(4, 2).exchange_s([near * 2, far], [none, none]) == pytest.approx(16e6 / 1e10 + 1e-4)


def test_collectives():
    assert _model(4).all_reduce_s(8e6) == pytest.approx(2 * 3 / 4 * 8e6 / 1e10 + 1e-5)
    assert _model(4).all_gather_s(8e6) == pytest.approx(3 * 8e6 / 1e10 + 1e-5)
    assert _model(8, 4).all_gather_s(8e6) == pytest.approx(4 * 8e6 / 1e9 + 1e-4)
    assert _model(8, 4).all_reduce_s(8e6) == pytest.approx(2 * 7 / 8 * 8e6 / 1e9 + 1e-5 + 1e-4)


def test_one_rank_talks_to_nobody():
    alone = _model(1)
    assert alone.all_reduce_s(1e6) == alone.all_gather_s(1e6) == 0
    assert alone.exchange_s([np.zeros(1)], [np.zeros(1)]) == 0


def test_attention_by_hand():
    """Weights once, then the larger of reading the cache and the products with it."""
    weights = 1000 * 100 * (2 * 10 + 2 * 2)
    tokens, context = np.array([4]), 4999
    cache = 4 * 5000 * 2 * 2 * 100 * 2 / 1e12
    model = _model()
    assert model.attention_s(tokens, context)[0] == pytest.approx(float(model.product_s(4, weights)) + cache)
    flop = 4 * 512 * (0 + 513 / 2) * 10 * 100 / 1e14
    prompt = model.attention_s(np.array([512]), 0, span=512)[0]
    reading = 512 * 2 * 2 * 100 * 2 / 1e12
    assert prompt == pytest.approx(float(model.product_s(512, weights)) + max(flop, reading))


def test_kernels_that_wait_for_each_other_cost_their_launches():
    model = TimeModel(SHAPE, machine(), 4)
    kernels = KernelCounts()
    assert model.gate_s(np.zeros(4)).tolist() == pytest.approx([kernels.gate * 1e-6] * 4)
    assert model.experts_s(np.zeros((4, 8))).tolist() == pytest.approx([kernels.experts * 1e-6] * 4)


def test_sizes_of_a_configuration():
    config = small_config()
    shape = ModelShape.of(config, data_bytes=4)
    assert (shape.dim, shape.hidden, shape.num_experts, shape.top_k, shape.kv_heads) == (48, 56, 8, 2, 2)
    assert (shape.row_bytes, shape.expert_bytes, shape.packed_bytes) == (192, 3 * 48 * 56 * 4, 24)


def test_the_shadow_choice_takes_its_figures_from_the_same_machine():
    costs = ShadowModel.from_hardware(SHAPE, machine())
    assert costs.s_per_row == pytest.approx(6 * 1000 * 2000 / 1e14 + 2 * 1000 * 2 / 1e10)
    assert costs.s_per_shadow == pytest.approx(SHAPE.expert_bytes / machine().inside.broadcast.bandwidth)


# Milliseconds of one Mixtral layer on four H200, slowest rank: plain all-to-all with torch.grouped_mm, and tensor
# parallel; routing uniform, or one expert with half of all rows. Measured on 2026-11-20.
MEASURED = {
    ("uniform", 16): (0.72, 0.34), ("uniform", 64): (0.66, 0.38),
    ("uniform", 1024): (1.90, 1.83), ("uniform", 4096): (5.97, 6.68),
    ("skewed", 16): (0.68, 0.36), ("skewed", 64): (0.74, 0.40),
    ("skewed", 1024): (3.24, 1.88), ("skewed", 4096): (13.29, 6.96),
}  # fmt: skip


def test_predictions_for_four_h200_are_near_what_was_measured():
    hardware = Hardware.load(Path(__file__).parents[2] / "configs" / "hardware" / "h200.json")
    shape = ModelShape(4096, 14336, 8, 2, 32, 8, 128, 32000)
    loads = {"uniform": np.ones((1, 8)), "skewed": np.array([[7.0, *[1.0] * 7]])}
    errors = []
    for (routing, tokens), measured in MEASURED.items():
        trace = sample_routing(loads[routing], 4 * tokens, 2)
        for dispatcher, ms in zip(("exact", "split_width"), measured, strict=True):
            found = simulate(contiguous(1, 8, 4), trace, shape, hardware, Execution(dispatcher))
            errors.append(abs(found.phases_LP[0, 1:].sum() * 1e3 / ms - 1))
    assert np.median(errors) < 0.1
    assert max(errors) < 0.25
