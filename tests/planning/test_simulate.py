"""The simulator against the real layer on gloo ranks, byte for byte, and against traffic that can be derived."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mixtralkit.config import FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.moe.dispatch import coherent, exchange
from mixtralkit.moe.layer import StepRows
from mixtralkit.ops.hidden import Hidden
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import predict, sample_routing, simulate
from mixtralkit.planning.trace import RoutingTrace
from tests.moe.layers import Whole, build, random_plan, run_layer
from tests.planning.machines import machine
from tests.ranks import run_ranks

TOKENS = 33  # of each rank: chunks are uneven


class _Counter:
    """Bytes this rank sends to every other while it is open, at the calls that send them."""

    def __init__(self, context: RankContext) -> None:
        self.bytes_W = np.zeros(context.world_size)
        self.originals = exchange.all_to_all, exchange.gather_ranks

    def __enter__(self) -> np.ndarray:
        def all_to_all(x, context, send, receive):
            if context.group is not None:
                for to, rows in zip(dist.get_process_group_ranks(context.group), send, strict=True):
                    self.bytes_W[to] += rows * x[0:1].numel() * x.element_size() if len(x) else 0
            return self.originals[0](x, context, send, receive)

        def gather_ranks(x, context):
            self.bytes_W += x.numel() * x.element_size()
            return self.originals[1](x, context)

        exchange.all_to_all = coherent.all_to_all = all_to_all
        exchange.gather_ranks = gather_ranks
        return self.bytes_W

    def __exit__(self, *_) -> None:
        exchange.all_to_all = coherent.all_to_all = self.originals[0]
        exchange.gather_ranks = self.originals[1]


def _run_layer(context: RankContext, whole: Whole, plan: ExpertPlan, dispatcher: str, chunks: int):
    """One forward; choices, weights, what was dropped, bytes to each rank, choices computed here."""
    options = MoEOptions(faster=FasterOptions(schedule=chunks > 1, group_size=max(1, context.world_size // chunks)))
    layer = build(whole, plan, context, options=options)
    x_TD = whole.rows(TOKENS, context.rank)
    computed = []
    layer.experts.register_forward_pre_hook(lambda _, args: computed.append(int((args[0].slots_RK >= 0).sum())))
    with _Counter(context) as bytes_W:
        _, report = run_layer(layer, x_TD, **({"per_rank": TOKENS, "decode": True} if dispatcher == "static" else {}))
    bytes_W[context.rank] = 0
    if dispatcher == "exact":
        row = 4 * whole.dim * 2 + 4 * 3 * whole.top_k
        sent = np.sum([h.send for h in report.handles], axis=0)
        back = np.sum([h.receive for h in report.handles], axis=0)
        assert bytes_W.tolist() == (sent * (row - 4 * whole.dim) + back * 4 * whole.dim).tolist()
    routing = report.routing
    return routing.experts_TK.numpy(), routing.weights_TK.numpy(), int(report.dropped), bytes_W, sum(computed)


SKEWED = Whole(seed=1, skew={3: 2.0})
CASES = {
    "contiguous": (SKEWED, contiguous(1, 8, 4), "exact", 1),
    "everything at home": (SKEWED, everywhere(1, 8, 4), "exact", 1),
    "replicas": (SKEWED, random_plan(3, 8, 4), "exact", 1),
    "more replicas": (Whole(num_experts=60, top_k=6, seed=5), random_plan(5, 60, 4), "exact", 1),
    "schedule": (SKEWED, random_plan(3, 8, 4), "exact", 2),
    "schedule of four": (SKEWED, random_plan(4, 8, 4), "exact", 4),
    "capacity": (SKEWED, random_plan(3, 8, 4, cold_capacity_factor=0.75, cold_token_percent=0.8), "exact", 1),
    "capacity, by arrival": (SKEWED, random_plan(3, 8, 4, cold_capacity_factor=0.75, cut_order="arrival"), "exact", 1),
    "static": (SKEWED, random_plan(3, 8, 4), "static", 1),
    "two stages": (SKEWED, random_plan(3, 8, 4, ranks_per_node=2), "two_stage", 1),
    "two stages, scheduled": (SKEWED, random_plan(6, 8, 4, ranks_per_node=2), "two_stage", 2),
}


def _run_layers(context: RankContext):
    return [_run_layer(context, *case) for case in CASES.values()]


def test_bytes_and_loads_are_those_of_the_layer():
    results = run_ranks(_run_layers, 4)
    for (name, case), *ranks in zip(CASES.items(), *results, strict=True):
        whole, plan, dispatcher, chunks = case
        experts, weights = (np.concatenate([rank[i] for rank in ranks])[:, None] for i in (0, 1))
        trace = RoutingTrace(experts.astype(np.int16), whole.num_experts, weights.astype(np.float16))
        shape = ModelShape.of(whole.config(), data_bytes=4)
        execution = Execution(dispatcher, batch=TOKENS, chunks=chunks)
        found = simulate(plan, trace, shape, machine(across=True), execution)
        assert found.links_WW.tolist() == [rank[3].tolist() for rank in ranks], name
        assert found.rows_LW[0].tolist() == [rank[4] for rank in ranks], name
        assert found.dropped_L.sum() == sum(rank[2] for rank in ranks), name
        assert found.links_WW.sum() > 0 or name == "everything at home"
        assert found.dropped_L.sum() > 0 or not name.startswith("capacity")


COHERENT = [
    (top_k, random_plan(seed, 8, 4) if seed else contiguous(1, 8, 4), streams)
    for top_k, streams in ((1, False), (2, True), (3, False))
    for seed in (0, 3)
]


@torch.no_grad()
def _move_three_times(context: RankContext):
    """Rows pass one layer three times and stay where their experts are; ids and choices of every pass."""
    found = []
    for top_k, plan, streams in COHERENT:
        whole = Whole(top_k=top_k)
        layer = build(whole, plan, context, attention="coherent")
        x_TD, ids_T = whole.rows(TOKENS, context.rank), torch.arange(TOKENS) + TOKENS * context.rank
        norm = (torch.ones(whole.dim), 1e-5) if streams else None
        hidden = Hidden(x_TD, None, norm, ids_T) if streams else Hidden(None, x_TD, None, ids_T)
        passes = []
        with _Counter(context) as bytes_W:
            for _ in range(3):
                ids_T = hidden.ids_T
                hidden, report = layer(hidden, StepRows(decode=True), norm)
                passes.append((ids_T.numpy(), report.routing.experts_TK.numpy()))
        bytes_W[context.rank] = 0
        found.append((passes, bytes_W))
    return found


def test_coherent_bytes_are_those_of_the_layer():
    for (top_k, plan, _), *ranks in zip(COHERENT, *run_ranks(_move_three_times, 4), strict=True):
        experts = np.empty((4 * TOKENS, 3, top_k), np.int16)
        for passes, _ in ranks:
            for number, (ids, chosen) in enumerate(passes):
                experts[ids, number] = chosen
        three = ExpertPlan(np.repeat(plan.slots_LWS, 3, 0), 8)
        shape = ModelShape.of(Whole(top_k=top_k).config(), data_bytes=4)
        found = simulate(three, RoutingTrace(experts, 8), shape, machine(), Execution("coherent", TOKENS))
        assert found.links_WW.tolist() == [sent.tolist() for _, sent in ranks]


def _even_trace(num_experts: int, top_k: int, layers: int = 1) -> RoutingTrace:
    """From every rank (block of E tokens), each expert gets the same number of choices; none twice by a token."""
    first = np.tile(np.arange(num_experts), num_experts)
    experts = (first[:, None] + np.arange(top_k) * 1) % num_experts
    return RoutingTrace(np.repeat(experts[:, None], layers, 1).astype(np.int16), num_experts)


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 8, 12, 16])
def test_expert_parallel_sends_less_than_tensor_parallel_exactly_below_the_world_size(world_size, top_k):
    """The course notes' rule for one row a choice: 4·T·K·D against 4·(W·T)·D, both less what stays at home."""
    trace, shape = _even_trace(16, top_k), _shape(16, top_k)
    tokens, plan = trace.num_tokens / world_size, contiguous(1, 16, world_size)
    tensor = simulate(plan, trace, shape, machine(), Execution("split_width")).links_WW.sum(1)
    expert = simulate(plan, trace, shape, machine())
    away = (world_size - 1) / world_size
    by_choice = 2 * shape.row_bytes * expert.choices_away_L[0] / world_size
    assert by_choice == pytest.approx(4 * tokens * top_k * shape.dim * away)
    np.testing.assert_allclose(tensor, 4 * tokens * world_size * shape.dim * away)
    assert (by_choice < tensor[0] * (1 - 1e-9)) == (top_k < world_size)
    rows = expert.links_WW.sum() / (2 * shape.row_bytes + shape.packed_bytes)
    assert rows <= expert.choices_away_L[0], "a row leaves once for a rank, not once for a choice"


