"""A layer with a capacity against a slow and obvious cut, one choice at a time."""

from __future__ import annotations

import math

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.router import Routing
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.capacity import CapacityRule
from mixtralkit.planning.plan import ExpertPlan, contiguous
from tests.moe.layers import Whole, build, run_layer
from tests.ranks import run_ranks


def _slow_drop(routing: Routing, local: set[int], capacity: int, order: str = "weight") -> list[list[int]]:
    """Each cold expert in turn takes its heaviest, or first, choices, one at a time."""
    experts = [list(row) for row in routing.experts_TK.tolist()]
    for expert in range(routing.logits_TE.shape[1]):
        if expert in local:
            continue
        wanting = [
            (-float(routing.weights_TK[t, k]) if order == "weight" else 0.0, t, k)
            for t, row in enumerate(routing.experts_TK.tolist())
            for k, e in enumerate(row)
            if e == expert
        ]
        for _, t, k in sorted(wanting)[capacity:]:
            experts[t][k] = -1
    return experts


def _slow_reroute(routing: Routing, local: set[int], capacity: int, order: str = "weight") -> list[list[int]]:
    """Holes are offered next-best experts: all rows' first alternative, then all rows' second, …"""
    experts = _slow_drop(routing, local, capacity, order)
    num_experts, top_k = routing.logits_TE.shape[1], routing.experts_TK.shape[1]
    room = {e: capacity - sum(row.count(e) for row in experts) for e in range(num_experts)}
    for place in range(top_k, num_experts):
        offers = []
        for t, row in enumerate(experts):
            ranking = sorted(range(num_experts), key=lambda e: -float(routing.logits_TE[t, e]))
            if -1 in row:
                k = row.index(-1)
                worth = float(routing.weights_TK[t, k]) if order == "weight" else 0.0
                offers.append((-worth, t, k, ranking[place]))
        for _, t, k, expert in sorted(offers):
            if expert in local or room[expert] > 0:
                experts[t][k] = expert
                room[expert] -= 1
    return experts


def test_capacity_is_pangus():
    plan = ExpertPlan(contiguous(1, 8, 2).slots_LWS, 8, cold_capacity_factor=1.1, cold_token_percent=0.5)
    assert CapacityRule.of(plan).capacity(2 * 100) == int(math.ceil(2 * 100 * 1.1 / 8) * 0.5) == 14
    assert CapacityRule.of(contiguous(1, 8, 2)) is None


WHOLE = Whole(skew={3: 2.0, 0: 1.0})
SLOTS = [[[0, 1, 2, 3, 4], [0, 1, 5, 6, 7]]]
PLANS = [
    ExpertPlan(torch.tensor(SLOTS).numpy(), 8, cold_capacity_factor=factor, overflow=overflow, cut_order=order)
    for factor, order in ((0.3, "weight"), (1.0, "weight"), (0.3, "arrival"))
    for overflow in ("drop", "reroute")
]


def _capacity_layer(context: RankContext, attention: str):
    found, x_TD = [], WHOLE.rows(40, context.rank if attention == "dp" else 0)
    for plan in PLANS:
        layer = build(WHOLE, plan, context, attention=attention)
        y_TD, report = run_layer(layer, x_TD)
        found.append((x_TD, y_TD, int(report.dropped), int(report.rerouted)))
        alone_TD, alone = run_layer(layer, x_TD[:30])
        memory = SymmetricExchange.create(context, 40, WHOLE.dim, WHOLE.top_k, torch.float32)
        for more in ({}, {"symmetric": memory}):
            layer = build(WHOLE, plan, context, attention=attention, **more)
            valid_T = torch.arange(40).masked_fill(torch.arange(40) >= 30, -1)  # filled up with rows that do not count
            filled_TD, filled = run_layer(layer, x_TD, per_rank=40, decode=not more, valid_T=valid_T)
            torch.testing.assert_close(filled_TD[:30], alone_TD)
            assert (filled.dropped, filled.rerouted) == (alone.dropped, alone.rerouted)
    return found


@pytest.mark.parametrize("attention", ["dp", "tp"])
def test_the_layer_computes_what_the_cut_leaves(attention):
    """Experts 0 and 1 are hot; what remains of each row is added up expert by expert as the oracle would."""
    for rank, of_plans in enumerate(run_ranks(_capacity_layer, 2, attention)):
        for plan, (x_TD, y_TD, dropped, rerouted) in zip(PLANS, of_plans, strict=True):
            slow = _expect_cut(plan, rank, attention, x_TD, y_TD)
            assert dropped == sum(row.count(-1) for row in slow)
            assert (rerouted > 0) == (plan.overflow == "reroute") or rerouted == 0


def _expect_cut(plan: ExpertPlan, rank: int, attention: str, x_TD: torch.Tensor, y_TD: torch.Tensor) -> list[list[int]]:
    """Compares the layer's rows with what the slow cut leaves, which it returns."""
    gate, w13, w2 = WHOLE.weights()
    local = set(SLOTS[0][rank]) if attention == "dp" else {0, 1}
    logits_TE = x_TD @ gate.T
    chosen, experts = logits_TE.topk(2)
    routing = Routing(experts, chosen.softmax(-1), logits_TE)
    capacity = math.ceil(2 * 40 * plan.cold_capacity_factor / 8)
    slow = (_slow_drop if plan.overflow == "drop" else _slow_reroute)(routing, local, capacity, plan.cut_order)
    expected = torch.zeros_like(x_TD)
    for t, row in enumerate(slow):
        kept = [e for e in row if e >= 0]
        over = slow[t] != experts[t].tolist()
        if plan.overflow == "reroute" and over:
            weights = logits_TE[t, kept].softmax(-1) if kept else []
        else:
            weights = [routing.weights_TK[t, k] for k, e in enumerate(row) if e >= 0]
        for expert, weight in zip(kept, weights, strict=True):
            gate_F, up_F = (w13[expert] @ x_TD[t]).chunk(2)
            expected[t] += weight * (w2[expert] @ (torch.nn.functional.silu(gate_F) * up_F))
    torch.testing.assert_close(y_TD, expected, rtol=1e-4, atol=1e-4)
    return slow
