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
from mixtralkit.moe.layer import MoELayer, MoEReport
from mixtralkit.moe.reference import moe_reference
from mixtralkit.moe.shadow import Shadows, shadow_room
from mixtralkit.moe.store import ExpertStore
from mixtralkit.ops.counting import count_keys
from mixtralkit.ops.hidden import Hidden
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import EXPERT_BYTES, Whole, random_plan, run_layer, sent_rows, stack
from tests.ranks import run_ranks

UNIFORM = Whole()
HALF_SKEW = Whole(seed=1, skew={3: 4.0})  # about half the choices are of expert 3
ALL_SKEW = Whole(seed=2, skew={3: 60.0})  # every row chooses expert 3
SHADOW = MoEOptions(faster=FasterOptions(shadow=True))
SCHEDULED = MoEOptions(faster=FasterOptions(shadow=True, schedule=True))
ONE_EXPERT_GB = EXPERT_BYTES / 1e9
ROWS = [256, 7, 0, 1]  # different on each rank, one of them empty


def _oracle(whole: Whole, layer: MoELayer, x_TD: torch.Tensor) -> torch.Tensor:
    _, w13, w2 = whole.weights()
    return moe_reference(x_TD, layer.gate.weight.detach(), w13, w2, whole.top_k)


def _assert_exact(whole: Whole, layer: MoELayer, x_TD: torch.Tensor, **known) -> MoEReport:
    y_TD, report = run_layer(layer, x_TD, **known)
    torch.testing.assert_close(y_TD, _oracle(whole, layer, x_TD), rtol=1e-4, atol=1e-4)
    return report


def _decide(shadows: Shadows, reports: list[MoEReport]) -> None:
    """What an engine does between two steps: the choices of all ranks' rows, by layer."""
    experts = shadows.store.layout.config.num_experts
    counts_LE = torch.stack([count_keys(report.routing.experts_TK, experts) for report in reports])
    shadows.between_steps(shadows.context.all_reduce(counts_LE).numpy())


def _count_broadcasts() -> list[int]:
    """Bytes of every broadcast from now on."""
    moved, broadcast = [], dist.broadcast

    def counted(tensor, *args, **more):
        moved.append(tensor.numel() * tensor.element_size())
        return broadcast(tensor, *args, **more)

    dist.broadcast = counted
    return moved


def _expected_sent(experts_TK: list[list[int]], plan: ExpertPlan, rank: int, shadows: tuple[int, ...]) -> list[int]:
    """Rows that must leave for each rank when no expert has replicas: once for each rank they need."""
    sent = [0] * plan.world_size
    for chosen in experts_TK:
        owners = {int(plan.holds_LWE[0, :, e].argmax()) for e in chosen if e not in shadows}
        for owner in owners - {rank}:
            sent[owner] += 1
    return sent


def _exact_cases(context: RankContext, cases: list[tuple[Whole, ExpertPlan, MoEOptions]], rows: list[int]):
    """Of each case the shadows of the second step, which the first one's counts have brought."""
    shadowed = []
    for whole, plan, options in cases:
        (layer,), shadows = stack([whole], plan, context, options)
        x_TD = whole.rows(rows[context.rank], context.rank)
        report = _assert_exact(whole, layer, x_TD)
        assert report.shadows.experts == ()
        _decide(shadows, [report])
        first = _assert_exact(whole, layer, x_TD)
        _decide(shadows, [first])
        again = _assert_exact(whole, layer, x_TD)
        static = _assert_exact(whole, layer, x_TD, per_rank=max(rows), decode=True)
        assert again.shadows.experts == static.shadows.experts == first.shadows.experts
        assert again.shadows.broadcast == static.shadows.broadcast == ()
        shadowed.append(first.shadows)
    return shadowed


@pytest.mark.parametrize("world_size", [2, 4])
def test_shadows_change_nothing(world_size):
    wholes = (UNIFORM, HALF_SKEW, ALL_SKEW)
    cases = [
        (whole, plan, options)
        for whole in wholes
        for plan in (contiguous(1, 8, world_size), random_plan(whole.seed, 8, world_size))
        for options in (SHADOW, SCHEDULED)
    ]
    if world_size == 4:  # two nodes of two
        nodes = [random_plan(seed, 8, 4, ranks_per_node=2) for seed in range(3)]
        cases += list(zip(wholes, nodes, (SHADOW, SCHEDULED, SHADOW), strict=True))
    reports = run_ranks(_exact_cases, world_size, cases, ROWS[:world_size])
    assert all(of_rank == reports[0] for of_rank in reports), "ranks must decide alike"
    for (whole, plan, _), report in zip(cases, reports[0], strict=True):
        if whole is not UNIFORM and plan.policy == "contiguous":
            assert 3 in report.experts
        assert report.broadcast == report.experts or {*report.broadcast} == {*report.experts}
        assert not any(plan.holds_LWE[0, :, e].all() for e in report.experts)