def test_the_replay_is_the_sum_of_its_steps_and_of_its_layers():
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(8, dtype=np.int16), (96, 3, 1)), axis=2)[:, :, :2]
    plan, shape = _replicas(3, 8, 4), _shape(8, 2)

    def run(tokens: slice, layers: slice, batch: int | None):
        part = ExpertPlan(plan.slots_LWS[layers], 8)
        trace = RoutingTrace(experts[tokens, layers], 8)
        return simulate(part, trace, shape, machine(), Execution(batch=batch))

    whole = run(slice(None), slice(None), 8)
    steps = [run(slice(32 * i, 32 * i + 32), slice(None), None) for i in range(3)]
    assert whole.steps == 3
    np.testing.assert_allclose(whole.seconds_L, sum(step.seconds_L for step in steps))
    np.testing.assert_allclose(whole.links_WW, sum(step.links_WW for step in steps))
    np.testing.assert_allclose(whole.rows_LW, sum(step.rows_LW for step in steps))
    layers = [run(slice(None), slice(i, i + 1), 8) for i in range(3)]
    np.testing.assert_allclose(whole.seconds_L, [layer.seconds_L[0] for layer in layers])
    np.testing.assert_allclose(whole.bytes_L, [layer.bytes_L[0] for layer in layers])


