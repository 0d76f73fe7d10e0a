"""The plan: its questions answered as loops would, its JSON round trip, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtralkit.moe.weights import FORMATS
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import random_plan


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6))
def test_look_ups_say_what_the_slots_say(seed, num_experts, world_size):
    plan = random_plan(seed, num_experts, world_size)
    for rank in range(world_size):
        held = [int(e) for e in plan.slots_LWS[0, rank] if e >= 0]
        assert plan.experts_of(0, rank) == tuple(held)
        for expert in range(num_experts):
            assert plan.holds_LWE[0, rank, expert] == (expert in held)
            assert plan.slot_of_LWE[0, rank, expert] == (held.index(expert) if expert in held else -1)


@given(st.integers(0, 10_000))
def test_json_round_trip(seed):
    plan = random_plan(seed, 8, 4, cold_capacity_factor=1.25, overflow="reroute", ranks_per_node=2, meta={"from": "x"})
    again = ExpertPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()


def test_the_order_of_the_cut_is_written_where_it_is_not_by_weight():
    plan = random_plan(0, 8, 4, cold_capacity_factor=1.0)
    assert "cut_order" not in plan.to_dict()
    arrival = dataclasses.replace(plan, cut_order="arrival")
    assert arrival.to_dict()["cut_order"] == "arrival"
    assert ExpertPlan.from_dict(arrival.to_dict()).cut_order == "arrival"
    assert ExpertPlan.from_dict(plan.to_dict()).cut_order == "weight"


def test_precision_and_tier_make_version_2():
    plan = contiguous(2, 4, 2)
    assert plan.to_dict()["version"] == 1
    assert not {"precision", "tier"} & plan.to_dict().keys()
    words = {"precision": [["int4", None, "plain", "fp8:block"], [None] * 4], "tier": [["gpu"] * 4, ["host"] * 4]}
    made = dataclasses.replace(plan, **words)
    content = json.loads(json.dumps(made.to_dict()))
    assert content["version"] == 2
    assert content["precision"] == [["int4:32", None, "plain", "fp8:block"], [None] * 4]  # names are whole
    assert ExpertPlan.from_dict(content).to_dict() == made.to_dict()
    assert [weights.name for weights in made.formats_LE(FORMATS["int8"])[0]] == [
        "int4:32",
        "int8",
        "plain",
        "fp8:block",
    ]
    assert made.on_host_LE.tolist() == [[False] * 4, [True] * 4]
    assert made.notes()[1] == "tier: 4 experts gpu, 4 experts host"
    nothing = dataclasses.replace(plan, precision=[[None] * 4] * 2, tier=None)
    assert nothing.to_dict() == plan.to_dict()
    assert ExpertPlan.from_dict(plan.to_dict() | {"version": 2}).to_dict() == plan.to_dict()


def test_version_1_is_written_as_ever(tmp_path):
    contiguous(1, 4, 2).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == (
        '{"version": 1, "num_layers": 1, "num_experts": 4, "world_size": 2, "ranks_per_node": null, '
        '"policy": "contiguous", "slots": [[[0, 1], [2, 3]]], "cold_capacity_factor": null, '
        '"cold_token_percent": 1.0, "overflow": "drop", "meta": {}}\n'
    )


def test_contiguous_cuts_as_evenly_as_it_can():
    plan = contiguous(2, 10, 4)
    assert [len(plan.experts_of(1, rank)) for rank in range(4)] == [2, 3, 2, 3]
    assert sorted(e for rank in range(4) for e in plan.experts_of(0, rank)) == list(range(10))
    assert not plan.holds_LWE.all(1).any()
    assert everywhere(1, 3, 2).holds_LWE.all()


def test_slots_are_frozen():
    plan = contiguous(1, 4, 2)
    with pytest.raises(ValueError, match="read-only"):
        plan.slots_LWS[0, 0, 0] = 3


@pytest.mark.parametrize(
    ("slots", "changes", "says"),
    [
        ([[[0, 1], [2, 4]]], {}, r"layer 0, rank 1 holds expert 4, outside 0 … 3"),
        ([[[0, 1], [2, -2]]], {}, r"layer 0, rank 1 holds expert -2"),
        ([[[0, 0], [2, 3]]], {}, r"layer 0, rank 0 holds expert 0 twice"),
        ([[[0, 1], [2, 1]]], {}, r"layer 0 has no slot for expert 3"),
        ([[0, 1], [2, 3]], {}, r"slots .* must be whole numbers \[layers\]\[ranks\]\[slots\]"),
        ([[[0.5, 1], [2, 3]]], {}, r"whole numbers"),
        ([[[0, 1], [2, 3]]], {"ranks_per_node": 3}, r"ranks_per_node \(3\) must divide world_size \(2\)"),
        ([[[0, 1], [2, 3]]], {"cold_capacity_factor": -1}, r"cold_capacity_factor \(-1\)"),
        ([[[0, 1], [2, 3]]], {"cold_capacity_factor": float("nan")}, r"cold_capacity_factor \(nan\)"),
        ([[[0, 1], [2, 3]]], {"cold_token_percent": 0}, r"cold_token_percent \(0\) must lie in \(0, 1\]"),
        ([[[0, 1], [2, 3]]], {"overflow": "keep"}, r"overflow \('keep'\) must be one of drop, reroute"),
        ([[[0, 1], [2, 3]]], {"cut_order": "age"}, r"cut_order \('age'\) must be one of weight, arrival"),
    ],
)
def test_what_is_wrong_is_named(slots, changes, says):
    with pytest.raises(ValueError, match=says):
        ExpertPlan(np.array(slots), 4, **changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 3}, r"version \(3\) must be one of 1, 2"),
        ({"version": True}, r"version \(True\) must be one of 1, 2"),
        ({"precision": [["int8"] * 4]}, r"version \(1\) must be 2 for a plan with precision"),
        ({"version": 2, "precision": [["int8"] * 3]}, r"precision must have 1 lists of 4 words"),
        ({"version": 2, "precision": [["int8"] * 4] * 2}, r"precision must have 1 lists of 4 words"),
        ({"version": 2, "precision": [[8] * 4]}, r"precision\[0\]\[0\] \(8\) must be a text or null"),
        (
            {"version": 2, "precision": [["int8", "int5", None, None]]},
            r"precision: layer 0, expert 1 \('int5'\) must be",
        ),
        (
            {"version": 2, "tier": [["gpu", "disk", None, None]]},
            r"tier: layer 0, expert 1 \('disk'\) must be one of gpu",
        ),
        ({"version": 2, "tier": {}}, r"tier \({}\) must be a list or null"),
        ({"version": 2, "tiers": [["gpu"] * 4]}, r"plan has unknown 'tiers'"),
        ({"world_size": 3}, r"world_size \(3\) differs from the 2 that slots has"),
        ({"slots": "abc"}, r"slots"),
        ({"slots": None}, r"slots must be lists"),
        ({"num_experts": True}, r"num_experts \(True\)"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, change, says):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**contiguous(1, 4, 2).to_dict(), **change}))
    with pytest.raises(ValueError, match=says) as caught:
        ExpertPlan.load(path)
    assert str(path) in str(caught.value)


def test_a_plan_for_something_else_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"world_size \(2\) must be 4"):
        contiguous(1, 4, 2).check_fits(1, 4, 4)
    with pytest.raises(ValueError, match="cannot be read"):
        ExpertPlan.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        ExpertPlan.load(tmp_path / "broken.json")