def _count(context: RankContext, whole: Whole, plan: ExpertPlan, tokens: int):
    (layer,), shadows = stack([whole], plan, context, SHADOW)
    x_TD, steps, moved = whole.rows(tokens, context.rank), [], _count_broadcasts()
    for _ in range(3):
        _, report = run_layer(layer, x_TD)
        assert not sum(moved), "nothing moves inside a step"
        _decide(shadows, [report])
        steps.append((report.routing.experts_TK.tolist(), sent_rows(report), report.shadows, sum(moved)))
        moved.clear()
    return steps


def _changing_skew(context: RankContext, hot: list[tuple[int, int]]):
    """Two layers share room for one copy; in each step one expert of one layer is hot."""
    whole, plan = Whole(top_k=1, num_experts=4), contiguous(1, 4, context.world_size)
    layers, shadows = stack([whole, whole], plan, context, SHADOW, room=1)
    steps = []
    for step, (layer_of_hot, expert) in enumerate(hot):
        reports = []
        for number, layer in enumerate(layers):
            layer.gate.weight.data.copy_(whole.weights()[0])
            x_TD = whole.rows(64, context.rank + 10 * step)
            if number == layer_of_hot:
                layer.gate.weight.data[expert, -1] = 60.0
            else:  # rows in turn to each expert: no lead, no gain
                layer.gate.weight.data.zero_()
                layer.gate.weight.data[range(4), range(4)] = 1.0
                x_TD[:, :4] = torch.eye(4).repeat(16, 1)
            reports.append(_assert_exact(whole, layer, x_TD))
        _decide(shadows, reports)
        steps.append([(report.shadows.experts, report.shadows.broadcast) for report in reports])
    return steps


def _constant_skew(context: RankContext):
    slow = MoEOptions(faster=FasterOptions(shadow=True, gpu_throughput=1e6))
    (layer,), shadows = stack([HALF_SKEW], contiguous(1, 8, context.world_size), context, slow, room=2)
    x_TD, found = HALF_SKEW.rows(64, context.rank), []
    for _ in range(6):
        _, report = run_layer(layer, x_TD)
        _decide(shadows, [report])
        found.append(report.shadows)
    return found


def _capped(context: RankContext):
    """Rows that a capacity of nothing drops, and those whose expert is neither here nor copied."""
    plan = replace(contiguous(1, 8, context.world_size), cold_capacity_factor=0.0)
    (layer,), shadows = stack([ALL_SKEW], plan, context, SHADOW)
    x_TD = ALL_SKEW.rows(64, context.rank)
    _, before = run_layer(layer, x_TD)
    _decide(shadows, [before])
    _, report = run_layer(layer, x_TD)
    local = {*report.shadows.experts, *plan.experts_of(0, context.rank)}
    away = sum(e not in local for row in report.routing.experts_TK.tolist() for e in row)
    return int(before.dropped), int(report.dropped), away


HOT = [(0, 1), (0, 1), (0, 2), (1, 3), (1, 3), (1, 3), (0, 0), (0, 0)]


def _decisions(context: RankContext):
    plan = contiguous(1, 8, context.world_size)
    found = _changing_skew(context, HOT), _constant_skew(context), _capped(context)
    _hints(context)
    return *found, _count(context, ALL_SKEW, plan, 64)


@pytest.mark.parametrize("world_size", [2, 4])
def test_copies_follow_the_counts_of_the_step_before(world_size):
    results = run_ranks(_decisions, world_size)
    _expect_the_skew_followed([changing for changing, *_ in results])
    for _, (before, first, *later), (plain_dropped, dropped, away), _ in results:
        assert before.experts == ()
        assert len(first.broadcast) == 2, "more experts are worth a copy than there is room for: the hottest are kept"
        assert later == [replace(first, broadcast=(), bytes_broadcast=0)] * 4, "none takes turns with another"
        assert dropped == away, "a shadowed expert has no capacity"
        assert dropped <= plain_dropped
    assert any(dropped < plain_dropped for *_, (plain_dropped, dropped, _), _ in results)
    for rank, (*_, steps) in enumerate(results):
        _expect_rows_to_stay(contiguous(1, 8, world_size), rank, steps)