def test_crossings_by_hand():
    """Two ranks with experts 0, 1 and 2, 3: the first token stays, the second crosses twice, the third once."""
    experts = np.array([[0, 1, 0], [0, 2, 1], [3, 2, 1]], np.int16)[:, :, None]
    found = simulate(contiguous(3, 4, 2), RoutingTrace(experts, 4), _shape(4, 1), machine())
    assert found.crossings_per_token == 1.0
    assert found.rows_LW.tolist() == [[2, 1], [1, 2], [3, 0]]
    assert found.max_over_mean_L.tolist() == pytest.approx([4 / 3, 4 / 3, 2])
    assert found.mean_over_max_L.tolist() == pytest.approx([3 / 4, 3 / 4, 1 / 2])


def test_two_stages_cross_the_wire_between_nodes_once_a_row():
    experts = np.array([[[4, 6]], [[4, 6]], [[4, 6]], [[4, 6]]], np.int16)  # ranks 2 and 3, one a token's rank
    plan, shape = ExpertPlan(contiguous(1, 8, 4).slots_LWS, 8, ranks_per_node=2), _shape(8, 2)
    row = 2 * shape.row_bytes + shape.packed_bytes
    far = machine(across=True)
    direct = simulate(plan, RoutingTrace(experts, 8), shape, far, Execution("exact")).bytes_by_network
    staged = simulate(plan, RoutingTrace(experts, 8), shape, far, Execution("two_stage")).bytes_by_network
    assert direct == (2 * row, 4 * row)
    assert staged == (4 * row, 2 * row)


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_capacity_by_hand(overflow):
    """Ten tokens on one of two ranks choose expert 1, which is away and takes ceil(10 · 0.5 / 2) of them."""
    plan = ExpertPlan(np.array([[[0], [1]]]), 2, cold_capacity_factor=0.5, overflow=overflow)
    experts = np.r_[np.ones(10), np.zeros(10)].astype(np.int16)[:, None, None]
    weights = np.linspace(0, 1, 20, dtype=np.float16)[:, None, None]
    found = simulate(plan, RoutingTrace(experts, 2, weights), _shape(2, 1), machine())
    kept = 3  # of each rank, the heaviest
    assert found.dropped_L[0] == (14 if overflow == "drop" else 0)
    assert found.rerouted_L[0] == (0 if overflow == "drop" else 14)
    assert found.rows_LW[0].tolist() == ([kept, kept] if overflow == "drop" else [kept + 7, kept + 7])


def test_the_schedule_hides_time_only_where_the_machine_overlaps():
    trace, plan, shape = _even_trace(16, 2), contiguous(1, 16, 4), _shape(16, 2)
    plain = simulate(plan, trace, shape, machine(overlaps=True), Execution("exact", chunks=2))
    phases = plain.phases_LP[0]
    assert 0 < plain.hidden_L[0] <= min(phases[3], phases[2] + phases[4])
    assert simulate(plan, trace, shape, machine(overlaps=False), Execution("exact", chunks=2)).hidden_L[0] == 0


