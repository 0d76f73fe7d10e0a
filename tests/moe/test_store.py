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
from mixtralkit.moe.layer import MoELayer
from mixtralkit.moe.reference import moe_reference
from mixtralkit.moe.transfers import Transfer, transfers
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import EXPERT_BYTES, Whole, build, random_plan, run_layer, stack
from tests.ranks import run_ranks

WHOLE = Whole(seed=4, skew={3: 2.0})
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


def _assert_consistent(layer: MoELayer, plan: ExpertPlan, rank: int) -> None:
    gate, w13, w2 = WHOLE.weights()
    mine = list(plan.experts_of(0, rank))
    assert torch.equal(layer.experts.w13, w13[mine])
    assert torch.equal(layer.experts.w2, w2[mine])
    np.testing.assert_array_equal(layer.store.slots_WE(layer.layer), plan.slot_of_LWE[0])
    local = {*mine, *layer.store.copied(layer.layer)}
    assert layer.table.local_E.tolist() == [expert in local for expert in range(8)]
    for known in ({}, {"per_rank": max(ROWS), "decode": True}):
        y_TD, _ = run_layer(layer, x_TD := WHOLE.rows(ROWS[rank], rank), **known)
        torch.testing.assert_close(y_TD, moe_reference(x_TD, gate, w13, w2, WHOLE.top_k), rtol=1e-4, atol=1e-4)


def _adopt(layer: MoELayer, plan: ExpertPlan):
    """The layer's slots in ``plan``, those of others as they are."""
    layout, slots_LWS = layer.store.layout, layer.store.layout.plan.slots_LWS
    width = max(slots_LWS.shape[2], plan.slots_LWS.shape[2])
    slots = np.full((*slots_LWS.shape[:2], width), -1)
    slots[:, :, : slots_LWS.shape[2]] = slots_LWS
    slots[layer.layer] = -1
    slots[layer.layer, :, : plan.slots_LWS.shape[2]] = plan.slots_LWS[0]
    return layer.store.adopt(layer.layer, replace(layout, plan=replace(plan, slots_LWS=slots)))


def _adopt_all(context: RankContext, plans: list[ExpertPlan], options: MoEOptions):
    """From plan to plan, by itself and where the layer shares its memory with another and with copies: bytes moved."""
    return [
        _sizes(context, build(WHOLE, plans[0], context, options=options), plans),
        _sizes(context, stack([Whole(), WHOLE], plans[0], context, options, room=3)[0][1], plans),
    ]


def _sizes(context: RankContext, layer: MoELayer, plans: list[ExpertPlan]) -> list[int]:
    parameters, sizes = dict(layer.named_parameters()), []
    tables = [table.data_ptr() for table in (layer.table.local_E, layer.table.places_2EC)]
    for plan in plans:
        before, relocations = layer.experts.w13.data_ptr(), layer.store.relocations
        report = _adopt(layer, plan)
        _assert_consistent(layer, plan, context.rank)
        sizes.append(report.bytes_moved)
        assert [table.data_ptr() for table in (layer.table.local_E, layer.table.places_2EC)] == tables
        if report.in_place:
            assert layer.experts.w13.data_ptr() == before
        else:
            assert layer.store.relocations > relocations
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
    return sizes


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("per_node", [None, 2])
def test_a_layer_goes_from_plan_to_plan(world_size, per_node):
    plans = [contiguous(1, 8, world_size), *(random_plan(seed, 8, world_size) for seed in range(4))]
    plans += [everywhere(1, 8, world_size), contiguous(1, 8, world_size)]
    if world_size == 2:  # a rank may be left without experts
        plans += [ExpertPlan(np.array([[[*range(8)], [-1] * 8]]), 8), contiguous(1, 8, 2)]
    plans = [replace(plan, ranks_per_node=per_node) for plan in plans]
    holds = [plan.holds_LWE[0] for plan in plans]
    wanted = [0] + [int((b & ~a).sum()) * EXPERT_BYTES for a, b in itertools.pairwise(holds)]
    options = MoEOptions(FasterOptions(schedule=per_node is None))
    assert run_ranks(_adopt_all, world_size, plans, options) == [[wanted, wanted]] * world_size


def _moved_in_place(context: RankContext) -> list[tuple]:
    """From plan to plan: in place, address kept, graphs void, slots that memory was taken for."""
    plans = [contiguous(1, 8, 2), *(ExpertPlan(np.array([slots]), 8) for slots in IN_PLACE)]
    layer, found = build(WHOLE, plans[0], context), []
    w13 = layer.experts.w13
    for plan in plans[1:]:
        before, relocations, sizes = w13.data_ptr(), layer.store.relocations, []

        def counted(slots, *shape, sizes=sizes):
            sizes.append(slots)
            return torch.empty(slots, *shape)

        w13.new_empty = counted
        report = _adopt(layer, plan)
        del w13.new_empty
        _assert_consistent(layer, plan, context.rank)
        found.append((report.in_place, before == w13.data_ptr(), layer.store.relocations - relocations, *sizes))
    return found


