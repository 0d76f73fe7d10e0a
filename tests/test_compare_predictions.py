"""benchmarks/compare_predictions.py: the time model is near what bench_model.py measured; what it reads and says."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare_predictions as comparison  # noqa: E402

from mixtralkit.config import ModelConfig  # noqa: E402
from mixtralkit.planning.choose import Situation, candidates, choose  # noqa: E402
from mixtralkit.planning.hardware import Hardware  # noqa: E402
from mixtralkit.planning.memory import Room  # noqa: E402

RESULTS = tuple(
    ROOT / "benchmarks" / "results" / f"{name}.json"
    for name in ("model-h200", "model-tp4-h200x4", "model-plans-h200x2")
)


def test_predictions_are_near_what_was_measured(tmp_path, capsys):
    comparison.compare_predictions(RESULTS, plot=tmp_path / "scatter.png")
    text = capsys.readouterr().out.splitlines()
    found = json.loads(text[-1])
    assert found["compared"] == 29
    assert found["median_error"] <= 0.10
    assert found["worst_error"] <= 0.25
    rows = [
        line for line in text if (line.startswith("| ") and "decode" in line) or ("prefill" in line and "|" in line)
    ]
    assert len([row for row in rows if row.startswith("|")]) == 29
    assert sum(line.startswith("left out: ") for line in text) == 1
    assert (tmp_path / "scatter.png").stat().st_size > 1000


@pytest.mark.parametrize("memory_gb", [139.0, 80.0, 55.0])
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_auto_takes_what_was_measured_fastest_on_two_gpus(batch, memory_gb):
    lines = [r for r in comparison.read_lines(RESULTS[2]) if r["measurement"] == "decode" and r["batch"] == batch]
    fitting = [r for r in lines if max(r["memory_by_rank"]["total_gb"]) <= memory_gb]
    config = ModelConfig.from_file(ROOT / "configs/models/mixtral-8x7b.json").with_limits(193, batch)
    hardware = Hardware.load(comparison.CONFIGS / "hardware" / "h200x4.json")
    room = Room(batch, 193, prefill_budget=8192, peer_rows=None)
    chosen = choose(candidates(Situation(config, hardware, 2, room, "auto", "auto", None)), memory_gb)
    took = [r for r in fitting if (r["attention"], r["experts"]) == dataclasses.astuple(chosen.parallel)]
    best_ms, its_ms = (min(r["ms_per_step"] for r in some) for some in (fitting, took))
    assert its_ms <= 1.03 * best_ms


def test_lines_of_a_plan_name_it(tmp_path):
    decode = next(line for line in comparison.read_lines(RESULTS[1]) if line["measurement"] == "decode")
    line = {
        **decode,
        "attention": "dp",
        "experts": "ep",
        "batch": 64,
        "plan": {"name": "balanced+4"},
        "peer_rows": None,
    }
    hardware = Hardware.load(comparison.CONFIGS / "hardware" / "h200x4.json")
    compared = comparison.compare(line, hardware)
    assert compared.layout == "peer"
    assert compared.what.endswith("balanced+4")
    everywhere = comparison.compare({**line, "plan": {"name": "everywhere"}}, hardware)
    assert everywhere.predicted_ms > compared.predicted_ms, "all experts are read on each rank"
    plain = comparison.compare({**line, "peer_rows": 0}, hardware)
    assert plain.layout == "static"
    assert plain.predicted_ms > compared.predicted_ms, "each kernel is launched by the host"


def test_lines_of_json_are_read_too_and_other_files_are_refused(tmp_path):
    lines = comparison.read_lines(RESULTS[0])
    path = tmp_path / "lines.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert comparison.read_lines(path) == lines
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"lines\.json: not a file of bench_model\.py"):
        comparison.read_lines(path)
    path.write_text(json.dumps({"measurement": "start"}) + "\n")
    with pytest.raises(ValueError, match="no line of decode or prefill"):
        comparison.compare_predictions((path,))