def test_a_better_plan_is_predicted_to_be_faster():
    loads_LE = np.tile([50.0, 50, 1, 1, 1, 1, 1, 1], (4, 1))
    shape = ModelShape(4096, 14336, 8, 2, 32, 8, 128, 32000)
    execution = Execution("exact", batch=2048)
    even = ExpertPlan(np.tile([[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 6, 7], [0, 1, -1, -1]], (4, 1, 1)), 8)
    fast, slow = (predict(plan, loads_LE, shape, machine(), execution) for plan in (even, contiguous(4, 8, 4)))
    assert fast < 0.6 * slow


def test_sampled_routing_has_the_shares_it_was_given():
    loads_LE = np.array([[4.0, 3, 2, 1, 1, 1, 0, 4], [1, 1, 1, 1, 1, 1, 1, 1]])
    trace = sample_routing(loads_LE, 20_000, 3)
    shares = trace.loads_LE() / (20_000 * 3)
    np.testing.assert_allclose(shares, loads_LE / loads_LE.sum(1, keepdims=True), atol=0.01)
    assert trace.loads_LE()[0, 6] == 0
    crowded = sample_routing(np.array([[100.0, 1, 1, 2]]), 1000, 2).loads_LE()[0]
    assert crowded[0] == 1000, "more than 1/K of the choices cannot be one expert's"
    assert crowded[1:].sum() == 1000


def test_a_thousand_ranks():
    """1,024 ranks of 128 nodes; docs/simulator.md has what it takes."""
    trace = sample_routing(np.random.default_rng(0).dirichlet(np.full(64, 4.0), 1), 10_000, 8)
    slots = np.stack([np.arange(1024) % 64, (np.arange(1024) * 7 + 1) % 64], 1)
    plan = ExpertPlan(slots[None], 64, ranks_per_node=8)
    shape = _shape(64, 8)
    found = simulate(plan, trace, shape, machine(across=True), Execution("two_stage"))
    assert found.rows_LW.sum() == 10_000 * 8
    held_WE = plan.holds_LWE[0].reshape(128, 8, 64).any(1)
    home_T = np.arange(10_000) * 1024 // 10_000 // 8
    elsewhere_T = (~held_WE[home_T[:, None], trace.experts[:, 0]]).sum(1)
    row = 2 * shape.row_bytes + shape.packed_bytes
    rows_across = found.bytes_by_network[1] / row
    assert rows_across == int(rows_across), "whole rows"
    assert (elsewhere_T > 0).sum() < rows_across < elsewhere_T.sum(), "once for a node, and not for each choice there"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dispatcher": "pp"}, r"dispatcher \('pp'\) must be one of local, "),
        ({"batch": 0}, r"batch \(0\) must be a whole number of at least 1"),
        ({"dispatcher": "split_width", "chunks": 2}, r"chunks \(2\) must be 1 with dispatcher split_width"),
    ],
)
def test_bad_executions(changes, words):
    with pytest.raises(ValueError, match=words):
        Execution(**changes)


def test_what_does_not_fit_is_named():
    trace = _even_trace(8, 2)
    with pytest.raises(ValueError, match=r"num_layers \(2\) must be 1"):
        simulate(contiguous(2, 8, 4), trace, _shape(8, 2), machine())
    with pytest.raises(ValueError, match=r"model: top_k \(1\) must be 2"):
        simulate(contiguous(1, 8, 4), trace, _shape(8, 1), machine())
    far = ExpertPlan(contiguous(1, 8, 4).slots_LWS, 8, ranks_per_node=2)
    with pytest.raises(ValueError, match=r"across of hardware test \(null\) must be given: 4 ranks span nodes"):
        simulate(far, trace, _shape(8, 2), machine())
    with pytest.raises(ValueError, match="loads must be numbers of at least 0"):
        sample_routing(np.array([[1.0, np.nan]]), 4, 1)


def _shape(num_experts: int, top_k: int) -> ModelShape:
    return ModelShape(64, 128, num_experts, top_k, 4, 2, 16, 100)


def _replicas(layers: int, num_experts: int, world_size: int) -> ExpertPlan:
    plans = [random_plan(seed, num_experts, world_size).slots_LWS for seed in range(layers)]
    most = max(plan.shape[2] for plan in plans)
    padded = [np.pad(plan, ((0, 0), (0, 0), (0, most - plan.shape[2])), constant_values=-1) for plan in plans]
    return ExpertPlan(np.concatenate(padded), num_experts)
