"""tools/plan_experts.py as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.plans.bench_plans import bench_plans
from mixtralkit.cli.plan import plan as plan_experts
from mixtralkit.planning.formats import load_plan
from mixtralkit.planning.synthetic import RoutingProcess

ROOT = Path(__file__).parents[3]
KEYS = {
    "policy", "crossings_per_token", "uniform_crossings_per_token", "balancedness_mean_over_max", "max_over_mean",
    "memory_gb_per_rank", "seconds",
}  # fmt: skip


def figures_of(text: str) -> dict[str, object]:
    return json.loads(text.splitlines()[-1])


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    RoutingProcess.random(4, 8, affinity=1.0, seed=1).trace(600, sequence_length=50, seed=2).save(path)
    return path


@pytest.mark.parametrize("policy", ["contiguous", "hot_cold", "two_phase", "affinity", "balanced", "shadow", "auto"])
def test_every_policy_writes_a_plan_and_its_figures(trace, tmp_path, capsys, policy):
    out = tmp_path / "plan.json"
    plan_experts(
        trace, policy, world_size=4, output=out, slots_per_rank=3, ranks_per_node=2,
        hardware=ROOT / "configs" / "hardware" / "h200-nodes.json",
    )  # fmt: skip
    figures = figures_of(capsys.readouterr().out)
    assert set(figures) >= KEYS
    assert figures["policy"] == policy
    plan = load_plan(out)
    plan.check_fits(4, 8, 4)
    assert plan.ranks_per_node == 2
    assert plan.holds_LWE.sum(2).max() <= 3


@pytest.mark.parametrize(
    ("format", "name"),
    [("sglang", "sglang.pt"), ("tensorrt_llm", "plan.yaml"), ("vllm", "vllm.json"), ("exflow", "plan.csv")],
)
def test_foreign_formats_hold_the_same_plan(trace, tmp_path, format, name):
    own, foreign = tmp_path / "own.json", tmp_path / name
    plan_experts(trace, "affinity", output=own)
    plan_experts(trace, "affinity", output=foreign, format=format)
    read = load_plan(foreign, num_experts=8, world_size=4)
    assert (read.holds_LWE == load_plan(own).holds_LWE).all()


@pytest.mark.parametrize("experts", [8, 12])
def test_affinity_prints_its_bound_or_leaves_it_out(tmp_path, capsys, experts):
    trace = tmp_path / "trace.npz"
    RoutingProcess.random(3, experts, affinity=1.0, seed=1).trace(300, sequence_length=50, seed=2).save(trace)
    for bound in (0.2, 0):
        plan_experts(trace, "affinity", output=tmp_path / "plan.json", overwrite=True, bound=bound)
        printed = capsys.readouterr().out
        assert ("no placement without replicas has fewer than" in printed) == bool(bound)
        kind = "(exact)" if experts == 8 else "(a semidefinite relaxation of the chain, with triangles)"
        assert (kind in printed) == bool(bound)


def test_loads_of_sglang_and_a_picture(tmp_path, capsys):
    torch.save({"logical_count": torch.randint(1, 99, (5, 4, 8))}, tmp_path / "loads.pt")
    plan_experts(tmp_path / "loads.pt", "balanced", output=tmp_path / "plan.json", plot=tmp_path / "plan.png")
    assert figures_of(capsys.readouterr().out)["crossings_per_token"] is None
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="policy affinity needs every token's experts"):
        plan_experts(tmp_path / "loads.pt", "affinity", output=tmp_path / "other.json")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"policy": "magic"}, r"policy \('magic'\) must be one of contiguous"),
        ({"memory_gb": 1.0}, "it lacks 1.82 GB"),
        ({"policy": "affinity", "world_size": 3}, r"must be a multiple of world_size \(3\)"),
        ({"format": "xml"}, r"format \('xml'\) must be one of mixtralkit"),
        ({"world_size": 0}, r"world_size \(0\) must be a whole number in 1 … 1024"),
        ({"world_size": 10**31}, r"must be a whole number in 1 … 1024"),
        ({"policy": "hot_cold", "hot_per": "node"}, "needs ranks_per_node"),
        ({"hot_experts": 2}, r"hot_experts \(2\) is an option of policy hot_cold, not of 'auto'"),
        ({"policy": "hot_cold+1", "hot_experts": 2}, r"hot_experts \(2\) .* not of 'hot_cold\+1'"),
        ({"policy": "balanced", "cut_order": "arrival"}, "of policy hot_cold, hot_cold/node, not of 'balanced'"),
        ({"policy": "balanced/node", "num_groups": 2, "ranks_per_node": 2}, r"of policy balanced, not of"),
        ({"policy": "balanced", "dispatcher": "static"}, "of policy auto, not of 'balanced'"),
    ],
)
def test_bad_options_are_one_sentence(trace, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        plan_experts(trace, output=tmp_path / "plan.json", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "plan.json").exists()


def test_a_bad_trace_ends_the_command_with_one_sentence(tmp_path, command_line):
    np.save(tmp_path / "ids.npy", np.full((4, 2, 2), [0, 8], np.int16))
    done = command_line("plan", tmp_path / "ids.npy", "--num_experts", 8, "--output", tmp_path / "plan.json")
    assert done.returncode == 1
    assert "takes expert 8, outside 0 … 7" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "plan.json").exists()


def test_bench_plans_measures_on_another_trace(trace, tmp_path, capsys):
    other = tmp_path / "other.npz"
    RoutingProcess.random(4, 8, affinity=1.0, seed=3).trace(300, sequence_length=50, seed=2).save(other)
    bench_plans(trace, check=other, world_sizes=(4,), batches=(64,))
    found = {row["policy"]: row for row in figures_of(capsys.readouterr().out)["rows"]}
    assert found["everywhere"]["crossings"] == 0
    assert found["affinity"]["crossings, fit"] < found["contiguous"]["crossings, fit"]
    assert found["balanced, 3 slots"]["mean/max, fit"] > found["contiguous"]["mean/max, fit"]
