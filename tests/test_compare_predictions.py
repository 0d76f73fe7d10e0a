"""benchmarks/plans/compare_predictions.py: the time model is near what was measured; what it reads and says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plans import compare_predictions as comparison
from mixtralkit.config import ModelConfig
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.memory import Room
from mixtralkit.planning.search import Situation, candidates, choose

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
MODEL, PLANS, TP4 = (FOLDER / f"{name}.json" for name in ("model-h200", "model-plans-h200x2", "model-tp4-h200x4"))
LAYERS, EXACT = (FOLDER / f"{name}.json" for name in ("moe-layer-h200x2", "moe-layer-exact-h200x2"))
# Most median and worst error of a group in percent: host's time, of which exact exchanges are mostly made, was up to
# 1.7 times that of other lines with the same work; kernels of static ones are counted, not measured.
MOST = {"2 ranks, layer, exact": (15, 35), "2 ranks, layer, static": (15, 25)}


def test_predictions_are_near_what_was_measured(tmp_path, capsys):
    comparison.compare_predictions((MODEL, PLANS, LAYERS, EXACT, TP4), plot=tmp_path / "scatter.png")
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert found["compared"] == 34 + 30 + 32
    assert found["median_error"] <= 0.05
    lines = [line for line in text.splitlines() if line.startswith(("| 1 rank, ", "| 2 ranks, ", "| 4 ranks, "))]
    models, groups = ([line for line in lines if line.count("|") == columns] for columns in (6, 5))
    assert (len(models), len(groups)) == (34, 11)
    for line in groups:
        _, name, _, middle, worst, _ = (part.strip(" %") for part in line.split("|"))
        most_middle, most_worst = MOST.get(name, (10, 25))
        assert float(middle) <= most_middle, line
        assert abs(float(worst)) <= most_worst, line
    assert text.count("left out: ") == 1
    assert (tmp_path / "scatter.png").stat().st_size > 1000


def test_layers_are_predicted_without_attention(capsys):
    comparison.compare_predictions((LAYERS,))
    text = capsys.readouterr().out.splitlines()
    head = "| | uniform, 16 | uniform, 256 | uniform, 1024 | skew:0.5, 16 | skew:0.5, 256 | skew:0.5, 1024 |"
    start = text.index(head)
    rows = {line.split(" | ")[0].strip("| "): line for line in text[start + 2 : start + 7]}
    assert set(rows) == {"contiguous", "hot_cold", "balanced", "everywhere", "tensor_parallel"}
    assert all(line.count("(") == 6 for line in rows.values())


@pytest.mark.parametrize(
    ("change", "modelled"),
    [
        ({}, True), ({"variant": "balanced+exact"}, True), ({"variant": "tensor_parallel"}, True),
        ({"variant": "hot_cold+capacity0.5"}, False), ({"variant": "contiguous+schedule"}, False),
        ({"variant": "shadow"}, False), ({"variant": "coherent"}, False), ({"variant": "loop_over_experts"}, False),
        ({"measurement": "check"}, False), ({"ms": None}, False),
    ],
)  # fmt: skip
def test_which_layers_are_modelled(change, modelled):
    line = {"measurement": "moe_layer_over_ranks", "variant": "contiguous", "ms": 1.0, "dispatcher": "symmetric"}
    line = {name: value for name, value in {**line, **change}.items() if value is not None}
    assert comparison.is_modelled(line) == modelled


def test_models_with_shadows_capacities_and_managers_are_not_modelled():
    """They counted as the plain plan."""
    lines = [line for line in comparison.read_lines(PLANS) if line["measurement"] in comparison.MODELS]
    assert {word for line in lines if not comparison.is_modelled(line) for word in line["with"]} == {
        "shadow", "managed", "capacity0.5",
    }  # fmt: skip
    assert not any(line["with"] for line in lines if comparison.is_modelled(line))


def test_the_dispatcher_is_the_one_that_the_line_names():
    """Prompts of every line under ``dp`` were taken for exact exchanges."""
    for line in comparison.read_lines(PLANS):
        if line["measurement"] in comparison.MODELS:
            assert comparison.dispatcher_of(line) == ("split_width" if line["attention"] == "tp" else "symmetric")
    layer = next(line for line in comparison.read_lines(EXACT) if line["variant"] == "contiguous+static")
    assert comparison.dispatcher_of(layer) == "static"


@pytest.mark.parametrize(("routing", "first"), [("uniform", 1 / 8), ("skew:0.5", 1 / 2), ("skew:0.25", 1 / 4)])
def test_loads_of_a_routing(routing, first):
    shape = ModelShape(8, 8, 8, 2, 1, 1, 1, 1)
    loads_LE = comparison.loads_of(routing, shape)
    assert loads_LE[0, 0] / loads_LE.sum() == pytest.approx(first)
    with pytest.raises(ValueError, match=r"routing \('trace:x'\) must be uniform or skew:SHARE"):
        comparison.loads_of("trace:x", shape)


def measured_ms(batch: int) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Of each layout over two GPUs: ms of a decode step, and the most GB that torch had on a GPU."""
    return {
        (line["attention"], line["experts"], line["plan"]["name"] if line["experts"] == "ep" else "split"): (
            line["ms_per_step"], line["peak_memory_gb"],
        )
        for line in comparison.read_lines(PLANS)
        if line["measurement"] == "decode" and line["batch"] == batch and comparison.is_modelled(line)
    }  # fmt: skip


