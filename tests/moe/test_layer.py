"""Every dispatcher gives what the slow oracle gives, forward and, where it carries gradients, backward."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mixtralkit.config import FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.moe.layer import MoELayer, StepRows
from mixtralkit.moe.reference import moe_reference
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.hidden import Hidden
from mixtralkit.ops.norm.reference import rms_norm_reference
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.dispatchers import DISPATCHERS
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import Whole, build, random_plan, run_layer, sent_rows
from tests.ranks import run_ranks

UNIFORM = Whole()
HALF_SKEW = Whole(seed=1, skew={3: 2.0})
ALL_SKEW = Whole(seed=2, skew={3: 60.0})  # every row chooses expert 3
UNPICKED = Whole(seed=3, skew={5: -60.0})  # nobody chooses expert 5
ROWS = [256, 7, 0, 1]  # different on each rank, one of them empty
PIECE = 100  # rows of a rank that symmetric memory has room for
SCHEDULED = MoEOptions(faster=FasterOptions(schedule=True))

Case = tuple[Whole, ExpertPlan, MoEOptions | None]


def _arrangements(context: RankContext, case: Case, most: int) -> Iterator[tuple[MoELayer, StepRows, bool]]:
    """A layer for each dispatcher that the plan can have, what is known of its rows, and whether ranks share them."""
    whole, plan, options = case
    size = whole.dim, torch.float32
    own = build(whole, plan, context, options=options)
    yield own, StepRows(), False
    yield own, StepRows(per_rank=most, decode=True), False
    if plan.ranks_per_node is None:
        memory = SymmetricExchange.create(context, PIECE, whole.dim, whole.top_k, torch.float32)
        yield build(whole, plan, context, options=options, symmetric=memory), StepRows(per_rank=most), False
    moving = build(whole, plan, context, "coherent", options=options)
    yield moving, StepRows(decode=True), False
    for experts in ("ep", "tp"):
        yield build(whole, plan, context, "tp", experts, options), StepRows(), True
        sums = RowReducer.create(context, 64, *size)
        yield build(whole, plan, context, "tp", experts, options, sums=sums), StepRows(per_rank=29, decode=True), True
    split = build(whole, plan, context, "dp", "tp", options)
    yield split, StepRows(), False
    yield split, StepRows(per_rank=most), False


def _norms(dim: int) -> list[tuple[torch.Tensor, float]]:
    generator = torch.Generator().manual_seed(dim)
    return [(1 + 0.1 * torch.randn(dim, generator=generator), 1e-5) for _ in range(2)]


@torch.no_grad()
def _run_all(context: RankContext, cases: list[Case], rows: list[int]) -> set[str]:
    """Compares every arrangement of each case with the oracle; the names of the dispatchers that ran."""
    names = set()
    for number, case in enumerate(cases):
        whole, (before, after) = case[0], _norms(case[0].dim)
        inputs = {False: whole.rows(rows[context.rank], context.rank), True: whole.rows(29)}
        wanted = {
            shared: [
                moe_reference(rows_TD, *whole.weights(), whole.top_k)
                for rows_TD in (x_TD, rms_norm_reference(x_TD, *before))
            ]
            for shared, x_TD in inputs.items()
        }
        for layer, known, shared in _arrangements(context, case, max(rows)):
            name = layer.dispatchers.name(known.per_rank is not None, known.decode)
            told = f"case {number}, {name}, {known}"
            names.add(name)
            x_TD, (bare_TD, y_TD) = inputs[shared], wanted[shared]
            ids_T = torch.arange(len(x_TD)) + 1000 * context.rank if name == "coherent" else None
            hidden, report = layer(Hidden(None, x_TD, ids_T=ids_T), known)
            _compare(context, hidden, bare_TD, told)
            assert hidden.x_TD is None
            if name == "exact":
                assert max(sent_rows(report)) <= len(x_TD), "a row left more than once for a rank"
            assert int(report.dropped) == int(report.rerouted) == 0
            stream, _ = layer(Hidden(x_TD.clone(), None, before, ids_T), known, after)
            _compare(context, stream, rms_norm_reference(x_TD + y_TD, *after), told)
            _compare(context, Hidden(None, stream.x_TD, ids_T=stream.ids_T), x_TD + y_TD, told)
    return names


def _compare(context: RankContext, found: Hidden, wanted_TD: torch.Tensor, told: str) -> None:
    """Rows that have moved go home first."""
    found_TD = found.normalised()
    if found.ids_T is not None:
        everyones = context.all_gather_objects((found.ids_T.numpy(), found_TD.numpy()))
        ids_N, rows_ND = (np.concatenate(parts) for parts in zip(*everyones, strict=True))
        mine_N = np.flatnonzero(ids_N // 1000 == context.rank)
        found_TD = torch.from_numpy(rows_ND[mine_N[ids_N[mine_N].argsort()]])
    torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-4, atol=1e-4, msg=lambda text: f"{told}: {text}")


def _cases(world_size: int) -> list[Case]:
    cases = []
    for whole in (UNIFORM, HALF_SKEW, ALL_SKEW, UNPICKED):
        cases.append((whole, contiguous(1, 8, world_size), None))
        cases.append((whole, random_plan(whole.seed, 8, world_size), SCHEDULED))
    cases.append((UNIFORM, everywhere(1, 8, world_size), None))
    four = Whole(num_experts=4, top_k=1, seed=4)
    cases.append((four, random_plan(4, 4, world_size), None))
    sixty = Whole(num_experts=60, top_k=6, seed=5)
    cases.append((sixty, random_plan(5, 60, world_size), SCHEDULED))
    if world_size == 4:  # two nodes of two
        for whole, options in ((UNIFORM, None), (HALF_SKEW, SCHEDULED), (ALL_SKEW, None)):
            cases.append((whole, random_plan(whole.seed, 8, 4, ranks_per_node=2), options))
    return cases


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_dispatcher_equals_the_oracle(world_size):
    rows = ROWS[:world_size] if world_size > 1 else [256]
    names = run_ranks(_run_all, world_size, _cases(world_size), rows)
    wanted = {1: {"local"}, 2: {*DISPATCHERS} - {"local", "two_stage"}, 4: {*DISPATCHERS} - {"local"}}
    assert names == [wanted[world_size]] * world_size


def test_eight_ranks_equal_the_oracle():
    cases = [(HALF_SKEW, contiguous(1, 8, 8), SCHEDULED), (UNIFORM, random_plan(6, 8, 8), None)]
    run_ranks(_run_all, 8, cases, [3, 0, 7, 1, 20, 2, 0, 5])


def _random_cases(context: RankContext, seeds: list[int]) -> None:
    for seed in seeds:
        pick = random.Random(seed).choice
        num_experts = pick([4, 8, 13])
        whole = Whole(num_experts=num_experts, top_k=pick([1, 2, 3, 4]), seed=seed, skew={1: pick([0.0, 2.0, 50.0])})
        plan = random_plan(seed, num_experts, context.world_size)
        options = MoEOptions(faster=FasterOptions(schedule=pick([True, False]), group_size=pick([1, 2, 4])))
        rows = [pick([0, 1, 5, 33]) for _ in range(context.world_size)]
        rows[0] = max(rows[0], 1)
        _run_all(context, [(whole, plan, options)], rows)


@pytest.mark.parametrize("world_size", [2, 4])
def test_random_plans_with_replicas_equal_the_oracle(world_size):
    run_ranks(_random_cases, world_size, list(range(12)))


Trained = tuple[ExpertPlan, str, str, MoEOptions | None]


def _gradients(context: RankContext, whole: Whole, cases: list[Trained], rows: list[int]):
    """Gradients of Σ (output · pattern) over all ranks' rows: of the rows, the gate, and each expert's w2."""
    found = []
    for plan, attention, experts, options in cases:
        layer = build(whole, plan, context, attention, experts, options).requires_grad_(True)
        own = attention == "dp"
        x_TD = whole.rows(rows[context.rank] if own else rows[0], context.rank if own else 0).requires_grad_(True)
        y_TD, _ = run_layer(layer, x_TD, per_rank=max(rows))  # what is known makes no difference in training
        (y_TD * y_TD.detach().cos()).sum().backward()
        w2, layout = torch.zeros_like(whole.weights()[2]), layer.store.layout
        if layer.experts.w2.grad is not None:
            w2[list(layout.experts(0)), :, slice(*layout.hidden)] = layer.experts.w2.grad
        gate = layer.gate.weight.grad
        found.append((x_TD.grad, context.all_reduce(gate) if own else gate, context.all_reduce(w2)))
    return found


def _oracle_gradients(whole: Whole, inputs: list[torch.Tensor]):
    gate, w13, w2 = (w.requires_grad_(True) for w in whole.weights())
    xs = [x.requires_grad_(True) for x in inputs]
    for x_TD in xs:
        y_TD = moe_reference(x_TD, gate, w13, w2, whole.top_k)
        (y_TD * y_TD.detach().cos()).sum().backward()
    return [x.grad for x in xs], gate.grad, w2.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_the_oracles(world_size):
    rows, whole, plan = [9, 0, 4, 17][:world_size], HALF_SKEW, random_plan(7, 8, world_size)
    cases = [(plan, "dp", "ep", None), (plan, "dp", "ep", SCHEDULED), (plan, "dp", "tp", None)]
    cases += [(plan, "tp", "ep", None), (plan, "tp", "tp", None)]
    if world_size == 4:
        cases.append((random_plan(7, 8, 4, ranks_per_node=2), "dp", "ep", SCHEDULED))
    oracle = {
        "dp": _oracle_gradients(whole, [whole.rows(n, r) for r, n in enumerate(rows)]),
        "tp": _oracle_gradients(whole, [whole.rows(rows[0])]),
    }
    for rank, of_cases in enumerate(run_ranks(_gradients, world_size, whole, cases, rows)):
        for (_, attention, *_), (x_grad, gate_grad, w2_grad) in zip(cases, of_cases, strict=True):
            x_grads, gate, w2 = oracle[attention]
            if rows[rank] or attention == "tp":
                torch.testing.assert_close(x_grad, x_grads[rank if attention == "dp" else 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gate_grad, gate, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(w2_grad, w2, rtol=1e-4, atol=1e-5)


def _counted(context: RankContext, plans: list[tuple[Whole, ExpertPlan]], tokens: int):
    """Of each plan: the rows' choices and the rows sent; then bytes sent, rows sent and received by two exchanges."""
    rows = []
    for whole, plan in plans:
        _, report = run_layer(build(whole, plan, context), whole.rows(tokens, context.rank))
        rows.append((report.routing.experts_TK.tolist(), sent_rows(report)))
    sent_bytes = _count_bytes(context)
    layer, x_TD, found = build(HALF_SKEW, random_plan(9, 8, 4), context), HALF_SKEW.rows(50, context.rank), []
    for known in ({}, {"per_rank": 53, "decode": True}):
        sent_bytes.clear()
        _, report = run_layer(layer, x_TD, **known)
        handle = report.handles[0]
        found.append((sum(sent_bytes), None if known else handle.send, None if known else handle.receive))
    return rows, found