# one swap between ranks, then two experts change slots, then a replica more on rank 1
IN_PLACE = [
    [[4, 1, 2, 3], [0, 5, 6, 7]],
    [[1, 4, 2, 3], [0, 5, 6, 7]],
    [[1, 4, 2, 3, -1], [0, 5, 6, 7, 1]],
]


def _moves_beside_copies(context: RankContext) -> list[tuple[set[int], ...]]:
    """Copies of two layers before and after a move of the first, in place and not."""
    found = []
    for slots in (IN_PLACE[0], IN_PLACE[2]):
        layers, shadows = stack([WHOLE, WHOLE], contiguous(1, 8, 2), context, MoEOptions(), room=3)
        away = [e for e in range(8) if e not in (0, 4)]
        hinted = shadows.hint(0, away[:1]), shadows.hint(1, away[1:3])
        plan = ExpertPlan(np.array([slots]), 8)
        _adopt(layers[0], plan)
        found.append((*map(set, hinted), *(set(shadows.store.copied(number)) for number in (0, 1))))
        _assert_consistent(layers[0], plan, context.rank)
        _assert_consistent(layers[1], contiguous(1, 8, 2), context.rank)
        assert shadows.hint(0, [6]) == (6,), "the places of copies that went are free"
        _assert_runs(layers[0], context.rank)
    return found


def _assert_runs(layer: MoELayer, rank: int) -> None:
    y_TD, report = run_layer(layer, x_TD := WHOLE.rows(ROWS[rank], rank))
    torch.testing.assert_close(y_TD, moe_reference(x_TD, *WHOLE.weights(), WHOLE.top_k), rtol=1e-4, atol=1e-4)
    assert report.shadows.experts == (6,)


def _out_of_memory(context: RankContext) -> str:
    layer = build(WHOLE, contiguous(1, 8, 2), context)
    weights = layer.experts.w13.clone()
    if context.rank == 1:

        def refuse(shape, *args):
            raise MemoryError("no room for 12 experts")

        layer.experts.w2.new_empty = refuse
    try:
        _adopt(layer, everywhere(1, 8, 2))
    except (MemoryError, RankFailed) as error:
        assert torch.equal(layer.experts.w13, weights)
        return f"{type(error).__name__}: {error}"
    return "no error"


def _on_two_ranks(context: RankContext):
    return _moved_in_place(context), _moves_beside_copies(context), _out_of_memory(context)


def test_where_weights_lie_after_a_move():
    """Only what is new in a slot takes memory; where one rank gets more slots, all ranks take new ones.

    Copies of the moved layer go; those of others too where the memory that all share is new. A rank without memory
    stops all, and nothing has changed.
    """
    (first, copies, refused), (second, copies_of_second, failed) = run_ranks(_on_two_ranks, 2)
    assert first == [(True, True, 0, 1), (True, True, 0, 2), (False, False, 1, 4)]
    assert second == [(True, True, 0, 1), (True, True, 0, 0), (False, False, 1, 5)]
    assert copies == copies_of_second == [({1}, {2, 3}, set(), {2, 3}), ({1}, {2, 3}, set(), set())]
    assert refused == "RankFailed: rank 1: no room for 12 experts"
    assert failed == "MemoryError: no room for 12 experts"


def test_what_cannot_be_adopted():
    context, plan = RankContext(), contiguous(1, 8, 1)
    store = build(WHOLE, plan, context).store
    other_nodes = replace(store.layout, plan=replace(plan, ranks_per_node=1))
    for layout in (other_nodes, RankLayout(Whole(dim=32).config(), store.layout.parallel, plan)):
        with pytest.raises(ValueError, match="must have the model, ranks and ranks_per_node"):
            store.adopt(0, layout)
    split = build(WHOLE, plan, context, experts="tp").store
    with pytest.raises(ValueError, match=r"experts \('tp'\) must be 'ep'"):
        split.adopt(0, split.layout)
    store.experts[0].requires_grad_(True)
    with pytest.raises(ValueError, match="do not train"):
        store.adopt(0, store.layout)


def test_transfers_use_slots_as_well():
    plans = contiguous(1, 8, 2), random_plan(3, 8, 2)
    assert transfers(*(plan.slot_of_LWE[0] for plan in plans)) == transfers(*(plan.holds_LWE[0] for plan in plans))
    assert build(WHOLE, plans[0], RankContext(0, 2)).store.expert_bytes == EXPERT_BYTES
