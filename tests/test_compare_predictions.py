"""benchmarks/plans/compare_predictions.py: the time model is near what was measured; what it reads and says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plans import compare_predictions as comparison
from mixtralkit.config import ModelConfig
from mixtralkit.planning.choose import Situation, candidates, choose
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.memory import Room

ROOT = Path(__file__).resolve().parent.parent
RESULTS = tuple(
    ROOT / "benchmarks" / "results" / f"{name}.json"
    for name in ("fitted/model-h200", "model-tp4-h200x4", "fitted/model-plans-h200x2")
)
LAYERS = ROOT / "benchmarks" / "results" / "fitted" / "moe-layer-h200x2.json"
PLANS = RESULTS[2]


def test_predictions_are_near_what_was_measured(tmp_path, capsys):
    comparison.compare_predictions((*RESULTS, LAYERS), plot=tmp_path / "scatter.png")
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert found["compared"] == 29 + 64
    assert found["median_error"] <= 0.10
    lines = [line for line in text.splitlines() if line.startswith(("| 1 rank, ", "| 2 ranks, ", "| 4 ranks, "))]
    models, groups = ([line for line in lines if line.count("|") == columns] for columns in (6, 5))
    assert (len(models), len(groups)) == (29, 10)
    for line in groups:
        _, name, _, middle, worst, _ = line.split("|")
        # the host's time, of which these are mostly made, was up to 1.7 times that of other lines with the same work
        counted = "counted rows" in name
        assert float(middle.strip(" %")) <= (15 if counted else 10), line
        assert abs(float(worst.strip(" %"))) <= (35 if counted else 25), line
    assert text.count("left out: ") == 1
    assert (tmp_path / "scatter.png").stat().st_size > 1000


def test_layers_are_predicted_without_attention(capsys):
    comparison.compare_predictions((LAYERS,))
    text = capsys.readouterr().out.splitlines()
    head = "| | uniform, 16 | uniform, 64 | uniform, 1024 | uniform, 4096 | skew:0.5, 16 | skew:0.5, 64 |"
    start = next(index for index, line in enumerate(text) if line.startswith(head))
    rows = {line.split(" | ")[0].strip("| "): line for line in text[start + 2 : start + 10]}
    exact, through_memory = ("contiguous", "hot_cold", "balanced"), ("+peer",)
    assert set(rows) == {
        *exact, *(plan + way for plan in (*exact, "everywhere") for way in through_memory), "tensor_parallel+sums"
    }  # fmt: skip
    assert all(line.count("(") == 8 for line in rows.values())


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
        if line["measurement"] == "decode" and line["batch"] == batch
    }  # fmt: skip


@pytest.mark.parametrize("memory_gb", [139.0, 80.0, 55.0])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_auto_takes_what_was_fastest_on_two_gpus(batch, memory_gb):
    measured = measured_ms(batch)
    assert len(measured) == 4
    hardware = Hardware.load(comparison.CONFIGS / "hardware" / "h200x2.json")
    model = ModelConfig.from_file(comparison.CONFIGS / "models" / "mixtral-8x7b.json")
    room = Room(batch, 128 + 65, 128 * batch, symmetric_rows=None)
    chosen = choose(candidates(Situation(model, hardware, 2, room, context=128 + 65 // 2)), memory_gb)
    name = (chosen.parallel.attention, chosen.parallel.experts, chosen.name)
    best_ms = min(ms for ms, peak_gb in measured.values() if peak_gb <= memory_gb)
    assert measured[name][0] <= 1.03 * best_ms
    assert measured[name][1] <= memory_gb


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_of_plans_with_sequences_of_their_own_the_fastest_is_predicted_to_be(batch):
    """Under the rule by which replicas took turns when these lines were measured."""
    hardware = Hardware.load(comparison.CONFIGS / "hardware" / "h200x2.json")
    lines = [line for line in comparison.read_lines(PLANS) if line["measurement"] == "decode"]
    own = [comparison.compare(line, hardware) for line in lines if line["batch"] == batch and line["attention"] == "dp"]
    assert len(own) == 3
    chosen = min(own, key=lambda one: one.predicted_ms)
    # at one sequence plans with one holder of each expert are equal but for which experts happen to share a rank
    assert chosen.measured_ms <= (1.05 if batch == 1 else 1.03) * min(one.measured_ms for one in own)


def test_lines_of_a_plan_name_it(tmp_path):
    decode = next(line for line in comparison.read_lines(RESULTS[1]) if line["measurement"] == "decode")
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
    assert plain.predicted_ms > compared.predicted_ms, "each kernel is launched by the host"


def test_lines_of_json_are_read_too_and_other_files_are_refused(tmp_path):
    lines = comparison.read_lines(RESULTS[0])
    path = tmp_path / "lines.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert comparison.read_lines(path) == lines
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"lines\.json: not a file of measurements"):
        comparison.read_lines(path)
    path.write_text(json.dumps({"measurement": "start"}) + "\n")
    with pytest.raises(ValueError, match="no line of decode or prefill"):
        comparison.compare_predictions((path,))
