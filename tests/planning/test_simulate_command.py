"""The commands simulate and measure, with the words that a user types."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mixtralkit.cli.plan import plan
from mixtralkit.cli.simulate import simulate
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan, everywhere
from mixtralkit.planning.simulate import sample_routing
from tests.ranks import run_command


def test_plans_side_by_side(tmp_path, command_line):
    sample_routing(np.arange(1.0, 17).reshape(2, 8), 100, 2).save(tmp_path / "trace.npz")
    words = {"precision": [["int4"] * 4 + [None] * 4] * 2, "tier": [["gpu"] * 8, ["host"] * 8]}
    replace(everywhere(2, 8, 4), **words).save(tmp_path / "all.json")
    done = command_line(
        "simulate", tmp_path / "trace.npz", "--plan", "contiguous", tmp_path / "all.json",
        "--dispatcher", "exact", "split_width", "--world_size", 4, "--batch", 8, "--plot", tmp_path / "it.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["plan"] for line in lines] == [
        f"{p}/{d}" for p in ("contiguous", "all") for d in ("exact", "split_width")
    ]
    assert "all/exact: precision: 8 experts as run, 8 experts int4:32\nall/exact: tier: 8 experts gpu" in done.stdout
    assert lines[2]["precision"] == {"as run": 8, "int4:32": 8}
    assert "tier" not in lines[0]
    assert lines[2]["bytes_inside"] == 0 < lines[0]["bytes_inside"]
    assert all(sum(line["rows_by_rank"]) == pytest.approx(2 * 2 * 100) for line in lines)
    assert all(len(line["seconds_by_layer"]) == 2 for line in lines)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "--world_size is missing: plan contiguous needs it"),
        (("--world_size", 4, "--ranks_per_node", 3), "ranks_per_node (3) must divide world_size (4)"),
        (("--world_size", 4, "--hardware", "none.json"), "none.json: cannot be read"),
        (("--world_size", 4, "--dispatcher", "pp"), "dispatcher ('pp') must be one of local, "),
    ],
)
def test_bad_options_end_with_one_sentence(tmp_path, command_line, words, sentence):
    sample_routing(np.ones((1, 8)), 8, 2).save(tmp_path / "trace.npz")
    done = command_line("simulate", tmp_path / "trace.npz", *words)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch": int("1" * 31)}, "batch"),
        ({"span": 10**18}, "span"),
        ({"context": 10**400}, "context"),
        ({"chunks": 10**7}, r"chunks \(10000000\) must be at most 1024"),
        ({"data_bytes": 17}, r"data_bytes \(17\) must be a whole number in 1 … 16"),
        ({"plan": ("balanced+" + "9" * 400,)}, r"plan \('balanced\+9*…\) must be one of"),
    ],
)
def test_numbers_that_nothing_has(tmp_path, given, says):
    """They were tracebacks, or took all memory."""
    sample_routing(np.ones((1, 8)), 8, 2).save(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match=f"^{says}"):
        simulate(tmp_path / "trace.npz", **({"world_size": 4} | given))


@pytest.mark.parametrize(
    ("experts", "given", "says"),
    [
        (8, {"policy": "auto", "batch": 10**7}, r"^batch: a step of 40,000,000 tokens"),
        (8, {"policy": "tiers", "gpu_memory_gb": 30.0, "max_seq_len": 10**400}, "^max_seq_len"),
        (9000, {"policy": "balanced"}, r"num_experts \(9000\) must be at most 8192 to be planned for"),
    ],
)
def test_plans_that_would_take_for_ever(tmp_path, experts, given, says):
    sample_routing(np.ones((1, experts)), 8, 2).save(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match=says):
        plan(tmp_path / "trace.npz", output=tmp_path / "plan.json", **given)
    assert not (tmp_path / "plan.json").exists()


def test_memory_without_end_holds_every_expert(tmp_path):
    sample_routing(np.ones((1, 8)), 8, 2).save(tmp_path / "trace.npz")
    plan(tmp_path / "trace.npz", "balanced", tmp_path / "plan.json", memory_gb=1e18)
    assert ExpertPlan.load(tmp_path / "plan.json").holds_LWE.all()


@pytest.mark.slow
def test_a_measured_machine_can_be_read(tmp_path):
    done, other = run_command(
        2, "measure", "tiny", "--device", "cpu", "--dim", 64, "--hidden", 64, "--message_mb", 0.1,
        "--output", tmp_path / "tiny.json", "--fused",
    )  # fmt: skip
    assert done.returncode == other.returncode == 0, done.stderr
    assert done.stdout.endswith("tiny.json: written\n")
    assert other.stdout == ""
    measured = Hardware.load(tmp_path / "tiny.json")
    assert measured.inside.members == 2
    assert measured.data_bytes == 4
    assert not measured.overlaps
    assert measured.fused.members == 2
    assert [rows for rows, _, _ in measured.fused.experts] == [1, 16, 64]
    assert len(measured.fused.sums) == len(measured.fused.exchange) == 3