def chosen_of(batch: int, memory_gb: float, attention: str = "auto", experts: str = "auto") -> tuple[str, str, str]:
    """What ``--plan auto`` takes over two GPUs, with as many tokens as were measured."""
    hardware = Hardware.load(comparison.CONFIGS / "hardware" / "h200x2.json")
    model = ModelConfig.from_file(comparison.CONFIGS / "models" / "mixtral-8x7b.json")
    room = Room(batch, 128 + 256, 128 * batch, symmetric_rows=None)
    chosen = choose(
        candidates(Situation(model, hardware, 2, room, attention, experts, context=128 + 256 // 2)), memory_gb
    )
    return chosen.parallel.attention, chosen.parallel.experts, chosen.name


@pytest.mark.parametrize("memory_gb", [139.0, 80.0, 55.0])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_auto_takes_what_was_fastest_on_two_gpus(batch, memory_gb):
    measured = measured_ms(batch)
    assert len(measured) == 5
    fitting = [ms for ms, peak_gb in measured.values() if peak_gb <= memory_gb]
    if not fitting:
        with pytest.raises(ValueError, match=r"memory_gb \(55\) must be at least"):
            chosen_of(batch, memory_gb)
        return
    name, best_ms = chosen_of(batch, memory_gb), min(fitting)
    assert measured[name][0] <= 1.02 * best_ms
    assert measured[name][1] <= memory_gb


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_auto_takes_the_fastest_plan_for_sequences_of_their_own(batch):
    """Plans whose times the model cannot tell apart were chosen by the routing of its sample."""
    measured = {name: ms for name, (ms, _) in measured_ms(batch).items() if name[0] == "dp"}
    assert len(measured) == 4
    assert measured[chosen_of(batch, 139.0, "dp", "ep")] <= 1.02 * min(measured.values())


def test_lines_of_a_plan_name_it(tmp_path):
    decode = next(line for line in comparison.read_lines(TP4) if line["measurement"] == "decode")
    line = {
        **decode,
        "attention": "dp",
        "experts": "ep",
        "batch": 64,
        "plan": {"name": "balanced+4"},
        "symmetric_rows": None,
    }
    hardware = Hardware.load(comparison.CONFIGS / "hardware" / "h200x4.json")
    compared = comparison.compare(line, hardware)
    assert compared.dispatcher == "symmetric"
    assert compared.what.endswith("balanced+4")
    everywhere = comparison.compare({**line, "plan": {"name": "everywhere"}}, hardware)
    assert everywhere.predicted_ms > compared.predicted_ms, "all experts are read on each rank"
    plain = comparison.compare({**line, "symmetric_rows": 0}, hardware)
    assert plain.dispatcher == "static"
    assert plain.predicted_ms > compared.predicted_ms, "room for every row travels, by collectives"


def test_lines_of_json_are_read_too_and_other_files_are_refused(tmp_path):
    lines = comparison.read_lines(MODEL)
    path = tmp_path / "lines.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert comparison.read_lines(path) == lines
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"lines\.json: not a file of measurements"):
        comparison.read_lines(path)
    path.write_text(json.dumps({"measurement": "start"}) + "\n")
    with pytest.raises(ValueError, match="no line of decode or prefill"):
        comparison.compare_predictions((path,))