def _expect_the_skew_followed(reports: list) -> None:
    """Room for one: (experts, broadcast) of each layer in each step."""
    assert all(of_rank == reports[0] for of_rank in reports)
    of_layer = list(zip(*reports[0], strict=True))
    none = ((), ())
    assert of_layer[0][:4] == (none, ((1,), (1,)), ((1,), ()), ((2,), (2,)))
    assert of_layer[1][:4] == (none,) * 4
    # Every run without a lead halves the gain of layer 0's copy, so that layer 1's makes it go.
    assert of_layer[1][4:7] == (((3,), (3,)), ((3,), ()), ((3,), ()))
    assert of_layer[0][4:] == (none,) * 4
    assert of_layer[1][7] == ((3,), ()), "a copy with as much gain is not pushed out"


def _expect_rows_to_stay(plan: ExpertPlan, rank: int, steps: list) -> None:
    """Rows of a shadowed expert stay and its weights move once."""
    (before_TK, sent_before, none, moved), (experts_TK, sent, shadows, again), (_, sent_again, resident, last) = steps
    assert (none.experts, sent_before) == ((), _expected_sent(before_TK, plan, rank, ()))
    assert 3 in shadows.experts
    assert moved == shadows.bytes_broadcast == len(shadows.broadcast) * EXPERT_BYTES > 0
    assert sent == sent_again == _expected_sent(experts_TK, plan, rank, shadows.experts)
    assert resident == replace(shadows, broadcast=(), bytes_broadcast=0)
    assert again == last == 0


def _gradients(context: RankContext, whole: Whole, plan: ExpertPlan, rows: list[int], options: MoEOptions):
    (layer,), shadows = stack([whole], plan, context, options, room=2)
    layer.requires_grad_(True)
    x_TD = whole.rows(rows[context.rank], context.rank).requires_grad_(True)
    y_TD, report = run_layer(layer, x_TD)
    (y_TD * y_TD.detach().cos()).sum().backward()
    sums = []
    for whole_weights, own in zip(whole.weights()[1:], (layer.experts.w13, layer.experts.w2), strict=True):
        grad = torch.zeros_like(whole_weights)
        if own.grad is not None:
            grad[list(layer.store.layout.experts(0))] = own.grad
        sums.append(context.all_reduce(grad))
    return x_TD.grad, context.all_reduce(layer.gate.weight.grad), sums, report.shadows, len(shadows.store.copies)


