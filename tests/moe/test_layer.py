"""Every way to run the layer gives what the slow oracle gives, forward and backward."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from mixtralkit.config import FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.moe.reference import moe_reference
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import Whole, build, random_plan, sent_rows
from tests.ranks import run_ranks

UNIFORM = Whole()
HALF_SKEW = Whole(seed=1, skew={3: 2.0})
ALL_SKEW = Whole(seed=2, skew={3: 60.0})  # every row chooses expert 3
UNPICKED = Whole(seed=3, skew={5: -60.0})  # nobody chooses expert 5
ROWS = [256, 7, 0, 1]  # different on each rank, one of them empty


def _oracle(whole: Whole, x_TD: torch.Tensor) -> torch.Tensor:
    return moe_reference(x_TD, *whole.weights(), whole.top_k)


def _run_all(context: RankContext, cases: list[tuple[Whole, ExpertPlan, MoEOptions | None]], rows: list[int]):
    """Forward of each case with own rows ("dp") in every variant, and with shared rows ("tp"): largest errors."""
    errors = {}
    for number, (whole, plan, options) in enumerate(cases):
        x_TD = whole.rows(rows[context.rank], context.rank)
        expected = _oracle(whole, x_TD)
        layer = build(whole, plan, context, options=options)
        y_TD, report = layer(x_TD)
        errors[number, "exact"] = _error(y_TD, expected)
        assert max(_sent(report)) <= len(x_TD), "a row left more than once for a rank"
        errors[number, "static"] = _error(layer(x_TD, rows_per_rank=max(rows))[0], expected)
        shared = whole.rows(29)
        for experts in ("ep", "tp"):
            layer = build(whole, plan, context, attention="tp", experts=experts, options=options)
            errors[number, "replicated", experts] = _error(layer(shared)[0], _oracle(whole, shared))
        layer = build(whole, plan, context, attention="dp", experts="tp", options=options)
        errors[number, "gathered"] = _error(layer(x_TD)[0], expected)
    return errors


def _sent(report) -> list[int]:
    return sent_rows(report) if hasattr(report.handles[0], "send") else [0]


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max()) if got.numel() else 0.0


SCHEDULED = MoEOptions(faster=FasterOptions(schedule=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_way_equals_the_oracle(world_size):
    cases = []
    for whole in (UNIFORM, HALF_SKEW, ALL_SKEW, UNPICKED):
        cases.append((whole, contiguous(1, 8, world_size), None))
        cases.append((whole, random_plan(whole.seed, 8, world_size), SCHEDULED))
    cases.append((UNIFORM, everywhere(1, 8, world_size), None))
    four = Whole(num_experts=4, top_k=1, seed=4)
    cases.append((four, random_plan(4, 4, world_size), None))
    sixty = Whole(num_experts=60, top_k=6, seed=5)
    cases.append((sixty, random_plan(5, 60, world_size), SCHEDULED))
    for errors in run_ranks(_run_all, world_size, cases, ROWS[:world_size] if world_size > 1 else [256]):
        assert max(errors.values()) < 1e-4, errors


def test_eight_ranks_equal_the_oracle():
    cases = [(HALF_SKEW, contiguous(1, 8, 8), SCHEDULED), (UNIFORM, random_plan(6, 8, 8), None)]
    for errors in run_ranks(_run_all, 8, cases, [3, 0, 7, 1, 20, 2, 0, 5]):
        assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("ranks_per_node", [2])
def test_two_stages_equal_the_oracle(ranks_per_node):
    cases = [
        (whole, random_plan(seed, 8, 4, ranks_per_node=ranks_per_node), options)
        for seed, whole in enumerate((UNIFORM, HALF_SKEW, ALL_SKEW))
        for options in (None, SCHEDULED)
    ]
    for errors in run_ranks(_run_all, 4, cases, ROWS):
        assert max(errors.values()) < 1e-4, errors


def _random_cases(context: RankContext, seeds: list[int]):
    for seed in seeds:
        pick = random.Random(seed).choice
        num_experts = pick([4, 8, 13])
        whole = Whole(num_experts=num_experts, top_k=pick([1, 2, 3, 4]), seed=seed, skew={1: pick([0.0, 2.0, 50.0])})
        plan = random_plan(seed, num_experts, context.world_size)
        options = MoEOptions(faster=FasterOptions(schedule=pick([True, False]), group_size=pick([1, 2, 4])))
        rows = [pick([0, 1, 5, 33]) for _ in range(context.world_size)]
        for key, error in _run_all(context, [(whole, plan, options)], rows).items():
            assert error < 1e-4, (seed, key, error)


@pytest.mark.parametrize("world_size", [2, 4])
def test_random_plans_with_replicas_equal_the_oracle(world_size):
    run_ranks(_random_cases, world_size, list(range(12)))


def _gradients(context: RankContext, whole: Whole, plan: ExpertPlan, attention: str, experts: str, rows: list[int],
               options: MoEOptions | None):  # fmt: skip
    """Gradients of Σ (output · pattern) over all ranks' rows: of the rows, the gate, and each expert's w2."""
    layer = build(whole, plan, context, attention, experts, options).requires_grad_(True)
    x_TD = whole.rows(rows[context.rank], context.rank if attention == "dp" else 0).requires_grad_(True)
    y_TD, _ = layer(x_TD)
    (y_TD * y_TD.detach().cos()).sum().backward()
    w2 = torch.zeros_like(whole.weights()[2])
    mine = list(layer.layout.experts(0))
    if layer.experts.w2.grad is not None:
        w2[mine, :, slice(*layer.layout.hidden)] = layer.experts.w2.grad
    gate = layer.gate.weight.grad
    if attention == "dp":
        gate = context.all_reduce(gate)
    return x_TD.grad, gate, context.all_reduce(w2)


def _oracle_gradients(whole: Whole, inputs: list[torch.Tensor]):
    gate, w13, w2 = (w.requires_grad_(True) for w in whole.weights())
    xs = [x.requires_grad_(True) for x in inputs]
    for x_TD in xs:
        y_TD = moe_reference(x_TD, gate, w13, w2, whole.top_k)
        (y_TD * y_TD.detach().cos()).sum().backward()
    return [x.grad for x in xs], gate.grad, w2.grad


@pytest.mark.parametrize(
    ("attention", "experts", "options"),
    [("dp", "ep", None), ("dp", "ep", SCHEDULED), ("tp", "ep", None), ("tp", "tp", None), ("dp", "tp", None)],
)
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_equal_the_oracles(world_size, attention, experts, options):
    rows = [9, 0, 4, 17][:world_size] if attention == "dp" else [9] * world_size
    whole, plan = HALF_SKEW, random_plan(7, 8, world_size)
    results = run_ranks(_gradients, world_size, whole, plan, attention, experts, rows, options)
    inputs = [whole.rows(n, r) for r, n in enumerate(rows)] if attention == "dp" else [whole.rows(9)]
    x_grads, gate, w2 = _oracle_gradients(whole, inputs)
    for rank, (x_grad, gate_grad, w2_grad) in enumerate(results):
        wanted = x_grads[rank if attention == "dp" else 0]
        if wanted is not None and wanted.numel():
            torch.testing.assert_close(x_grad, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gate_grad, gate, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(w2_grad, w2, rtol=1e-4, atol=1e-5)


def _count_rows(context: RankContext, whole: Whole, plan: ExpertPlan, tokens: int):
    layer = build(whole, plan, context)
    x_TD = whole.rows(tokens, context.rank)
    _, report = layer(x_TD)
    return report.routing.experts_TK.tolist(), sent_rows(report)


@pytest.mark.parametrize("whole", [UNIFORM, ALL_SKEW])
def test_rows_sent_are_those_the_plan_makes_necessary(whole):
    """Counted: nothing leaves for an expert that is at home; a row leaves once for each other rank it needs."""
    holds = [{0, 1, 3}, {2, 3}, {3, 4, 5}, {3, 6, 7}]
    plan = ExpertPlan(torch.tensor([[sorted(h) + [-1] * (3 - len(h)) for h in holds]]).numpy(), 8)
    for rank, (experts_TK, sent) in enumerate(run_ranks(_count_rows, 4, whole, plan, 64)):
        expected = [0] * 4
        for chosen in experts_TK:
            away = {next(r for r in range(4) if e in holds[r]) for e in chosen if e not in holds[rank]}
            for to in away:
                expected[to] += 1
        assert sent == expected
        assert sent[rank] == 0


def test_hot_rows_are_never_sent():
    for experts_TK, sent in run_ranks(_count_rows, 4, UNIFORM, everywhere(1, 8, 4), 64):
        assert len(experts_TK) == 64
        assert sent == [0, 0, 0, 0]


def _count_bytes(context: RankContext, whole: Whole, plan: ExpertPlan, tokens: int, exchange: str):
    """Bytes of rows and choices that leave this rank for others, and rows by destination."""
    sent_bytes = 0
    original = dist.all_to_all_single, RankContext.all_gather

    def all_to_all(out, x, receive, send, group):
        nonlocal sent_bytes
        row_bytes = x[0].numel() * x.element_size() if len(x) else 0
        sent_bytes += row_bytes * (sum(send) - send[context.rank])
        return original[0](out, x, receive, send, group=group)

    def all_gather(self, x):
        nonlocal sent_bytes
        if x.is_floating_point():  # counts are whole numbers
            sent_bytes += x.numel() * x.element_size() * (self.world_size - 1)
        return original[1](self, x)

    layer = build(whole, plan, context)
    x_TD = whole.rows(tokens, context.rank)
    _, report = layer(x_TD)
    dist.all_to_all_single, RankContext.all_gather = all_to_all, all_gather
    layer(x_TD, rows_per_rank=tokens + 3 if exchange == "static" else None)
    return sent_bytes, report.handles[0].send, report.handles[0].receive


def test_bytes_of_the_exact_exchange_are_the_analytic_count():
    """Out: a row and 3K+1 numbers of four bytes for each row sent; back: one row for each row received."""
    for sent_bytes, send, receive in run_ranks(_count_bytes, 4, HALF_SKEW, random_plan(9, 8, 4), 50, "exact"):
        row_bytes, choice_bytes = HALF_SKEW.dim * 4, (3 * HALF_SKEW.top_k + 1) * 4
        assert sent_bytes == sum(send) * (row_bytes + choice_bytes) + sum(receive) * row_bytes


def test_bytes_of_the_static_exchange_are_the_analytic_count():
    """Out: room for every row to every other rank; back: the same number of rows."""
    for sent_bytes, *_ in run_ranks(_count_bytes, 4, HALF_SKEW, random_plan(9, 8, 4), 50, "static"):
        row_bytes, choice_bytes = HALF_SKEW.dim * 4, (3 * HALF_SKEW.top_k + 1) * 4
        assert sent_bytes == 3 * 53 * (row_bytes + choice_bytes) + 3 * 53 * row_bytes
