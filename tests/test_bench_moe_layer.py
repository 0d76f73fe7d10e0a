"""benchmarks/layer/bench_moe_layer.py on gloo ranks: its lines, its counts by brute force, its bound, its picture."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from benchmarks.common.ceilings import Ceilings
from benchmarks.layer import bench_moe_layer as bench
from benchmarks.layer import timing as layer_timing
from benchmarks.layer import variants as layer_variants
from benchmarks.layer.cases import INPUT_SETS, Bench, Case, RoutingKind
from benchmarks.layer.counts import summary
from benchmarks.layer.timing import phases_ms, timeline, whole_ms
from mixtralkit.config import FasterOptions, ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.planning import replicas as spread
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent


DIM, HIDDEN, EXPERTS, TOP_K = 32, 48, 8, 2
SIZES = {"dim": DIM, "hidden": HIDDEN, "device": "cpu", "repeats": 1}
PHASES = {"gate", "permute", "dispatch", "experts", "combine"}


def run_bench(context: RankContext, options: dict) -> tuple[list[dict], str]:
    """This rank's lines of JSON on stdout, and its stderr."""
    rank = str(context.rank)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(context.world_size)}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        bench.bench_moe_layer(**{**SIZES, **options})
    return [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


def make_case(context: RankContext, kind: RoutingKind, rows: int) -> Case:
    ranks = context.world_size
    config = ModelConfig(
        dim=DIM, n_layers=INPUT_SETS, head_dim=2, hidden_dim=HIDDEN, n_heads=ranks, n_kv_heads=ranks, vocab_size=ranks,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K,
    )  # fmt: skip
    # copies cost nothing, so that shadows come as soon as one expert has more rows than another
    faster = FasterOptions(net_bandwidth=1e18, gpu_throughput=1e9)
    return Case.draw(Bench.create(context, config, torch.float32, rows, faster, graphs=True, seed=3), kind, rows)


def skewed() -> RoutingKind:
    return RoutingKind.parse("skew:0.4", EXPERTS, TOP_K, None)


@pytest.fixture
def trace(tmp_path) -> Path:
    """An ExFlow trace: int8 [tokens, layers, K]."""
    random = np.random.default_rng(5)
    ids = [[random.permutation(EXPERTS)[:TOP_K] for _ in range(3)] for _ in range(7)]
    np.save(tmp_path / "trace.npy", np.array(ids, np.int8))
    return tmp_path / "trace.npy"


# --- lines


def test_every_variant_on_two_ranks(tmp_path):
    output = tmp_path / "lines.json"
    (lines, table), others = run_ranks(run_bench, 2, {"tokens": "5", "routing": "skew:0.5", "output": output})
    assert others == ([], "")
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    names = [*layer_variants.ALL, "loop_over_experts", "padded_all_gather"]
    assert [(line["routing"], line["variant"]) for line in lines] == [
        *itertools.product(("uniform", "skew:0.5"), names)
    ]
    assert all(name in table for name in names)
    for line in lines:
        name = line["variant"]
        assert line["skew"] == ("none" if line["routing"] == "uniform" else "injected")
        assert line["error"] < 1e-4
        assert line["graph"] is False
        assert line["spread_ms"][0] <= line["ms"] <= line["spread_ms"][1]
        phases = [part for phase in line["phases_ms"] for part in phase.split("+")]
        assert set(phases) <= PHASES
        assert len(phases) == len(set(phases))
        assert {"gate", "experts"} <= set(phases)
        assert line["fused"] == [phase for phase in line["phases_ms"] if "+" in phase]
        assert line["share_of_bound"] == pytest.approx(line["bound_ms"] / line["ms"], abs=1e-3)
        assert line["rows_max_over_mean"] >= 1 >= line["rows_mean_over_max"] > 0
        assert line["dropped"] == 0 or "capacity" in name
        at_home = ("everywhere", "loop_over_experts")  # through memory one of few rows' holders computes each expert
        assert (line["hot_share"] == 1) == (name in at_home)
        assert (line["commit"], line["ranks"], line["top_k"]) == (lines[0]["commit"], 2, TOP_K)
    by_name = {line["variant"]: line for line in lines[len(names) :]}
    assert by_name["hot_cold"]["hot_share"] > by_name["contiguous"]["hot_share"] == 0
    assert by_name["hot_cold"]["bytes_sent"] < by_name["contiguous"]["bytes_sent"]
    assert by_name["everywhere"]["bytes_sent"] == by_name["loop_over_experts"]["bytes_sent"] == 0
    assert by_name["hot_cold+capacity0.5"]["dropped"] > 0
    assert by_name["tensor_parallel"]["rows_max_over_mean"] == 1


def test_a_trace_and_a_picture_on_four_ranks(tmp_path, trace):
    pictured = ["hot_cold", "contiguous+schedule", "balanced+symmetric"]
    options = {"tokens": "1,4", "routing": f"trace:{trace}", "variants": "contiguous+static,hot_cold+coherent"}
    options |= {"plot": tmp_path / "steps.png", "plot_variants": ",".join(pictured)}
    (lines, _), *_ = run_ranks(run_bench, 4, options, timeout_s=200)
    assert [line["routing"] for line in lines] == ["uniform"] * 4 + ["trace:trace.npy"] * 4
    assert [line["skew"] for line in lines] == ["none"] * 4 + ["real"] * 4
    assert {line["trace_layer"] for line in lines[4:]} == {1}
    assert str(tmp_path) not in json.dumps([{**line, "command": ""} for line in lines])
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_one_rank_skips_what_needs_several():
    names = "contiguous,contiguous+symmetric,two_phase,tensor_parallel"
    ((lines, table),) = run_ranks(run_bench, 1, {"tokens": "3", "routing": "uniform", "variants": names})
    assert [line["variant"] for line in lines if "ms" in line] == [n for n in names.split(",") if n != "two_phase"]
    assert "several ranks" in lines[2]["skipped"]
    assert "several ranks" in table


def scaled(hidden):
    return replace(hidden, x_TD=hidden.x_TD * 1.001)


def test_a_wrong_variant_is_not_timed(monkeypatch, capsys):
    right = layer_variants.LayerVariant.call
    monkeypatch.setattr(layer_variants.LayerVariant, "call", lambda variant, number: scaled(right(variant, number)))
    with pytest.raises(RuntimeError, match=r"not timed, .*: contiguous \(uniform, 3 rows\)"):
        bench.bench_moe_layer("3", "uniform", "contiguous,loop_over_experts", **SIZES)
    wrong, loop = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "ms" not in wrong
    assert "differs from the loop" in wrong["refused"]
    assert loop["ms"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": "1,0"}, r"tokens \('1,0'\) must be whole numbers"),
        ({"variants": "contiguous,fast"}, r"variants \(fast\) must be among contiguous"),
        ({"variants": "contiguous+fast"}, r"variants \(contiguous\+fast\): 'fast' must be exact, static"),
        ({"plot": Path("x.png"), "plot_variants": "hot"}, r"variants \(hot\) must be among"),
        ({"routing": "skew:0.6"}, r"routing \('skew:0.6'\) must be uniform, skew:SHARE with at most 1/top_k = 0.5"),
        ({"routing": "zipf"}, r"routing \('zipf'\) must be uniform"),
        ({"repeats": 0}, r"repeats \(0\) must be at least 1"),
        ({"routing": "trace:nowhere.npy"}, "nowhere.npy: cannot be read"),
        ({"variants": "fastmoe"}, "fastmoe"),
        ({"variants": "hot_cold+reroute"}, r"variants \(hot_cold\+reroute\) must have a capacity with reroute"),
        ({"variants": "contiguous+gathered"}, r"must be tensor_parallel with gathered"),
        ({"variants": "tensor_parallel+capacity0.5"}, r"must have whole experts with a capacity"),
        ({"variants": "tensor_parallel+schedule"}, r"must have whole experts for rows to travel to"),
        ({"variants": "tensor_parallel+gathered+static"}, r"must have whole experts for rows to travel to"),
        ({"variants": "tensor_parallel+coherent"}, r"must have whole experts with coherent"),
        ({"variants": "coherent+schedule"}, r"must be without schedule and static"),
        ({"variants": "coherent+static"}, r"must be without schedule and static"),
        ({"variants": "contiguous+symmetric+schedule"}, r"must be exact with schedule"),
        ({"variants": "contiguous+exact+static"}, r"must force one exchange"),
        ({"hardware": Path("nowhere")}, "nowhere: cannot be read"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        bench.bench_moe_layer(**{**SIZES, "tokens": "2", **options})


def test_a_machine_by_its_name():
    """Only a path was taken."""
    named, given = (bench._faster(Path(name)) for name in ("h200x2", ROOT / "configs" / "hardware" / "h200x2.json"))
    assert named == given
    assert named.net_bandwidth > 2e11


# --- routing


def test_skew_is_the_share_of_one_expert():
    experts_TK, weights_TK = skewed().draw(20_000, EXPERTS, TOP_K, torch.Generator().manual_seed(0))
    counts_E = experts_TK.flatten().bincount(minlength=EXPERTS)
    assert float(counts_E[0] / counts_E.sum()) == pytest.approx(0.4, abs=0.01)
    assert float(counts_E[1:].max() / counts_E[1:].min()) < 1.1
    assert (experts_TK[:, 0] != experts_TK[:, 1]).all()
    assert (weights_TK[:, 0] >= weights_TK[:, 1]).all()
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(20_000))


def test_a_trace_goes_on_from_its_start(trace):
    kind = RoutingKind.parse(f"trace:{trace}", EXPERTS, TOP_K, trace_layer=2)
    experts_TK, _ = kind.draw(9, EXPERTS, TOP_K, torch.Generator(), start=5)
    ids_TLK = np.load(trace)
    assert experts_TK.tolist() == [ids_TLK[row % 7, 2].tolist() for row in range(5, 14)]


def test_traces_that_do_not_fit(trace):
    for options, words in (
        ((EXPERTS, TOP_K, 3), r"trace_layer \(3\) must lie in 0 … 2"),
        ((EXPERTS, 3, None), r"7 tokens with 2 choices must be at least 1 with top_k \(3\)"),
        ((2, TOP_K, None), "outside 0 … 1"),
    ):
        with pytest.raises(ValueError, match=words):
            RoutingKind.parse(f"trace:{trace}", *options)


# --- counts


def count_all(context: RankContext, names: list[str], rows: int, small_choices: int = 64) -> list[tuple[list, dict]]:
    """For each variant everyone's experts and the plan's slots, and what is counted."""
    with torch.no_grad(), patch.object(spread, "SMALL_BATCH_CHOICES", small_choices):
        case = make_case(context, skewed(), rows)
        experts_CWTK = [context.all_gather(routing.experts_TK).tolist() for routing in case.routings]
        found = []
        for name in names:
            variant = layer_variants.variant_of(name, case)
            for number in range(INPUT_SETS):
                variant.call(number)  # copies for shadows are there from now on
            slots = variant.layout.plan.slot_of_LWE[0].tolist() if hasattr(variant, "layout") else None
            found.append(((experts_CWTK, slots), summary([variant.counts(number) for number in range(INPUT_SETS)])))
        return found


def brute_force(
    experts_CWTK: list, slots_WE: list, out: int, back: int, turns: bool, stays: bool, one_each: bool
) -> tuple[float, float, list[list[int]]]:
    """Bytes of the rank that sends most, share of choices at home by a replica, choices that each rank computes.

    Sums go back to the row's own rank, or (``stays``) to the rank of its first choice. ``one_each``: one holder of each
    expert computes it.
    """
    copies_E = (np.array(slots_WE) >= 0).sum(0)
    slots_WE = spread.one_holder(np.array(slots_WE)) if one_each else slots_WE
    ranks = len(slots_WE)
    sent_W, home, choices, computed_CW = [0.0] * ranks, 0, 0, []
    for experts_WTK in experts_CWTK:
        computed_CW.append([0] * ranks)
        for rank, experts_TK in enumerate(experts_WTK):
            for row, experts_K in enumerate(experts_TK):
                goes, first = set(), None
                for expert in experts_K:
                    holders = [w for w in range(ranks) if slots_WE[w][expert] >= 0]
                    assert rank in holders or len(holders) == 1 or turns
                    to = rank if rank in holders else holders[(row + rank) % len(holders)]
                    goes.add(to)
                    first = to if first is None else first
                    computed_CW[-1][to] += 1
                    home += int(to == rank and copies_E[expert] > 1)
                    choices += 1
                sent_W[rank] += out * len(goes - {rank})
                for to in goes - {first if stays else rank}:
                    sent_W[to] += back
    return max(sent_W) / len(experts_CWTK), home / choices, computed_CW


@pytest.mark.parametrize("small_choices", [0, 64])
def test_counts_are_those_of_brute_force(small_choices):
    row, packed = 4 * DIM, 4 * DIM + 12 * TOP_K
    rows, ranks = 6, 4
    settings = {  # bytes out and back, and bytes to all others whatever the routing
        "contiguous": (packed, row, 0),
        "contiguous+schedule": (packed, row, 0),
        "contiguous+symmetric": (row, row, 8 * rows * TOP_K),
        "contiguous+static": (0, 0, rows * (packed + row)),
        "coherent": (packed + 4, row, 0),
        "coherent+symmetric": (row, row, 8 * rows * TOP_K),
        "hot_cold": (packed, row, 0),
        "hot_cold+coherent": (packed + 4, row, 0),
        "balanced+symmetric": (row, row, 8 * rows * TOP_K),
        "everywhere": (packed, row, 0),
    }
    everyone = run_ranks(count_all, ranks, list(settings), rows, small_choices)
    for name, *results in zip(settings, *everyone, strict=True):
        out, back, fixed = settings[name]
        small = small_choices > 0
        (routed, slots_WE), found = results[0]
        assert all(result == results[0] for result in results)
        sent, share, computed_CW = brute_force(
            routed, slots_WE, out, back, "symmetric" in name, "coherent" in name, small and fixed > 0
        )
        assert found["bytes_sent"] == pytest.approx(sent + (ranks - 1) * fixed, abs=1), name
        assert found["hot_share"] == pytest.approx(share, abs=1e-4), name
        ratios = [max(computed_W) * ranks / sum(computed_W) for computed_W in computed_CW]
        assert found["rows_max_over_mean"] == pytest.approx(np.mean(ratios), abs=1e-4), name
        assert found["rows_mean_over_max"] == pytest.approx(np.mean([1 / r for r in ratios]), abs=1e-4), name


def test_counts_of_variants_without_a_plan():
    rows, ranks, row = 6, 2, 4 * DIM
    names = ["tensor_parallel+gathered", "tensor_parallel", "padded_all_gather", "hot_cold+capacity0.5", "shadow"]
    parts, sums, padded, cut, shadow = (found for _, found in run_ranks(count_all, ranks, names, rows)[0])
    assert parts["bytes_sent"] == padded["bytes_sent"] == rows * (row + 12 * TOP_K) + 2 * rows * row
    assert sums["bytes_sent"] == 2 * rows * row
    assert parts["rows_max_over_mean"] == sums["rows_mean_over_max"] == 1
    assert 0 < cut["dropped"] < rows * ranks * TOP_K
    assert cut["dropped_share"] == pytest.approx(cut["dropped"] / (rows * ranks * TOP_K), abs=1e-3)
    assert 0 in shadow["shadowed"]
    assert shadow["hot_share"] >= 0.3


# --- bound and time


def test_bound_of_the_real_mixtral():
    """Over four GPUs at 4.42 TB/s and 725 TFLOP/s: two experts' weights each, or a rank's own rows' products."""
    config = ModelConfig(
        dim=4096, n_layers=INPUT_SETS, head_dim=2, hidden_dim=14336, n_heads=4, n_kv_heads=4, vocab_size=4
    )
    context = RankContext(world_size=4)
    shared = Bench(context, config, [], torch.empty(0, dtype=torch.bfloat16), 4096, FasterOptions(), True, 0)
    ceilings = Ceilings(4.42e12, 4.28e12, 725e12, 680e12)
    for rows, loads_E, wanted_ms, limit in (
        (16, [16] * 8, 0.1595, "bytes"),
        (16, [64, 64, 0, 0, 0, 0, 0, 0], 0.0399, "bytes"),
        (4096, [4096] * 8, 3.98, "operations"),
    ):
        x_TD = torch.empty(rows, 4096, device="meta")
        case = Case(shared, skewed(), [x_TD], [], torch.empty(0), np.array([loads_E]))
        seconds, what = case.bound(ceilings)
        assert what == limit
        assert 1e3 * seconds == pytest.approx(wanted_ms, rel=0.01)


def draw_timelines(context: RankContext) -> list:
    with torch.no_grad():
        case = make_case(context, skewed(), 4)
        return [
            timeline(context, layer_variants.variant_of(name, case), 1, False) for name in ("contiguous", "two_phase")
        ]


def test_a_timeline_has_every_phase_of_every_rank():
    everyone = run_ranks(draw_timelines, 2)
    assert everyone[0] == everyone[1]
    for ranks in everyone[0]:
        assert len(ranks) == 2
        assert min(marks[0][1] for marks in ranks) == 0
        for marks in ranks:
            assert [name for name, _, _ in marks] == ["gate", "permute+dispatch", "experts", "combine"]
            for (_, start, end), (_, following, _) in itertools.pairwise(marks):
                assert start <= end == following


class FakeGraph:
    """In place of a capture: what is captured, and what its replays do, in order."""

    def __init__(self) -> None:
        self.replays = []

    def __call__(self, context: RankContext, function, rehearse):
        rehearse()
        return lambda: (self.replays.append(function), function())[-1]


CAPTURED = ("contiguous", "hot_cold+capacity0.5+reroute", "balanced+symmetric", "tensor_parallel")
CAPTURED_OVER_RANKS = ("contiguous+static", "everywhere+symmetric", "shadow+symmetric")


def capture(context: RankContext, names: tuple[str, ...]) -> None:
    """Without a GPU: which graphs there are, and that each phase's finds what the one before it left."""
    graphs = FakeGraph()
    with torch.no_grad(), patch.object(layer_timing, "captured", graphs):
        case = make_case(context, skewed(), 3)
        for name in names:
            variant = layer_variants.variant_of(name, case)
            assert variant.captures, name
            graphs.replays.clear()
            assert len(whole_ms(context, variant, 2, True)) == 2
            assert len(set(graphs.replays)) == 1
            assert len(graphs.replays) == 1 + 2
            graphs.replays.clear()
            times = phases_ms(context, variant, 2, True)
            assert {len(found) for found in times.values()} == {2 * INPUT_SETS}
            assert len(set(graphs.replays)) == len(times) * INPUT_SETS
            assert len(graphs.replays) == len(times) * 3 * INPUT_SETS


@pytest.mark.parametrize("name", CAPTURED)
def test_rounds_and_phases_that_are_captured(name):
    capture(RankContext(), (name,))


def test_rounds_and_phases_over_ranks_that_are_captured():
    run_ranks(capture, 2, CAPTURED_OVER_RANKS)


def capturing(context: RankContext, names: list[str]) -> list[bool]:
    case = make_case(context, skewed(), 3)
    return [layer_variants.variant_of(name, case).captures for name in names]


def test_what_a_graph_does_not_hold():
    names = ["contiguous+exact", "contiguous+schedule", "two_phase", "tensor_parallel+gathered", "coherent"]
    assert run_ranks(capturing, 2, names) == [[False] * len(names)] * 2
