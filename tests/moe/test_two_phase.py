"""Two phases change nothing but where rows are computed, decide as plain counting does, and alike on every rank."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mixtralkit.config import EngineConfig, FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.recorder import RoutingRecorder
from mixtralkit.engine.statistics import MoEStatistics
from mixtralkit.mixtral import Mixtral
from mixtralkit.moe.layer import MoELayer, MoEReport, StepRows
from mixtralkit.moe.reference import moe_reference
from mixtralkit.moe.shadow import Shadows
from mixtralkit.moe.two_phase import TwoPhase
from mixtralkit.ops.hidden import Hidden
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.cost import ShadowModel, choose_shadows
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.policies.two_phase import check_estimate
from mixtralkit.planning.popularity import PathPopularity, extend_paths
from mixtralkit.planning.trace import RoutingTrace
from tests.moe.layers import Whole, random_plan, stack
from tests.ranks import run_command, run_ranks

LAYERS, EXPERTS = 4, 8
WHOLES = [Whole(seed=seed, skew={(3 * seed) % 8: 3.0}) for seed in range(LAYERS)]
ROWS = [70, 7, 0, 1]  # different on each rank, one of them empty
EAGER = FasterOptions(net_bandwidth=1e13, gpu_throughput=1e9)  # any lead pays


@dataclass(frozen=True)
class Case:
    """A stack of layers over the ranks and the steps it runs."""

    plan: ExpertPlan
    popularity: PathPopularity
    threshold: float | None = None
    faster: FasterOptions = EAGER
    room: int = LAYERS * EXPERTS
    rows: tuple[int, ...] = tuple(ROWS)
    steps: int = 2
    dispatcher: str = "exact"


def _next(x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
    x_TD = x_TD + y_TD
    return torch.cat([torch.nn.functional.normalize(x_TD[:, :-1]) * 4, torch.ones_like(x_TD[:, -1:])], dim=1)


def _oracle(x_TD: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows behind the stack, and the first choices and others of every layer [T, K]."""
    chosen = []
    for whole in WHOLES:
        gate, w13, w2 = whole.weights()
        chosen.append((x_TD @ gate.T).topk(whole.top_k).indices)
        x_TD = _next(x_TD, moe_reference(x_TD, gate, w13, w2, whole.top_k))
    return x_TD, chosen


@cache
def _popularity(path_length: int = 2) -> PathPopularity:
    """Of other rows than the tests run."""
    _, chosen = _oracle(Whole(seed=77).rows(400))
    return PathPopularity.fit(RoutingTrace(torch.stack(chosen, 1).numpy().astype(np.int16), EXPERTS), path_length)


def _stack(case: Case, context: RankContext) -> tuple[list[MoELayer], TwoPhase]:
    whole, tools = WHOLES[0], {}
    if case.dispatcher == "symmetric":
        tools["symmetric"] = SymmetricExchange.create(context, 50, whole.dim, whole.top_k, torch.float32)
    layers, shadows = stack(WHOLES, case.plan, context, MoEOptions(case.faster), case.room, **tools)
    return layers, TwoPhase(shadows, case.popularity, case.threshold)


@torch.no_grad()
def _step(layers: list[MoELayer], phases: TwoPhase, x_TD: torch.Tensor, case: Case) -> list[MoEReport]:
    """One step through the stack, compared with the oracle."""
    expected, _ = _oracle(x_TD)
    known = {} if case.dispatcher == "exact" else {"per_rank": max(case.rows), "decode": case.dispatcher == "static"}
    rows, reports = StepRows(flight=phases.begin(), **known), []
    for layer in layers:
        hidden, report = layer(Hidden(None, x_TD), rows)
        x_TD = _next(x_TD, hidden.rows_TD)
        reports.append(report)
    torch.testing.assert_close(x_TD, expected, rtol=1e-3, atol=1e-3)
    return reports


def _run(context: RankContext, cases: list[Case]):
    """Of each case and step: the shadow report of every layer, and this rank's choices."""
    results = []
    for case in cases:
        layers, phases = _stack(case, context)
        steps = []
        for step in range(case.steps):
            x_TD = Whole(seed=5 + step).rows(case.rows[context.rank], context.rank)
            reports = _step(layers, phases, x_TD, case)
            steps.append(([r.shadows for r in reports], [r.routing.experts_TK.numpy() for r in reports]))
        results.append(steps)
    return results