def _count_bytes(context: RankContext) -> list[int]:
    """Bytes of rows and choices that leave this rank for others, from now on."""
    sent, original = [], (dist.all_to_all_single, RankContext.all_gather)

    def all_to_all(out, x, receive, send, group):
        row_bytes = x[0].numel() * x.element_size() if len(x) else 0
        sent.append(row_bytes * (sum(send) - send[context.rank]))
        return original[0](out, x, receive, send, group=group)

    def all_gather(self, x):
        if x.is_floating_point():  # counts are whole numbers
            sent.append(x.numel() * x.element_size() * (self.world_size - 1))
        return original[1](self, x)

    dist.all_to_all_single, RankContext.all_gather = all_to_all, all_gather
    return sent


def test_rows_and_bytes_sent_are_those_the_plan_makes_necessary():
    """Counted: nothing leaves for an expert that is here; a row leaves once for each other rank it needs.

    Exact: out, a row and 3K numbers of four bytes for each row sent; back, one row for each row received. Static: out,
    room for every row to every other rank; back, the same number of rows.
    """
    holds = [{0, 1, 3}, {2, 3}, {3, 4, 5}, {3, 6, 7}]
    plan = ExpertPlan(torch.tensor([[sorted(h) + [-1] * (3 - len(h)) for h in holds]]).numpy(), 8)
    plans = [(UNIFORM, plan), (ALL_SKEW, plan), (UNIFORM, everywhere(1, 8, 4))]
    for rank, ((*cold, (hot_TK, hot)), found) in enumerate(run_ranks(_counted, 4, plans, 64)):
        for experts_TK, sent in cold:
            expected = [0] * 4
            for chosen in experts_TK:
                away = {next(r for r in range(4) if e in holds[r]) for e in chosen if e not in holds[rank]}
                for to in away:
                    expected[to] += 1
            assert sent == expected
            assert sent[rank] == 0
        assert (len(hot_TK), hot) == (64, [0, 0, 0, 0])
        (exact, send, receive), (static, *_) = found
        row_bytes, choice_bytes = HALF_SKEW.dim * 4, 3 * HALF_SKEW.top_k * 4
        assert exact == sum(send) * (row_bytes + choice_bytes) + sum(receive) * row_bytes
        assert static == 3 * 53 * (row_bytes + choice_bytes) + 3 * 53 * row_bytes