def _all_gradients(context: RankContext, plans: list[ExpertPlan], rows: list[int]):
    slow = FasterOptions(shadow=True, gpu_throughput=1e6)  # so slow that any lead pays
    options = [MoEOptions(faster=replace(slow, schedule=schedule)) for schedule in (False, True)]
    found = [_gradients(context, HALF_SKEW, plan, rows, each) for plan in plans for each in options]
    _train_and_evaluate(context)
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_equal_the_oracles(world_size):
    """The owner receives the gradients that its expert's copies saw, also where a rank has no rows."""
    rows = [90, 0, 4, 17][:world_size]
    gate, w13, w2 = (w.requires_grad_(True) for w in HALF_SKEW.weights())
    inputs = [HALF_SKEW.rows(tokens, rank).requires_grad_(True) for rank, tokens in enumerate(rows)]
    for x_TD in inputs:
        y_TD = moe_reference(x_TD, gate, w13, w2, HALF_SKEW.top_k)
        (y_TD * y_TD.detach().cos()).sum().backward()
    plans = [contiguous(1, 8, world_size), random_plan(7, 8, world_size)]
    for rank, of_cases in enumerate(run_ranks(_all_gradients, world_size, plans, rows)):
        for number, (x_grad, gate_grad, (w13_grad, w2_grad), shadows, copies) in enumerate(of_cases):
            if rows[rank]:
                torch.testing.assert_close(x_grad, inputs[rank].grad, rtol=1e-4, atol=1e-5)
            assert tuple(sorted(shadows.broadcast)) == shadows.experts
            assert len(shadows.experts) == 2 or plans[number // 2].policy == "random", "as many as the budget holds"
            assert copies == 0, "nothing stays resident in training"
            torch.testing.assert_close(gate_grad, gate.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(w13_grad, w13.grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(w2_grad, w2.grad, rtol=1e-4, atol=1e-4)


def _train_and_evaluate(context: RankContext) -> None:
    """An evaluation between two training steps must not see the experts of the one before."""
    (layer,), shadows = stack([ALL_SKEW], contiguous(1, 8, context.world_size), context, SHADOW)
    layer.experts.requires_grad_(True)
    x_TD = ALL_SKEW.rows(64, context.rank)
    for factor in (1.0, 2.0, 4.0):
        with torch.no_grad():
            hidden, report = layer(Hidden(None, x_TD))
            _decide(shadows, [report])
            copied, _ = layer(Hidden(None, x_TD))
        assert report.shadows.experts == ()
        assert shadows.store.copied(0)
        for found in (hidden, copied):
            torch.testing.assert_close(found.rows_TD, factor * _oracle(ALL_SKEW, layer, x_TD), rtol=1e-4, atol=1e-4)
        layer(Hidden(None, x_TD))[0].rows_TD.sum().backward()
        with torch.no_grad():
            layer.experts.w2.mul_(2.0)


def _hints(context: RankContext) -> None:
    """Copies that come before the step."""
    whole, plan = UNIFORM, contiguous(1, 8, context.world_size)
    layers, shadows = stack([whole, whole], plan, context, SHADOW, room=2)
    x_TD = whole.rows(5, context.rank)
    assert shadows.hint(0, [6]) == (6,)
    assert shadows.hint(1, [2, 5]) == (2,), "one place is left, and a hint is not pushed out before it ran"
    for layer, expert in zip(layers, (6, 2), strict=True):
        static = _assert_exact(whole, layer, x_TD, per_rank=5, decode=True).shadows
        assert (static.experts, static.broadcast) == ((expert,), (expert,))
        exact = _assert_exact(whole, layer, x_TD).shadows
        assert (exact.experts, exact.broadcast) == ((expert,), ())
    counts_LE = np.full((2, 8), 10)
    counts_LE[0, 6] = 50
    shadows.between_steps(counts_LE)
    assert shadows.hint(0, [6, 7]) == (6, 7), "the copy that ran without any gain makes room"
    for layer, experts in zip(layers, ((6, 7), ()), strict=True):
        assert _assert_exact(whole, layer, x_TD).shadows.experts == experts
    shadows.forget()
    assert _assert_exact(whole, layers[0], x_TD, per_rank=5, decode=True).shadows.experts == ()
    with pytest.raises(ValueError, match="expert 8 of layer 0"):
        shadows.hint(0, [8])
    (layer,), shadows = stack([whole], everywhere(1, 8, context.world_size), context, SHADOW)
    assert shadows.hint(0, range(8)) == ()
    assert _assert_exact(whole, layer, x_TD).shadows.experts == ()


def _layout(plan: ExpertPlan, attention: str = "dp", experts: str = "ep") -> RankLayout:
    return RankLayout(UNIFORM.config(plan.num_layers), ParallelConfig(attention, experts), plan)


def test_figures_come_from_the_model_unless_they_are_given():
    store = ExpertStore(_layout(contiguous(1, 8, 2)), RankContext(0, 2), torch.float32, room=1)
    own = Shadows(store, FasterOptions()).inference
    assert (own.d_model, own.alpha, own.data_bytes, own.matrices) == (16, 1.5, 4, 3)
    given = FasterOptions(alpha=2.0, d_model=2048, net_bandwidth=1e9, gpu_throughput=1e12)
    training = Shadows(store, given).training
    assert (training.alpha, training.d_model, training.compute_rounds, training.exchanges) == (2.0, 2048, 3, 4)
    assert (training.net_bandwidth, training.gpu_throughput) == (1e9, 1e12)


def test_the_budget_holds_the_copies():
    context, layout = RankContext(0, 2), _layout(contiguous(4, 8, 2))

    def room(memory_gb: float) -> int:
        return shadow_room(layout, context, torch.float32, replace(SHADOW, shadow_memory_gb=memory_gb))

    assert room(2.9 * ONE_EXPERT_GB) == 2
    assert room(1.0) == 32, "no more room than there are experts"
    with pytest.raises(ValueError, match=r"shadow_memory_gb \(1e-09\) must hold an expert: 4.608e-06 or more"):
        room(1e-9)
    stores = [ExpertStore(layout, context, torch.float32, copies) for copies in (1, 3)]
    sizes = [sum(w.numel() * w.element_size() for w in store.experts[0].storage[:2]) for store in stores]
    assert sizes == [(4 * 4 + copies) * EXPERT_BYTES for copies in (1, 3)]


@pytest.mark.parametrize("memory", [0, -1.0, float("nan"), True, "4"])
def test_a_bad_budget_is_named(memory):
    with pytest.raises(ValueError, match="shadow_memory_gb"):
        MoEOptions(shadow_memory_gb=memory)


@pytest.mark.parametrize(
    ("world_size", "attention", "experts", "options", "room"),
    [
        (2, "dp", "ep", SHADOW, 8),
        (2, "dp", "ep", MoEOptions(), 0),
        (2, "tp", "ep", SHADOW, 0),
        (2, "coherent", "ep", SHADOW, 0),
        (2, "dp", "tp", SHADOW, 0),
        (1, "dp", "ep", SHADOW, 0),
    ],
)
def test_there_is_room_where_rows_travel(world_size, attention, experts, options, room):
    layout = _layout(contiguous(1, 8, world_size), attention, experts)
    assert shadow_room(layout, RankContext(world_size=world_size), torch.float32, options) == room
