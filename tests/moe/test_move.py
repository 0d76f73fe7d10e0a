"""Moved experts: the right weights in the right slots, from near ranks, and a layer that computes as before."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixtralkit.config import FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext, RankFailed
from mixtralkit.layout import RankLayout
from mixtralkit.moe import transfers as move
from mixtralkit.moe.transfers import Transfer, transfers
from mixtralkit.moe.reference import moe_reference
from mixtralkit.moe.shadow import LayerShadows, ShadowCache
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import Whole, build, random_plan
from tests.ranks import run_ranks

WHOLE = Whole(seed=4, skew={3: 2.0})
EXPERT_BYTES = 3 * WHOLE.dim * WHOLE.hidden * 4
ROWS = [40, 7, 0, 1]


def _held(*ranks: str) -> np.ndarray:
    """Holders [W, E] from a text of the experts of each rank."""
    return np.array([[str(e) in rank for e in range(8)] for rank in ranks])


def test_what_a_rank_has_stays():
    old, new = _held("0123", "4567"), _held("0124", "3567")
    assert transfers(old, new) == (Transfer(3, 0, 1), Transfer(4, 1, 0))
    assert transfers(old, old) == ()


def test_experts_come_from_the_own_node():
    old, new = _held("01", "23", "0145", "67"), _held("01", "023", "0145", "067")
    assert transfers(old, new, 2) == (Transfer(0, 0, 1), Transfer(0, 2, 3))


def test_owners_send_in_turn():
    old, new = _held("01234567", "01234567", "", ""), _held("", "", "0123", "4567")
    sources = [way.source for way in transfers(old, new)]
    assert sources.count(0) == sources.count(1) == 4


@pytest.mark.parametrize("seed", range(20))
def test_every_rank_gets_just_what_it_lacks(seed):
    old, new = (random_plan(seed + 100 * i, 8, 4).holds_LWE[0] for i in (0, 1))
    ways = transfers(old, new, [None, 1, 2][seed % 3])
    assert sorted((way.target, way.expert) for way in ways) == [tuple(pair) for pair in np.argwhere(new & ~old)]
    assert all(old[way.source, way.expert] for way in ways)


def _assert_consistent(layer, plan: ExpertPlan, rank: int) -> None:
    gate, w13, w2 = WHOLE.weights()
    mine = list(plan.experts_of(0, rank))
    assert torch.equal(layer.experts.w13, w13[mine])
    assert torch.equal(layer.experts.w2, w2[mine])
    assert layer.layout.plan is plan
    np.testing.assert_array_equal(layer.assigner.holds_WE, plan.holds_LWE[0])
    y_TD, _ = layer(x_TD := WHOLE.rows(ROWS[rank], rank))
    torch.testing.assert_close(y_TD, moe_reference(x_TD, gate, w13, w2, WHOLE.top_k), rtol=1e-4, atol=1e-4)


def _adopt_all(context: RankContext, plans: list[ExpertPlan], options: MoEOptions) -> list[int]:
    layer = build(WHOLE, plans[0], context, options=options)
    parameters = dict(layer.named_parameters())
    sizes = []
    for plan in plans:
        report = layer.adopt(replace(layer.layout, plan=plan))
        _assert_consistent(layer, plan, context.rank)
        sizes.append(report.bytes_moved)
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
    return sizes


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("per_node", [None, 2])
def test_a_layer_goes_from_plan_to_plan(world_size, per_node):
    plans = [contiguous(1, 8, world_size), *(random_plan(seed, 8, world_size) for seed in range(4))]
    plans += [everywhere(1, 8, world_size), contiguous(1, 8, world_size)]
    plans = [replace(plan, ranks_per_node=per_node) for plan in plans]
    holds = [plan.holds_LWE[0] for plan in plans]
    wanted = [0] + [int((b & ~a).sum()) * EXPERT_BYTES for a, b in itertools.pairwise(holds)]
    options = MoEOptions(FasterOptions(schedule=per_node is None))
    assert run_ranks(_adopt_all, world_size, plans, options) == [wanted] * world_size


def test_a_rank_may_be_left_without_experts():
    slots = [[*range(8)], [-1] * 8]
    plans = [contiguous(1, 8, 2), ExpertPlan(np.array([slots]), 8), contiguous(1, 8, 2)]
    assert run_ranks(_adopt_all, 2, plans, MoEOptions()) == [[0, 4 * EXPERT_BYTES, 4 * EXPERT_BYTES]] * 2


def _moved_in_place(context: RankContext) -> list[tuple[bool, bool, int]]:
    """From plan to plan: whether it was in place, whether addresses stayed, slots for which memory was taken."""
    plans = [contiguous(1, 8, 2), *(ExpertPlan(np.array([slots]), 8) for slots in IN_PLACE)]
    layer, found = build(WHOLE, plans[0], context), []
    w13 = layer.experts.w13
    for plan in plans[1:]:
        before, sizes = w13.data_ptr(), []

        def counted(slots, *shape, sizes=sizes):
            sizes.append(slots)
            return torch.empty(slots, *shape)

        w13.new_empty = counted
        report = layer.adopt(replace(layer.layout, plan=plan))
        del w13.new_empty
        _assert_consistent(layer, plan, context.rank)
        found.append((report.in_place, before == w13.data_ptr(), *sizes))
    return found


# one swap between ranks, then two experts change slots, then a replica more on rank 1
IN_PLACE = [
    [[4, 1, 2, 3], [0, 5, 6, 7]],
    [[1, 4, 2, 3], [0, 5, 6, 7]],
    [[1, 4, 2, 3, -1], [0, 5, 6, 7, 1]],
]


def test_as_many_slots_stay_where_they_are():
    """Only what is new in a slot takes memory; where one rank gets more slots, all ranks take new ones."""
    first, second = run_ranks(_moved_in_place, 2)
    assert first == [(True, True, 1), (True, True, 2), (False, False, 4)]
    assert second == [(True, True, 1), (True, True, 0), (False, False, 5)]


def _shadowed(context: RankContext):
    options = MoEOptions(FasterOptions(shadow=True, net_bandwidth=1e13, gpu_throughput=1e9))
    cache = ShadowCache(context, WHOLE.dim, WHOLE.hidden, torch.float32, 1.0, 16)
    plan, layers = contiguous(1, 8, context.world_size), []
    for number in (0, 1):
        layers.append(build(WHOLE, plan, context, options=options))
        layers[number].shadows = LayerShadows(
            number, layers[number].experts, plan.slot_of_LWE[0], cache, options.faster
        )
    x_TD = WHOLE.rows(40, context.rank)
    before = [layer(x_TD)[1].shadows.experts for layer in layers]
    layers[0].adopt(replace(layers[0].layout, plan=random_plan(1, 8, context.world_size)))
    places = [set(cache.places_of(number)) for number in (0, 1)]
    _assert_consistent(layers[0], layers[0].layout.plan, context.rank)
    return before, places


def test_shadows_of_a_moved_layer_are_forgotten():
    for before, places in run_ranks(_shadowed, 2):
        assert all(before)
        assert places == [set(), set(before[1])]


def _out_of_memory(context: RankContext) -> str:
    layer = build(WHOLE, contiguous(1, 8, 2), context)
    weights = layer.experts.w13.clone()
    if context.rank == 1:

        def refuse(shape, *args):
            raise MemoryError("no room for 12 experts")

        layer.experts.w2.new_empty = refuse
    try:
        layer.adopt(replace(layer.layout, plan=everywhere(1, 8, 2)))
    except (MemoryError, RankFailed) as error:
        assert torch.equal(layer.experts.w13, weights)
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_without_memory_stops_all():
    assert run_ranks(_out_of_memory, 2) == [
        "RankFailed: rank 1: no room for 12 experts", "MemoryError: no room for 12 experts",
    ]  # fmt: skip


def test_what_cannot_be_adopted():
    context, plan = RankContext(), contiguous(1, 8, 1)
    layer = build(WHOLE, plan, context)
    other_nodes = replace(layer.layout, plan=replace(plan, ranks_per_node=1))
    for layout in (other_nodes, RankLayout(Whole(dim=32).config(), layer.layout.parallel, plan)):
        with pytest.raises(ValueError, match="must have the model, ranks and ranks_per_node"):
            layer.adopt(layout)
    split = build(WHOLE, plan, context, experts="tp")
    with pytest.raises(ValueError, match=r"experts \('tp'\) must be 'ep'"):
        split.adopt(split.layout)
    layer.experts.requires_grad_(True)
    with pytest.raises(ValueError, match="do not train"):
        layer.adopt(layer.layout)


def test_transfers_use_slots_as_well():
    plans = contiguous(1, 8, 2), random_plan(3, 8, 2)
    assert transfers(*(plan.slot_of_LWE[0] for plan in plans)) == transfers(*(plan.holds_LWE[0] for plan in plans))
    assert move.bytes_each(build(WHOLE, plans[0], RankContext(0, 2)).experts) == EXPERT_BYTES
