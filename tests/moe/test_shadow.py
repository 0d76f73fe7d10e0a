"""Shadowed layers give what the slow oracle gives, and move just the weights and rows they must."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.layer import MoELayer
from mixtralkit.moe.reference import moe_reference
from mixtralkit.moe.shadow import LayerShadows, ShadowCache
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import Whole, build, random_plan, sent_rows
from tests.ranks import run_ranks

UNIFORM = Whole()
HALF_SKEW = Whole(seed=1, skew={3: 4.0})  # about half the choices are of expert 3
ALL_SKEW = Whole(seed=2, skew={3: 60.0})  # every row chooses expert 3
SHADOW = MoEOptions(faster=FasterOptions(shadow=True))
SCHEDULED = MoEOptions(faster=FasterOptions(shadow=True, schedule=True))
EXPERT_BYTES = 3 * 16 * 24 * 4
ONE_EXPERT_GB = EXPERT_BYTES / 1e9
ROWS = [256, 7, 0, 1]  # different on each rank, one of them empty


def _cache(whole: Whole, context: RankContext, memory_gb: float = 1.0, layers: int = 1) -> ShadowCache:
    most = layers * whole.num_experts
    return ShadowCache(context, whole.dim, whole.hidden, torch.float32, memory_gb, most)


def _build(
    whole: Whole, plan: ExpertPlan, context: RankContext, options: MoEOptions, cache: ShadowCache, number: int = 0
) -> MoELayer:
    layer = build(whole, plan, context, options=options)
    slots_WE = plan.slot_of_LWE[0]
    layer.shadows = LayerShadows(number, layer.experts, slots_WE, cache, options.faster)
    return layer


def _oracle(whole: Whole, layer: MoELayer, x_TD: torch.Tensor) -> torch.Tensor:
    _, w13, w2 = whole.weights()
    return moe_reference(x_TD, layer.gate.weight.detach(), w13, w2, whole.top_k)


def _assert_exact(whole: Whole, layer: MoELayer, x_TD: torch.Tensor, rows_per_rank: int | None = None):
    y_TD, report = layer(x_TD, rows_per_rank)
    torch.testing.assert_close(y_TD, _oracle(whole, layer, x_TD), rtol=1e-4, atol=1e-4)
    return report


def _expected_sent(experts_TK: list[list[int]], plan: ExpertPlan, rank: int, shadows: tuple[int, ...]) -> list[int]:
    """Rows that must leave for each rank when no expert has replicas: once for each rank they need."""
    sent = [0] * plan.world_size
    for chosen in experts_TK:
        owners = {int(plan.holds_LWE[0, :, e].argmax()) for e in chosen if e not in shadows}
        for owner in owners - {rank}:
            sent[owner] += 1
    return sent


def _exact_cases(context: RankContext, cases: list[tuple[Whole, ExpertPlan, MoEOptions]], rows: list[int]):
    shadowed = []
    for whole, plan, options in cases:
        layer = _build(whole, plan, context, options, _cache(whole, context))
        x_TD = whole.rows(rows[context.rank], context.rank)
        first = _assert_exact(whole, layer, x_TD).shadows
        again = _assert_exact(whole, layer, x_TD).shadows
        static = _assert_exact(whole, layer, x_TD, rows_per_rank=max(rows)).shadows
        assert again.experts == static.experts == first.experts
        assert again.broadcast == static.broadcast == ()
        shadowed.append(first)
    return shadowed


@pytest.mark.parametrize("world_size", [2, 4])
def test_shadows_change_nothing(world_size):
    cases = [
        (whole, plan, options)
        for whole in (UNIFORM, HALF_SKEW, ALL_SKEW)
        for plan in (contiguous(1, 8, world_size), random_plan(whole.seed, 8, world_size))
        for options in (SHADOW, SCHEDULED)
    ]
    reports = run_ranks(_exact_cases, world_size, cases, ROWS[:world_size])
    assert all(of_rank == reports[0] for of_rank in reports), "ranks must decide alike"
    for (whole, plan, _), report in zip(cases, reports[0], strict=True):
        if whole is not UNIFORM and plan.policy == "contiguous":
            assert 3 in report.experts
        assert not any(plan.hot_LE[0, e] for e in report.experts)


def test_shadows_with_two_stages_change_nothing():
    cases = [
        (whole, random_plan(seed, 8, 4, ranks_per_node=2), options)
        for seed, whole in enumerate((UNIFORM, HALF_SKEW, ALL_SKEW))
        for options in (SHADOW, SCHEDULED)
    ]
    run_ranks(_exact_cases, 4, cases, ROWS)


def _count(context: RankContext, whole: Whole, plan: ExpertPlan, tokens: int):
    moved, broadcast = [], dist.broadcast

    def counted(tensor, *args, **more):
        moved.append(tensor.numel() * tensor.element_size())
        return broadcast(tensor, *args, **more)

    dist.broadcast = counted
    layer = _build(whole, plan, context, SHADOW, _cache(whole, context))
    x_TD = whole.rows(tokens, context.rank)
    steps = []
    for _ in range(2):
        _, report = layer(x_TD)
        steps.append((report.routing.experts_TK.tolist(), sent_rows(report), report.shadows, sum(moved)))
        moved.clear()
    return steps


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_of_a_shadowed_expert_stay_and_its_weights_move_once(world_size):
    plan = contiguous(1, 8, world_size)
    for rank, (first, second) in enumerate(run_ranks(_count, world_size, ALL_SKEW, plan, 64)):
        experts_TK, sent, shadows, moved = first
        assert 3 in shadows.experts
        assert shadows.broadcast != ()
        assert moved == shadows.bytes_broadcast == len(shadows.broadcast) * EXPERT_BYTES
        assert sent == _expected_sent(experts_TK, plan, rank, shadows.experts)
        experts_TK, sent, again, moved = second
        assert again == replace(shadows, broadcast=(), bytes_broadcast=0)
        assert moved == 0
        assert sent == _expected_sent(experts_TK, plan, rank, shadows.experts)


def _changing_skew(context: RankContext, hot: list[int]):
    """Two layers share room for one copy; in each step one expert of one layer is hot, None for none."""
    whole, plan = Whole(top_k=1, num_experts=4), contiguous(1, 4, context.world_size)
    cache = _cache(whole, context, ONE_EXPERT_GB, layers=2)
    assert cache.places == 1
    layers = [_build(whole, plan, context, SHADOW, cache, number) for number in range(2)]
    steps = []
    for step, (layer_of_hot, expert) in enumerate(hot):
        for number, layer in enumerate(layers):
            layer.gate.weight.copy_(whole.weights()[0])
            if number == layer_of_hot:
                layer.gate.weight[expert, -1] = 60.0
            else:  # rows in turn to each expert: no lead, no gain
                layer.gate.weight.zero_()
                layer.gate.weight[range(4), range(4)] = 1.0
            x_TD = whole.rows(64, context.rank + 10 * step)
            if number != layer_of_hot:
                x_TD[:, :4] = torch.eye(4).repeat(16, 1)
            report = _assert_exact(whole, layer, x_TD).shadows
            steps.append((report.experts, report.broadcast))
    return steps


@pytest.mark.parametrize("world_size", [2, 4])
def test_copies_follow_the_skew_under_a_budget_of_one(world_size):
    hot = [(0, 1), (0, 1), (0, 2), (1, 3), (1, 3), (1, 3), (0, 0)]
    reports = run_ranks(_changing_skew, world_size, hot)
    assert all(of_rank == reports[0] for of_rank in reports)
    of_layer = [reports[0][0::2], reports[0][1::2]]
    hit, none = ((1,), ()), ((), ())
    assert of_layer[0][:3] == [((1,), (1,)), hit, ((2,), (2,))]
    assert of_layer[1][:3] == [none, none, none]
    # Every run without a lead halves the gain of layer 0's copy, so that layer 1's makes it go.
    assert of_layer[1][3:6] == [((3,), (3,)), ((3,), ()), ((3,), ())]
    assert of_layer[0][3] == ((2,), ())
    assert of_layer[0][4:6] == [none, none]
    assert of_layer[0][6] == none, "a copy with as much gain is not pushed out"


def _constant_skew(context: RankContext):
    slow = MoEOptions(faster=FasterOptions(shadow=True, gpu_throughput=1e6))
    layer = _build(HALF_SKEW, contiguous(1, 8, 2), context, slow, _cache(HALF_SKEW, context, 2 * ONE_EXPERT_GB))
    x_TD = HALF_SKEW.rows(64, context.rank)
    return [layer(x_TD)[1].shadows for _ in range(5)]


def test_copies_stay_while_the_loads_do():
    """More experts are worth a copy than there is room for: the hottest are kept, none takes turns with another."""
    first, *later = run_ranks(_constant_skew, 2)[0]
    assert len(first.broadcast) == 2
    assert later == [replace(first, broadcast=(), bytes_broadcast=0)] * 4


def _gradients(context: RankContext, whole: Whole, plan: ExpertPlan, rows: list[int], options: MoEOptions):
    layer = _build(whole, plan, context, options, _cache(whole, context, 2 * ONE_EXPERT_GB)).requires_grad_(True)
    x_TD = whole.rows(rows[context.rank], context.rank).requires_grad_(True)
    y_TD, report = layer(x_TD)
    (y_TD * y_TD.detach().cos()).sum().backward()
    sums = []
    for whole_weights, own in zip(whole.weights()[1:], (layer.experts.w13, layer.experts.w2), strict=True):
        grad = torch.zeros_like(whole_weights)
        if own.grad is not None:
            grad[list(layer.layout.experts(0))] = own.grad
        sums.append(context.all_reduce(grad))
    return x_TD.grad, context.all_reduce(layer.gate.weight.grad), sums, report.shadows, layer.shadows.cache.changes


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_equal_the_oracles(world_size, schedule):
    """The owner receives the gradients that its expert's copies saw, also where a rank has no rows."""
    slow = FasterOptions(shadow=True, schedule=schedule, gpu_throughput=1e6)  # so slow that any lead pays
    options, rows = MoEOptions(faster=slow), [90, 0, 4, 17][:world_size]
    for plan in (contiguous(1, 8, world_size), random_plan(7, 8, world_size)):
        results = run_ranks(_gradients, world_size, HALF_SKEW, plan, rows, options)
        gate, w13, w2 = (w.requires_grad_(True) for w in HALF_SKEW.weights())
        for rank, (x_grad, _, _, shadows, changes) in enumerate(results):
            x_TD = HALF_SKEW.rows(rows[rank], rank).requires_grad_(True)
            y_TD = moe_reference(x_TD, gate, w13, w2, HALF_SKEW.top_k)
            (y_TD * y_TD.detach().cos()).sum().backward()
            if rows[rank]:
                torch.testing.assert_close(x_grad, x_TD.grad, rtol=1e-4, atol=1e-5)
            assert tuple(sorted(shadows.broadcast)) == shadows.experts
            assert len(shadows.experts) == 2 or plan.policy == "random", "as many as the budget holds"
            assert changes == 0, "nothing stays resident in training"
        for _, gate_grad, (w13_grad, w2_grad), _, _ in results:
            torch.testing.assert_close(gate_grad, gate.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(w13_grad, w13.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(w2_grad, w2.grad, rtol=1e-4, atol=1e-4)


def _train_and_evaluate(context: RankContext):
    layer = _build(ALL_SKEW, contiguous(1, 8, context.world_size), context, SHADOW, _cache(ALL_SKEW, context))
    layer.experts.requires_grad_(True)
    x_TD = ALL_SKEW.rows(64, context.rank)
    with torch.no_grad():
        before, first = layer(x_TD)
        layer.experts.w2.mul_(2.0)
        after, second = layer(x_TD)
    torch.testing.assert_close(after, 2.0 * before)
    assert second.shadows.broadcast == first.shadows.broadcast == first.shadows.experts != ()


def test_a_copy_of_weights_that_changed_is_not_used():
    """An evaluation between two training steps must not see the experts of the one before."""
    run_ranks(_train_and_evaluate, 2)


def _hints(context: RankContext):
    whole, plan = UNIFORM, contiguous(1, 8, context.world_size)
    cache = _cache(whole, context, 2 * ONE_EXPERT_GB, layers=2)
    layers = [_build(whole, plan, context, SHADOW, cache, number) for number in range(2)]
    x_TD = whole.rows(5, context.rank)
    assert cache.hint(0, [6]) == (6,)
    assert cache.hint(1, [2, 5]) == (2,), "one place is left, and a hint is not pushed out before it ran"
    static = _assert_exact(whole, layers[0], x_TD, rows_per_rank=5).shadows
    assert (static.experts, static.broadcast) == ((6,), ())
    exact = _assert_exact(whole, layers[1], x_TD).shadows
    assert (exact.experts, exact.broadcast) == ((2,), ())
    assert cache.hint(0, [6, 7]) == (6, 7), "the copy that ran without any gain makes room"
    _assert_exact(whole, layers[1], x_TD)
    changes = cache.changes
    cache.clear()
    assert cache.changes == changes + 2
    assert _assert_exact(whole, layers[0], x_TD, rows_per_rank=5).shadows.experts == ()
    with pytest.raises(ValueError, match="expert 8 of layer 0"):
        cache.hint(0, [8])
    layer = _build(whole, everywhere(1, 8, context.world_size), context, SHADOW, cache)
    assert cache.hint(0, range(8)) == ()
    assert _assert_exact(whole, layer, x_TD).shadows.experts == ()


@pytest.mark.parametrize("world_size", [2, 4])
def test_hints_bring_copies_before_the_step(world_size):
    run_ranks(_hints, world_size)


def _capped(context: RankContext, whole: Whole):
    plan = replace(contiguous(1, 8, context.world_size), cold_capacity_factor=0.0)
    layer = _build(whole, plan, context, SHADOW, _cache(whole, context))
    _, report = layer(whole.rows(64, context.rank))
    home = {*report.shadows.experts, *plan.experts_of(0, context.rank)}
    return int(report.dropped), sum(e not in home for row in report.routing.experts_TK.tolist() for e in row)


def test_a_shadowed_expert_has_no_capacity():
    for dropped, away in run_ranks(_capped, 2, ALL_SKEW):
        assert dropped == away < 64


def test_figures_come_from_the_model_unless_they_are_given():
    slots_WE = contiguous(1, 8, 2).slot_of_LWE[0]
    layer = build(UNIFORM, contiguous(1, 8, 1), RankContext())
    cache = _cache(UNIFORM, RankContext())
    own = LayerShadows(0, layer.experts, slots_WE, cache, FasterOptions()).inference
    assert (own.d_model, own.alpha, own.data_bytes, own.matrices) == (16, 1.5, 4, 3)
    given = FasterOptions(alpha=2.0, d_model=2048, net_bandwidth=1e9, gpu_throughput=1e12)
    training = LayerShadows(0, layer.experts, slots_WE, cache, given).training
    assert (training.alpha, training.d_model, training.compute_rounds, training.exchanges) == (2.0, 2048, 3, 4)
    assert (training.net_bandwidth, training.gpu_throughput) == (1e9, 1e12)


def test_the_budget_holds_the_pool():
    cache = _cache(UNIFORM, RankContext(), 2.9 * ONE_EXPERT_GB, layers=4)
    assert cache.places == 2
    assert sum(pool.numel() * pool.element_size() for pool in cache.pool) == 2 * EXPERT_BYTES
    assert _cache(UNIFORM, RankContext(), 1.0, layers=4).places == 32, "no more room than there are experts"
    with pytest.raises(ValueError, match=r"shadow_memory_gb \(1e-09\) must hold an expert: 4.608e-06 or more"):
        _cache(UNIFORM, RankContext(), 1e-9)


@pytest.mark.parametrize("memory", [0, -1.0, float("nan"), True, "4"])
def test_a_bad_budget_is_named(memory):
    with pytest.raises(ValueError, match="shadow_memory_gb"):
        MoEOptions(shadow_memory_gb=memory)


@pytest.mark.parametrize(
    ("world_size", "attention", "experts", "options", "has_cache"),
    [
        (2, "dp", "ep", SHADOW, True),
        (2, "dp", "ep", MoEOptions(), False),
        (2, "tp", "ep", SHADOW, False),
        (2, "dp", "tp", SHADOW, False),
        (1, "dp", "ep", SHADOW, False),
    ],
)
def test_a_cache_is_made_where_rows_travel(world_size, attention, experts, options, has_cache):
    layout = RankLayout(UNIFORM.config(), ParallelConfig(attention, experts), contiguous(1, 8, world_size))
    cache = ShadowCache.for_model(layout, RankContext(world_size=world_size), torch.float32, options)
    assert (cache is not None) == has_cache
    assert cache is None or (cache.places, np.prod(cache.pool[0].shape)) == (8, 8 * 48 * 16)