def _nodes(plan: ExpertPlan) -> ExpertPlan:
    return replace(plan, ranks_per_node=2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_two_phases_change_nothing(world_size):
    plain, replicas = contiguous(1, 8, world_size), random_plan(3, 8, world_size)
    cases = [
        Case(plain, _popularity()),
        Case(replicas, _popularity(), threshold=0.0),
        Case(plain, _popularity(), threshold=1.0, faster=replace(EAGER, schedule=True)),
        Case(plain, _popularity(0), room=3),
        Case(plain, _popularity(), dispatcher="static"),
        Case(replicas, _popularity(), dispatcher="symmetric"),
    ]
    if world_size == 4:
        cases.append(Case(_nodes(replicas), _popularity(), faster=replace(EAGER, schedule=True)))
    results = run_ranks(_run, world_size, cases)
    for of_case in zip(*results, strict=True):
        for of_step in zip(*of_case, strict=True):
            assert all(shadows == of_step[0][0] for shadows, _ in of_step), "ranks must decide alike"
    moved = [sum(s.phases.bytes_ahead for s in steps[0][0][1:]) for steps in results[0]]
    assert all(moved), "every case must have copies that came ahead"


def _expected(case: Case, choices: list[np.ndarray], layer: int):
    """What the two phases must find in a layer, from the choices of all ranks, counted on the host."""
    paths_T = np.zeros(len(choices[0]), np.int64)
    for earlier in range(layer):
        paths_T = extend_paths(paths_T, choices[earlier][:, 0].astype(np.int64), case.popularity.path_length, EXPERTS)
    estimate_E = case.popularity.estimate(layer, paths_T)
    return check_estimate(estimate_E, np.bincount(choices[layer].ravel(), minlength=EXPERTS), 2, case.threshold)


def test_decisions_are_those_of_plain_counting():
    thresholds = [None, 0.0, 0.1, 1.0]
    cases = [Case(contiguous(1, 8, 2), _popularity(), threshold, steps=4) for threshold in thresholds]
    results = run_ranks(_run, 2, cases)
    for case, *of_ranks in zip(cases, *results, strict=True):
        kept = set()
        for of_step in zip(*of_ranks, strict=True):
            choices = [np.concatenate(parts) for parts in zip(*(chosen for _, chosen in of_step), strict=True)]
            shadows = of_step[0][0]
            assert shadows[0].phases is None, "nothing comes before the first layer"
            for layer in range(1, LAYERS):
                found, expected = shadows[layer].phases, _expected(case, choices, layer)
                assert (found.right, found.corrected) == (expected.right, expected.corrected)
                assert found.distance == pytest.approx(expected.distance, abs=1e-6)
                kept.add(not found.corrected)
                if not found.corrected:
                    assert found.bytes_ahead == shadows[layer].bytes_broadcast, "nothing is late without a correction"
        assert kept == {0.0: {False}, 1.0: {True}}.get(case.threshold, {False, True})


def _count_broadcasts(context: RankContext, cases: list[Case]):
    """Of each case and step: bytes that came ahead and late by the reports, and that moved beside and at once."""
    started, broadcast, found = [], dist.broadcast, []

    def counted(tensor, *args, **more):
        started.append((tensor.numel() * tensor.element_size(), more.get("async_op", False)))
        return broadcast(tensor, *args, **more)

    dist.broadcast = counted
    for case in cases:
        layers, phases = _stack(case, context)
        for _ in range(2):
            started.clear()
            x_TD = Whole(seed=5).rows(case.rows[context.rank], context.rank)
            shadows = [report.shadows for report in _step(layers, phases, x_TD, case)]
            ahead = sum(s.phases.bytes_ahead for s in shadows[1:])
            late = sum(s.bytes_broadcast for s in shadows) - ahead
            found.append(
                (ahead, late, sum(n for n, free in started if free), sum(n for n, free in started if not free))
            )
            _check_timings(shadows)
    return found


def _check_timings(shadows: list) -> None:
    timings = [s.phases.timing for s in shadows[1:]]
    assert all((t is None) == (s.bytes_broadcast == 0) for t, s in zip(timings, shadows[1:], strict=True))
    assert all(t.hidden_s >= 0 and t.waited_s >= 0 for t in timings if t)
    assert all(t.hidden_s == 0 for t, s in zip(timings, shadows[1:], strict=True) if t and not s.phases.bytes_ahead)


def test_bytes_are_those_that_moved_and_residents_do_not_move_again():
    cases = [Case(contiguous(1, 8, 2), _popularity(), threshold, rows=(70, 40)) for threshold in (0.0, 1.0)]
    for found in run_ranks(_count_broadcasts, 2, cases):
        for first, second in (found[:2], found[2:]):
            ahead, late, moved_beside, moved_at_once = first
            assert (ahead, late) == (moved_beside, moved_at_once)
            assert ahead > 0
            assert second == (0, 0, 0, 0)


def test_copies_in_use_are_not_pushed_out():
    """The next layer's copies must not land where this layer's experts are being read."""
    layers, shadows = stack(WHOLES, contiguous(1, 8, 2), RankContext(0, 2), MoEOptions(EAGER), room=1)
    mild_E, hot_E = np.ones(8), np.ones(8)
    mild_E[3], hot_E[3] = 50, 100

    def bring(layer: int, loads_E: np.ndarray, in_use: int | None = None) -> list[int]:
        return shadows.bring(layer, loads_E, carry=lambda weights, owner, theirs: None, in_use=in_use)

    assert bring(0, mild_E) == [3]
    assert bring(1, hot_E, in_use=0) == []
    assert shadows.store.copied(0) == {3}
    assert bring(1, hot_E, in_use=2) == [3]
    assert shadows.store.copied(0) == set()
    assert (layers[0].table.replicas.slots_WE < 0).any(0).all(), "the table says so"


def test_a_wrong_estimate_is_corrected_or_kept():
    """The profile swears by expert 7; in layer 1 it is expert 3 that is hot."""
    wrong = PathPopularity.fit(
        RoutingTrace(np.array([[[7, token % 7]] * LAYERS for token in range(70)], np.int16), 8), 1
    )
    cases = [Case(contiguous(1, 8, 2), wrong, threshold, rows=(70, 40), steps=1) for threshold in (None, 1.0)]
    for of_rank in run_ranks(_run, 2, cases):
        for case, [(shadows, _)] in zip(cases, of_rank, strict=True):
            of_layer, corrects = shadows[1], case.threshold is None
            assert not of_layer.phases.right
            assert of_layer.phases.bytes_ahead > 0
            assert of_layer.phases.corrected == corrects
            assert 7 in of_layer.broadcast
            assert (3 in of_layer.broadcast) == (3 in of_layer.experts) == corrects


class _LateWork:
    """A broadcast that begins when it is waited for: the slowest that a network can be."""

    def __init__(self, start) -> None:
        self.wait = start

    def get_future(self) -> _LateWork:
        return self

    def add_done_callback(self, _) -> None:
        pass


def _on_a_slow_network(context: RankContext, case: Case):
    broadcast = dist.broadcast

    def late(tensor, *args, async_op=False, **more):
        if async_op:
            return _LateWork(lambda: broadcast(tensor, *args, **more))
        return broadcast(tensor, *args, **more)

    dist.broadcast = late
    return _run(context, [case])


def test_copies_are_waited_for():
    case = Case(contiguous(1, 8, 2), _popularity(), threshold=1.0, rows=(70, 40))
    [[first, _]], _ = run_ranks(_on_a_slow_network, 2, case)
    assert sum(shadows.phases.bytes_ahead for shadows in first[0][1:]) > 0


def test_training_has_no_estimates():
    _, phases = _stack(Case(contiguous(1, 8, 1), _popularity()), RankContext())
    assert phases.begin() is None
    with torch.no_grad():
        assert phases.begin() is not None


@pytest.mark.parametrize("path_length", [0, 1, 6])
def test_the_estimate_on_the_device_is_the_profiles(path_length):
    popularity = _popularity(path_length)
    _, phases = _stack(Case(contiguous(1, 8, 1), popularity), RankContext())
    rng = np.random.default_rng(0)
    for layer in range(LAYERS):
        codes_T = rng.integers(0, EXPERTS ** min(path_length, layer), 50)
        found_E = phases.estimate(layer, torch.from_numpy(codes_T)).numpy()
        np.testing.assert_allclose(found_E, popularity.estimate(layer, codes_T), rtol=1e-5)


def _shadows() -> Shadows:
    return stack(WHOLES[:1], contiguous(1, 8, 1), RankContext(), MoEOptions(EAGER), room=1)[1]


def test_tables_that_are_too_large_are_refused():
    keys = [np.zeros(0, np.int64)] * 8
    with pytest.raises(ValueError, match=r"path_length \(5\) layers over 64 experts take .* GB"):
        TwoPhase(_shadows(), PathPopularity(64, 2, 5, keys, keys))


def test_hidden_seconds_make_shadows_cheaper():
    """A copy that costs ten times what its expert's rows do is taken once nine tenths of it are hidden."""
    model = ShadowModel.for_inference(16, 1.5, net_bandwidth=1e9, gpu_throughput=1e9)
    loads = [model.s_per_shadow / model.s_per_row / 10, 0, 0, 0]
    hidden = 0.9 * model.s_per_shadow
    assert choose_shadows(loads, model) == ()
    assert choose_shadows(loads, model, hidden_s=hidden * 0.999) == ()
    assert choose_shadows(loads, model, hidden_s=hidden * 1.001) == (0,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamic": "three_phase"}, "dynamic ('three_phase') must be 'none' or 'two_phase'"),
        ({"dynamic": "two_phase"}, "popularity must name a profile with dynamic 'two_phase'"),
        ({"popularity": "p.npz"}, "popularity (p.npz) needs dynamic 'two_phase'"),
        ({"finetune_threshold": 0.5}, "finetune_threshold (0.5) needs dynamic 'two_phase'"),
        (
            {"dynamic": "two_phase", "popularity": "p", "finetune_threshold": 1.5},
            "finetune_threshold (1.5) must be a number in [0, 1]",
        ),
        ({"dynamic": "two_phase", "popularity": "p", "backend": "fastmoe"}, "needs moe_backend 'mixtralkit'"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        MoEOptions(**options)


def test_a_profile_of_another_model_is_refused(tmp_path):
    _popularity().save(tmp_path / "profile.npz")
    config = WHOLES[0].config()
    options = MoEOptions(dynamic="two_phase", popularity=tmp_path / "profile.npz")
    with pytest.raises(ValueError, match=r"profile.npz: num_layers \(4\) must be the model's 1"):
        TwoPhase.for_model(_shadows(), config, options)
    with pytest.raises(ValueError, match="cannot be read"):
        TwoPhase.for_model(None, config, replace(options, popularity=tmp_path / "none.npz"))


CKPTS = Path(__file__).resolve().parent.parent.parent / "ckpts"
PROMPTS = ["In the beginning", "def read(path):\n", "NAME\n       tar -", "The function returns", "Moses"]


def _mixtral(context: RankContext, attention: str, options: MoEOptions) -> Mixtral:
    return Mixtral.load(
        EngineConfig.of(
            model=CKPTS, max_seq_len=64, dtype="float32", attention=attention, experts="ep", moe=options
        ),
        context,
    )  # fmt: skip


def _text(context: RankContext, ways: list[MoEOptions]):
    found = []
    for options in ways:
        mixtral = _mixtral(context, "dp", options)
        mixtral.engine.observe = statistics = MoEStatistics(mixtral.model)
        done = mixtral.complete(PROMPTS, 16, temperature=0)
        found.append(([c.tokens for c in done], statistics.totals(), statistics.phases.totals(), statistics.table()))
    return found


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> tuple[list[list[int]], Path]:
    """The shipped model's greedy text on one rank, and the popularity profile of that run."""
    folder = tmp_path_factory.mktemp("popularity")
    mixtral = _mixtral(RankContext(), "tp", MoEOptions())
    with RoutingRecorder(mixtral.model, folder / "trace.npz") as mixtral.engine.observe:
        done = mixtral.complete(PROMPTS, 16, temperature=0)
    PathPopularity.fit(RoutingTrace.load(folder / "trace.npz"), 3).save(folder / "profile.npz")
    return [completion.tokens for completion in done], folder / "profile.npz"


@pytest.mark.parametrize("world_size", [2, 4])
def test_greedy_text_of_the_shipped_model_stays(shipped, world_size):
    text, profile = shipped
    exact = MoEOptions(EAGER, "exact", dynamic="two_phase", popularity=profile)
    tight = replace(exact, faster=replace(EAGER, schedule=True), finetune_threshold=0.2, shadow_memory_gb=1e-3)
    for results in run_ranks(_text, world_size, [replace(exact, exchange="auto"), exact, tight]):
        for way, (tokens, totals, phases, table) in zip(("auto", "exact", "tight"), results, strict=True):
            assert tokens == text, way
            steps = phases[1].estimates
            assert phases[0].estimates == 0
            assert all(layer.estimates == steps and 0 <= layer.right <= steps for layer in phases[1:])
            assert all(layer.corrections == steps - layer.right for layer in phases[1:]) or way == "tight"
            assert all(p.bytes_ahead <= t.shadow_bytes for p, t in zip(phases, totals, strict=True))
            assert sum(p.bytes_ahead for p in phases) > 0
            assert len(table.splitlines()) == 2 * (len(totals) + 1) + 1


def test_the_command_shows_its_statistics(shipped):
    _, profile = shipped
    ways = ("generate", "-m", CKPTS, "--device", "cpu", "--dtype", "float32", "--exchange", "exact")
    ways += ("--max_gen_len", 3, "--moe_report", "--dynamic", "two_phase", "--popularity", profile)
    done, other = run_command(2, *ways, "--finetune_threshold", 0.3)
    assert done.returncode == other.returncode == 0, done.stderr
    assert "estimates         right   corrections   bytes_ahead     hidden_ms     waited_ms" in done.stderr


def test_the_command_wants_a_profile(command_line):
    done = command_line("generate", "-m", CKPTS, "--dynamic", "two_phase")
    assert done.returncode != 0
    assert done.stderr.strip().startswith("error: popularity must name a profile with dynamic 'two_phase'")
