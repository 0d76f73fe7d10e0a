"""benchmarks/model/bench_plan_manager.py: its lines, its prompts, the ways side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.model import bench_plan_manager as bench
from mixtralkit.config import MoEOptions, shipped
from mixtralkit.distributed import RankContext
from mixtralkit.planning.hardware import Hardware
from tests.configs import small_config
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent


SMALL = {"prompts": 6, "prompt_len": 5, "new_tokens": 9, "max_batch_size": 3, "update_step": 4, "repeats": 1}


@pytest.fixture
def architecture(tmp_path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small_config().to_mistral()))
    return path


def test_lines_of_one_rank(architecture, tmp_path, capsys):
    output = tmp_path / "lines.json"
    bench.bench_plan_manager(
        model=architecture, layers=2, attention="tp", policies="none,balanced", device="cpu", output=output, **SMALL
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [json.loads(line) for line in output.read_text().splitlines()]
    alone, managed = lines
    assert (alone["policy"], managed["policy"]) == ("none", "balanced")
    assert alone["same_tokens"]
    assert managed["same_tokens"]
    assert "pauses" not in alone
    assert alone["steps"]["launched"] > 10
    assert managed["plans"]["considered"] > 1
    assert managed["pauses"]["longest_ms"] >= managed["pauses"]["mean_ms"] > 0
    assert all({"commit", "torch", "tokens_per_s", "step_ms", "seconds"} <= line.keys() for line in lines)


def _ways(context: RankContext, architecture: Path, attention: str) -> list[dict]:
    source = bench.Source(ROOT / "ckpts", architecture, None, 0)
    engine = source.build(context, bench.parse_dtype("float32"), attention, (14, 4), MoEOptions(symmetric_rows=1))
    requests = source.requests(engine, 9, 5, 9)
    half = engine.model.params.vocab_size // 2
    assert [max(request.prompt) < half for request in requests] == [True] * 5 + [False] * 4
    hardware = Hardware.load(shipped("hardware", "cpu-2core"))
    found = bench.Bench(engine, requests, hardware, 6, None, 1.0, 0)
    return list(found.compare(["none", "random"], 2))


@pytest.mark.parametrize("attention", ["tp", "dp"])
def test_random_plans_change_no_token(architecture, attention):
    for alone, moved in run_ranks(_ways, 2, architecture, attention):
        assert alone["same_tokens"]
        assert moved["same_tokens"]
        assert moved["layers_moved"] > 3
        assert moved["mb_moved"] > 0
        # behind a move the host knows of an answer's end a step earlier, and another may begin in another step
        assert abs(sum(moved["steps"].values()) - sum(alone["steps"].values())) <= 1
        assert moved["pauses"]["longest_ms"] >= moved["pauses"]["longest_move_ms"] > 0


def test_what_cannot_run(architecture):
    with pytest.raises(ValueError, match=r"prompts \(1\) must be at least 2"):
        bench.bench_plan_manager(model=architecture, **{**SMALL, "prompts": 1})
    with pytest.raises(ValueError, match=r"repeats \(0\) must be at least 1"):
        bench.bench_plan_manager(model=architecture, **{**SMALL, "repeats": 0})
    with pytest.raises(ValueError, match=r"layers \(1\) works with model only"):
        bench.bench_plan_manager(layers=1, **SMALL)
    with pytest.raises(ValueError, match=r"layers \(4\) must lie in 1 … 3"):
        bench.bench_plan_manager(model=architecture, layers=4, **SMALL)
    with pytest.raises(ValueError, match="nowhere: cannot be read"):
        bench.bench_plan_manager(model=architecture, hardware=Path("nowhere"), **SMALL)


def test_models_and_machines_by_name(capsys):
    """The docstring's second command: names were taken for paths."""
    options = {"attention": "tp", "policies": "none", "device": "cpu", "hardware": Path("h200"), **SMALL}
    bench.bench_plan_manager(model=Path("tiny"), layers=1, **options)
    line = json.loads(capsys.readouterr().out)
    assert (line["model"], line["layers"], line["hardware"]) == ("tiny", 1, "h200.json")
