"""tools/plan_experts.py as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixtralkit.planning.formats import load_plan
from mixtralkit.planning.synthetic import RoutingProcess

ROOT = Path(__file__).parents[3]
KEYS = {
    "policy", "crossings_per_token", "uniform_crossings_per_token", "balancedness_mean_over_max", "max_over_mean",
    "memory_gb_per_rank", "seconds",
}  # fmt: skip


def plan_experts(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "plan_experts.py", *map(str, options)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    RoutingProcess.random(4, 8, affinity=1.0, seed=1).trace(600, sequence_length=50, seed=2).save(path)
    return path


@pytest.mark.parametrize("policy", ["contiguous", "hot_cold", "two_phase", "affinity", "balanced", "shadow", "auto"])
def test_every_policy_writes_a_plan_and_its_figures(trace, tmp_path, policy):
    out = tmp_path / "plan.json"
    options = ("--slots_per_rank", 3, "--ranks_per_node", 2, "--hardware", ROOT / "configs/hardware/h200-nodes.json")
    done = plan_experts(trace, "--policy", policy, "--world_size", 4, "--output", out, *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) >= KEYS
    assert figures["policy"] == policy
    plan = load_plan(out)
    plan.check_fits(4, 8, 4)
    assert plan.ranks_per_node == 2
    assert plan.holds_LWE.sum(2).max() <= 3


@pytest.mark.parametrize(
    ("format", "name"),
    [("sglang", "plan.pt"), ("tensorrt_llm", "plan.yaml"), ("vllm", "plan.json"), ("exflow", "plan.csv")],
)
def test_foreign_formats_hold_the_same_plan(trace, tmp_path, format, name):
    own, foreign = tmp_path / "own.json", tmp_path / name if name != "plan.json" else tmp_path / "vllm.json"
    for path, options in ((own, ()), (foreign, ("--format", format))):
        done = plan_experts(trace, "--policy", "affinity", "--output", path, *options)
        assert done.returncode == 0, done.stderr
    read = load_plan(foreign, num_experts=8, world_size=4)
    assert (read.holds_LWE == load_plan(own).holds_LWE).all()


def test_loads_of_sglang_and_a_picture(tmp_path):
    import torch

    torch.save({"logical_count": torch.randint(1, 99, (5, 4, 8))}, tmp_path / "loads.pt")
    done = plan_experts(
        tmp_path / "loads.pt", "--policy", "balanced", "--output", tmp_path / "p.json", "--plot", tmp_path / "p.png"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["crossings_per_token"] is None
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_bad_input_is_one_sentence(trace, tmp_path):
    np.save(tmp_path / "ids.npy", np.full((4, 2, 2), [0, 8], np.int16))
    for options, sentence in (
        ((trace, "--policy", "magic"), "policy ('magic') must be one of contiguous"),
        ((trace, "--memory_gb", 1), "it lacks 1.82 GB"),
        ((trace, "--policy", "affinity", "--world_size", 3), "must be a multiple of world_size (3)"),
        ((trace, "--format", "xml"), "format ('xml') must be one of mixtralkit"),
        ((tmp_path / "ids.npy", "--num_experts", 8), "takes expert 8, outside 0 … 7"),
        ((tmp_path / "none.npz",), "none.npz: cannot be read"),
        ((trace, "--world_size", 0), "world_size (0) must be at least 1"),
    ):
        done = plan_experts(*options, "--output", tmp_path / "plan.json")
        assert done.returncode == 1
        assert sentence in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "plan.json").exists()
