"""Plans through others' formats and back, files as those systems publish them, and what cannot be held."""

from __future__ import annotations

import functools
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtralkit.planning.convert import convert_plan
from mixtralkit.planning.formats import FORMATS, load_plan, save_plan
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.trace import load_routing

FOREIGN = [name for name in FORMATS if name != "plan"]


@st.composite
def equal_plans(draw) -> ExpertPlan:
    """Every rank has equally many experts, replicas among them, some with empty slots between."""
    ranks, experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    slots = draw(st.integers(-(-experts // ranks), experts))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    layers = [_spread(rng, experts, ranks, slots) for _ in range(draw(st.integers(1, 3)))]
    filled = np.array(layers)
    if draw(st.booleans()):
        filled = np.insert(filled, rng.integers(slots + 1), -1, axis=2)
    return ExpertPlan(filled, experts)


def _spread(rng, experts: int, ranks: int, slots: int) -> list[list[int]]:
    """Every expert once, dealt out in turn; then what each rank lacks, at random, without doubles."""
    order = rng.permutation(experts)
    held = [[int(e) for e in order[rank::ranks]] for rank in range(ranks)]
    for rank in held:
        others = [int(e) for e in rng.permutation(experts) if e not in rank]
        rank += others[: slots - len(rank)]
        rng.shuffle(rank)
    return held


@st.composite
def plans_without_replicas(draw) -> ExpertPlan:
    ranks, experts, layers = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = np.full((layers, ranks, experts), -1)
    for layer in range(layers):
        for expert in range(experts):
            slots[layer, rng.integers(ranks), expert] = expert
    return ExpertPlan(slots, experts)


def _order(plan: ExpertPlan) -> list[list[tuple[int, ...]]]:
    return [[plan.experts_of(layer, rank) for rank in range(plan.world_size)] for layer in range(plan.num_layers)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.mark.parametrize(("format", "suffix"), [("sglang", "json"), ("sglang", "pt"), ("tensorrt", "yaml"),
                                                ("vllm-ascend", "json"), ("plan", "json")])  # fmt: skip
@settings(max_examples=30, deadline=None)
@given(plan=equal_plans())
def test_plans_come_back(folder, format, suffix, plan):
    path = folder / f"{format}.{suffix}"
    save_plan(plan, path, format)
    for named in (None, format):
        back = load_plan(path, named, num_experts=plan.num_experts, world_size=plan.world_size)
        assert _order(back) == _order(plan)
    assert _order(load_plan(path, world_size=plan.world_size)) == _order(plan)


@settings(max_examples=30, deadline=None)
@given(plan=plans_without_replicas())
def test_exflow_comes_back_with_unequal_ranks(folder, plan):
    path = folder / "plan.csv"
    save_plan(plan, path, "exflow")
    back = load_plan(path, num_experts=plan.num_experts, world_size=plan.world_size)
    assert back.holds_LWE.tolist() == plan.holds_LWE.tolist()


def test_ours_keeps_everything(tmp_path):
    slots = contiguous(2, 8, 4).slots_LWS
    plan = ExpertPlan(slots, 8, 2, "hot", cold_capacity_factor=0.5, overflow="reroute", meta={"a": 1})
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").to_dict() == plan.to_dict()


def test_sglang_files_have_the_one_key_that_its_reader_takes(tmp_path):
    save_plan(contiguous(1, 4, 2), tmp_path / "a.json", "sglang")
    assert json.loads((tmp_path / "a.json").read_text()) == {"physical_to_logical_map": [[0, 1, 2, 3]]}
    save_plan(contiguous(1, 4, 2), tmp_path / "a.pt", "sglang")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(content) == ["physical_to_logical_map"]
    assert content["physical_to_logical_map"].tolist() == [[0, 1, 2, 3]]


def test_sglang_with_counts_beside_the_map(tmp_path):
    content = {"logical_count": torch.ones(3, 1, 4), "physical_to_logical_map": torch.tensor([[3, 1, 0, 2, 1, 0]])}
    torch.save(content, tmp_path / "a.pt")
    plan = load_plan(tmp_path / "a.pt", world_size=2)
    assert _order(plan) == [[(3, 1, 0), (2, 1, 0)]]
    assert plan.policy == "from sglang"


def test_tensorrt_layers_keep_their_numbers(tmp_path):
    """TensorRT-LLM numbers the layers of the model: the first MoE layer of DeepSeek is 3."""
    text = (
        "initial_global_assignments:\n  4: [2, 0, 1, 3]\n  3: [0, 1, 2, 3]\nlayer_updates_per_iter: 0\nnum_slots: 4\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    plan = load_plan(tmp_path / "a.yaml", world_size=2)
    assert _order(plan) == [[(0, 1), (2, 3)], [(2, 0), (1, 3)]]
    assert plan.meta == {"layer_ids": [3, 4]}
    save_plan(plan, tmp_path / "b.yaml", "tensorrt")
    assert load_plan(tmp_path / "b.yaml", world_size=2).to_dict() == plan.to_dict()


def test_vllm_entries_go_by_their_numbers(tmp_path):
    devices = [{"device_id": 1, "device_expert": [0, 3]}, {"device_id": 0, "device_expert": [2, 1]}]
    content = {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": devices}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert _order(load_plan(tmp_path / "a.json")) == [[(2, 1), (0, 3)]]


def test_exflow_in_any_order_of_lines(tmp_path):
    (tmp_path / "a.csv").write_text("Expert,Node\r\n3,0\r\n0,1\r\n2,1\r\n1,0\r\n")
    assert _order(load_plan(tmp_path / "a.csv", num_experts=2)) == [[(1,), (0,)], [(1,), (0,)]]


def _write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


MAP = "physical_to_logical_map"
DEVICES = [{"device_expert": [0, 1]}, {"device_expert": [2, 3]}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({MAP: [[0, 1, 2, 3]]}, "world_size"),
        ({MAP: [[0, 1, 2, 3, 4]], "w": 2}, r"5 slots, no multiple of world_size \(2\)"),
        ({MAP: [[0, 1, 2, 9]], "w": 2}, "expert 9, but a layer has only 4 slots"),
        ({MAP: [[0, 1, 2, 2**40]], "w": 2, "e": 4}, "rank 1 holds expert .* outside 0 … 3"),
        ({MAP: [[0, 1, 2, -1]], "w": 2}, "-1, which is no whole number"),
        ({MAP: [0, 1], "w": 2}, "must be lists of whole numbers"),
        ({MAP: [[0, 1, 2, 3]], "w": 0}, r"world_size \(0\)"),
        ({MAP: [[0, 1, 2, 3]], "w": 2, "e": 5}, "layer 0 has no slot for expert 4"),
        ({"logical_count": [[[1, 2]]]}, "record of loads"),
        ("num_slots: 8\nlayer_updates_per_iter: 2\n", "lacks initial_global_assignments"),
        ("initial_global_assignments: {0: [0, 1]}\nnum_slots: 3\n", r"num_slots \(3\)"),
        ("initial_global_assignments: {a: [0, 1]}\nnum_slots: 2\n", "layer \\('a'\\)"),
        ({"layer_list": [{"device_list": DEVICES, "device_count": 3}]}, "device_list has devices"),
        ({"layer_list": [{"device_list": DEVICES}], "moe_layer_count": 2}, r"moe_layer_count \(2\)"),
        ({"layer_list": [{"device_list": DEVICES}], "w": 4}, r"world_size \(2\) must be 4"),
        ({"layer_list": [{"device_list": 3}]}, "layer 0: device_list must be a list"),
        ("Expert,Node\n0,0\n", "num_experts"),
        ("Expert,Node\n0,0\n0,1\n", "stands there twice"),
        ("Expert,Node\n0,0\n2,1\n", "without a gap"),
        ("Expert,Node\n0,0\n1,x\n", r"line 3 \(1,x\)"),
        ("Expert,Node\n0,0\n1,7\n", r"Node \(7\)"),
        ({"something": 1}, "is no expert plan"),
        ("just words", "is no expert plan"),
        ("{broken: [", "neither JSON nor YAML"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path, content, says):
    sizes = {}
    if isinstance(content, dict):
        sizes = {"world_size": content.pop("w", None), "num_experts": content.pop("e", None)}
    elif content.startswith("Expert") and says != "num_experts":
        sizes = {"num_experts": 2}
    elif content.startswith("initial"):
        sizes = {"world_size": 1}
    path = _write(tmp_path / "bad.file", content)
    with pytest.raises(ValueError, match=says) as error:
        load_plan(path, **sizes)
    assert str(error.value).startswith(str(path))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="no torch file"):
        load_plan(tmp_path / "a.pt")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="neither text nor a torch file"):
        load_plan(tmp_path / "a.json")


def test_a_named_format_must_be_the_one_found(tmp_path):
    path = _write(tmp_path / "a.json", {MAP: [[0, 1]]})
    with pytest.raises(ValueError, match=r"format \('vllm-ascend'\) is not what the file holds \(sglang\)"):
        load_plan(path, "vllm")
    with pytest.raises(ValueError, match=r"format \('x'\) must be one of"):
        load_plan(path, "x")
    with pytest.raises(ValueError, match=r"format \('x'\) must be one of"):
        save_plan(contiguous(1, 2, 1), path, "x")


@pytest.mark.parametrize("format", FOREIGN)
def test_a_capacity_is_not_lost_in_silence(tmp_path, format):
    plan = ExpertPlan(contiguous(1, 4, 2).slots_LWS, 4, cold_capacity_factor=1.0)
    with pytest.raises(ValueError, match=rf"cold_capacity_factor \(1.0\) cannot be written as {format}"):
        save_plan(plan, tmp_path / "a", format)
    plan = ExpertPlan(plan.slots_LWS, 4, precision=[["int8"] * 4])
    with pytest.raises(ValueError, match=rf"precision \(4 experts int8\) cannot be written as {format}"):
        save_plan(plan, tmp_path / "a", format)
    assert not (tmp_path / "a").exists()


def test_what_formats_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="layer 0: expert 1 is on 2 ranks, and exflow holds no replicas"):
        save_plan(ExpertPlan(np.array([[[0, 1], [1, 2]]]), 3), tmp_path / "a", "exflow")
    for format in ("sglang", "tensorrt", "vllm-ascend"):
        with pytest.raises(ValueError, match=f"layer 0, rank 1 holds 1 experts .* {format} needs equally many"):
            save_plan(ExpertPlan(np.array([[[0, 1], [2, -1]]]), 3), tmp_path / "a", format)


@given(equal_plans(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_second_replicas_on_a_rank_are_left_out_and_counted(tmp_path_factory, plan, seed):
    """EPLB gives a hot expert two slots of one rank in most cases; such plans were refused."""
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("plan") / "map.json"
    slots = [[list(plan.experts_of(layer, w)) for w in range(plan.world_size)] for layer in range(plan.num_layers)]
    again = int(rng.integers(1, 3))
    doubled = [[[*rank, *rng.choice(rank, again)] for rank in layer] for layer in slots]
    path.write_text(json.dumps({MAP: [[int(e) for rank in layer for e in rank] for layer in doubled]}))
    with pytest.warns(UserWarning, match=f"^{again * plan.num_layers * plan.world_size} replicas on a rank"):
        read = load_plan(path, num_experts=plan.num_experts, world_size=plan.world_size)
    assert [
        [list(read.experts_of(layer, w)) for w in range(read.world_size)] for layer in range(read.num_layers)
    ] == slots


def test_a_load_balancer_inside_tensorrts_options(tmp_path):
    plan = contiguous(2, 4, 2)
    save_plan(plan, tmp_path / "plan.yaml", "tensorrt")
    text = "".join(f"    {line}\n" for line in (tmp_path / "plan.yaml").read_text().splitlines())
    options = tmp_path / "options.yaml"
    options.write_text(f"enable_attention_dp: true\nmoe_config:\n  backend: WideEP\n  load_balancer:\n{text}")
    np.testing.assert_array_equal(load_plan(options, world_size=2).slots_LWS, plan.slots_LWS)
    options.write_text("moe_config:\n  load_balancer: ./plan.yaml\n")
    with pytest.raises(ValueError, match=r"load_balancer names a file \('\./plan\.yaml'\)"):
        load_plan(options, world_size=2)


def test_vllm_ascends_map_goes_by_its_name_and_the_old_one(tmp_path):
    plan = contiguous(2, 4, 2)
    for name in ("vllm-ascend", "vllm"):
        save_plan(plan, tmp_path / f"{name}.json", name)
        np.testing.assert_array_equal(load_plan(tmp_path / f"{name}.json", name).slots_LWS, plan.slots_LWS)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_plans_are_converted(tmp_path, source, target):
    plan = contiguous(2, 4, 2)
    save_plan(plan, tmp_path / "source", source)
    convert_plan(tmp_path / "source", tmp_path / "target", target, source, num_experts=4, world_size=2)
    assert (load_plan(tmp_path / "target", target, num_experts=4, world_size=2).slots_LWS == plan.slots_LWS).all()
    before = (tmp_path / "target").read_bytes()
    with pytest.raises(ValueError, match=r"target: is there already; .*--overwrite"):
        convert_plan(tmp_path / "source", tmp_path / "target", "plan", num_experts=4, world_size=2)
    assert (tmp_path / "target").read_bytes() == before


PLAN = '{"version": 1, "num_layers": 1, "world_size": 1, "slots": [[[0]]], "num_experts": %s}'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "a: &x [1]\nb: *x\n", "aliases"),
        ("a.yaml", "initial_global_assignments: {0: [.inf, 1]}\nnum_slots: 2\n", "finite"),
        ("a.json", "[" * 10**5, "nested too deep"),
        ("a.json", '{"physical_to_logical_map": [[NaN]]}', "not finite"),
        ("a.json", '{"records": []}', "a recording of SGLang"),
        ("a.json", '{"layer_list": [{"layer_id": 0, "device_count": "x", "device_list": []}]}', "device_count"),
        ("a.json", '{"layer_list": [{"layer_id": 0, "device_count": 10000000000, "device_list": []}]}', "device"),
        ("a.json", PLAN % '1, "meta": 3', "meta"),
        ("a.json", PLAN % "1e9", "num_experts"),
        ("a.json", PLAN % "1000000000", "num_experts"),
        ("a.json", PLAN % '1, "cold_capacity_factor": 1e300', "cold_capacity_factor"),
        ("a.json", PLAN % '1, "ranks_per_node": true', r"ranks_per_node \(True\) must divide"),
        ("a.json", PLAN.replace("1,", "2.0,", 1) % "1", r"version \(2.0\) must be one of"),
        ("a.json", PLAN % f'1, "cut_order": "{"x" * 10**6}"', r"cut_order \('x{58}…\) must be"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_they_claim(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: .*{says}"):
        load_plan(tmp_path / name, num_experts=None, world_size=1)


DOUBLED_TUPLES = b"K\x01K\x02\x86" + b"q\x00h\x00\x86" * 60
DOUBLED_LISTS = functools.reduce(lambda below, _: [below, below], range(60), [1])


@pytest.mark.parametrize("load", [load_plan, load_routing])
@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (b"\x80\x02}(" + DOUBLED_TUPLES + b"K\x01u.", "keys are neither texts nor whole numbers"),
        (pickle.dumps({"records": DOUBLED_LISTS}, 2), "stands for more than the file has"),
        (b"\x80\x02\x8f(" + DOUBLED_TUPLES + b"\x90.", "it holds sets"),
    ],
)
def test_torch_files_that_stand_for_more(tmp_path, load, pickled, says):
    """A few hundred bytes that took for ever to be hashed or counted."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match=rf"a\.pt: .*{says}"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize(("load", "key"), [(load_plan, "physical_to_logical_map"), (load_routing, "logical_count")])
def test_a_tensor_larger_than_its_file(tmp_path, load, key):
    """One number that stands for 10¹⁰, by strides of 0, was written out as a list."""
    torch.save({key: torch.zeros(1, dtype=int).expand(10**5, 10**5)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: stands for more than the file has"):
        load(tmp_path / "a.pt")


def test_errors_name_the_file_once(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}: is a folder, not an ordinary file$"):
        load_plan(tmp_path)