def _kept(context: RankContext) -> list[int]:
    """Rows that are alive behind a layer, of each way they can travel."""
    whole, found = Whole(), []
    norm = (torch.ones(whole.dim), 1e-5)
    memory = SymmetricExchange.create(context, 6, whole.dim, whole.top_k, torch.float32)
    for attention, known, tools in (
        ("dp", {}, {}), ("dp", {"per_rank": 6, "decode": True}, {}), ("tp", {"per_rank": 6}, {}),
        ("dp", {"per_rank": 6}, {"symmetric": memory}),
    ):  # fmt: skip
        layer = build(whole, contiguous(1, 8, context.world_size), context, attention, **tools)
        tensors = whole.rows(6), whole.rows(6)
        alive = [weakref.ref(tensor) for tensor in tensors]
        with torch.no_grad():
            hidden, report = layer(Hidden(*tensors, norm), StepRows(**known), norm)
        assert report.routing.experts_TK.shape == (6, 2)
        assert len(report.handles) == 1
        del tensors, hidden
        gc.collect()
        found.append(sum(one() is not None for one in alive))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_report_keeps_no_rows(world_size):
    """Every layer's rows stayed until the step ended: 16 GB more for 32,768 tokens of Mixtral-8x7B."""
    assert run_ranks(_kept, world_size) == [[0, 0, 0, 0]] * world_size
