"""benchmarks/model/bench_model.py: its lines, its bounds, and a check that notices when the answers are wrong."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import profile_step
from benchmarks.layer import bench_moe_kernels
from benchmarks.model import bench_model as bench
from benchmarks.model import bounds as model_bounds
from benchmarks.model import check as model_check
from benchmarks.model.peer_fields import peer_fields
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import contiguous
from mixtralkit.planning.policies.registry import named_plan
from mixtralkit.planning.simulate import sample_routing
from tests.configs import small_config
from tests.engine.parts import make_model
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent


MIXTRAL = ROOT / "configs" / "models" / "mixtral-8x7b.json"


@pytest.fixture
def architecture(tmp_path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small_config().to_mistral()))
    return path


def run(capsys, **options) -> list[dict]:
    bench.bench_model(random_weights=True, device="cpu", repeats=1, **options)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_lines(architecture, tmp_path, capsys):
    output = tmp_path / "lines.json"
    options = {"batch": "1,3", "prompt_len": 5, "new_tokens": 4, "prefill": "2x6", "layers": 2, "output": output}
    lines = run(capsys, model=architecture, **options)
    assert [line["measurement"] for line in lines] == [
        "start",
        "ceilings",
        "check",
        "check",
        "decode",
        "decode",
        "prefill",
    ]
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    start, _, *checks, one, three, prefill = lines
    assert 0 < start["import_s"] <= start["ready_s"] <= start["first_token_s"] <= start["decoding_s"]
    assert [check["batch"] for check in checks] == [1, 3]
    assert all(check["logits"] < 1e-4 > check["answers"] for check in checks)
    assert all(line["layers"] == 2 and line["model"] == "small" for line in lines)
    for line, count in ((one, 1), (three, 3)):
        assert line["batch"] == count
        assert line["experts_from"] == "counted"
        assert line["tokens_per_s"] == pytest.approx(1e3 * count / line["ms_per_step"], rel=1e-2)
        assert line["share_of_bound"] == pytest.approx(line["bound_ms"] / line["ms_per_step"], rel=0.1, abs=1e-3)
        assert line["vllm"]["median_tpot_ms"] == pytest.approx(line["ms_per_step"], rel=1e-2)
    assert prefill["tokens_per_s"] == pytest.approx(12 / prefill["time_to_first_token_s"], rel=1e-2)
    assert prefill["sglang"]["input_throughput"] == pytest.approx(prefill["tokens_per_s"], rel=1e-2)


PLANS = "contiguous,hot_cold+1,balanced+2,balanced+4,balanced+8,everywhere"


def run_plans(context: RankContext, folder: str, **options) -> list[dict]:
    """The lines of a run on these ranks, which rank 0 wrote."""
    output = Path(folder) / "lines.json"
    settings = {
        "model": Path(folder) / "small.json", "random_weights": True, "device": "cpu", "repeats": 1, "prompt_len": 4,
        "new_tokens": 3, "batch": "1,5", "check_layers": 1, "layers": 2, "output": output,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.RankContext, "start", lambda *_: context)
        bench.bench_model(**{**settings, **options})
    return [json.loads(line) for line in output.read_text().splitlines()] if context.is_first else []


def test_plans_on_two_ranks(architecture):
    options = {"attention": "dp", "experts": "ep", "symmetric_rows": 1, "plan": Path(PLANS), "prefill": "3x4"}
    lines = run_ranks(functools.partial(run_plans, **options), 2, str(architecture.parent))[0]
    assert lines[0]["measurement"] == "ceilings", "a profile ran first, so the start is not the process's"
    timed = [line for line in lines if line["measurement"] in ("decode", "prefill")]
    assert [line["plan"]["name"] for line in timed[::3]] == PLANS.split(",")
    assert [line["plan"]["extra_slots"] for line in timed[::3]] == [0, 1, 2, 4, 8, 8]
    assert [line["plan"]["policy"] for line in timed[2::3]][:3] == ["contiguous", "hot_cold", "balanced"]
    for line in timed:
        assert (line["attention"], line["experts"], line["symmetric_rows"]) == ("dp", "ep", 3)
        assert ("loads_from" in line["plan"]) == line["plan"]["name"].startswith(("hot", "bal"))
        memory = line["memory_by_rank"]
        assert set(memory) == {"weights_gb", "cache_gb", "exchange_gb", "total_gb"}
        assert all(len(values) == 2 for values in memory.values())
    weights = [max(line["memory_by_rank"]["weights_gb"]) for line in timed[::3]]
    assert weights[0] < weights[1]
    assert weights[4] == weights[5] == max(weights)


def test_what_is_written_behind_a_plan(architecture):
    names = "contiguous+shadow,hot_cold+1+capacity0.5,hot_cold+capacity0.5+reroute,contiguous+managed"
    options = {"attention": "dp", "experts": "ep", "symmetric_rows": 1, "plan": Path(names), "batch": "6"}
    options |= {"new_tokens": 9, "update_step": 2}
    lines = run_ranks(functools.partial(run_plans, **options), 2, str(architecture.parent), timeout_s=120)[0]
    decodes = [line for line in lines if line["measurement"] == "decode"]
    extras = [["shadow"], ["capacity0.5"], ["capacity0.5", "reroute"], ["managed"]]
    assert [line["with"] for line in decodes] == extras
    assert [line["plan"]["name"] for line in decodes] == ["contiguous", "hot_cold+1", "hot_cold+1", "contiguous"]
    assert len([line for line in lines if line["measurement"] == "check"]) == 2, "not where choices are dropped"
    assert all(line["dispatchers"] == {"prefill": "symmetric", "decode": "symmetric"} for line in decodes)
    assert all(line["steps"] == {"mixed": 1, "launched": 8} for line in decodes)
    assert decodes[3]["plans"]["considered"] > 0
    assert not any("plans" in line for line in decodes[:3])


def test_plans_of_a_trace_and_of_a_file(architecture, tmp_path):
    loads = np.tile([9.0, *[1.0] * 7], (2, 1))
    sample_routing(loads, 300, 2).save(tmp_path / "trace.npz")
    contiguous(2, 8, 2).save(tmp_path / "plan.json")
    options = {"attention": "tp", "experts": "ep", "batch": "2", "trace": tmp_path / "trace.npz"}
    options["plan"] = Path(f"{tmp_path / 'plan.json'},hot_cold+1")
    lines = run_ranks(functools.partial(run_plans, **options), 2, str(architecture.parent), timeout_s=120)[0]
    assert lines[0]["measurement"] == "start"
    decodes = [line for line in lines if line["measurement"] == "decode"]
    assert [line["plan"]["name"] for line in decodes] == ["contiguous", "hot_cold+1"]
    assert decodes[1]["plan"]["loads_from"] == "trace"
    assert decodes[1]["plan"]["extra_slots"] == 1


def test_auto_chooses_by_the_hardware_file(architecture, tmp_path):
    machine = ROOT / "configs/hardware/h200x4.json"
    options = {"plan": Path("auto"), "hardware": machine, "symmetric_rows": 1, "batch": "4"}
    lines = run_ranks(functools.partial(run_plans, **options), 2, str(architecture.parent), timeout_s=120)[0]
    decode = lines[-1]
    assert decode["measurement"] == "decode"
    assert decode["plan"]["name"]
    assert (decode["attention"], decode["experts"]) in {("tp", "tp"), ("tp", "ep"), ("dp", "ep")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": Path("ballanced")}, "plan .'ballanced'. must be one of"),
        ({"random_weights": False}, "give either --random_weights or --ckpt"),
        ({"layers": 9}, r"layers \(9\) must lie in 1 … 3"),
        ({"batch": "1,zwei"}, "batch .* must be whole numbers"),
        ({"prefill": "8*2048"}, r"prefill \('8\*2048'\) must be COUNTxLENGTH"),
        ({"new_tokens": 1}, r"new_tokens \(1\) must be at least 2"),
        ({"plan": Path("hot_cold+reroute")}, r"plan \('hot_cold\+reroute'\) must have a capacity with reroute"),
    ],
)
def test_what_is_refused(architecture, options, words):
    with pytest.raises(ValueError, match=words):
        bench.bench_model(**{"model": architecture, "random_weights": True, "device": "cpu", **options})


def test_peers_names_say_the_same():
    fields = peer_fields(4, prompt_len=10, new_tokens=5, first_s=1.0, step_s=0.5, whole_s=3.0)
    assert fields["vllm"]["output_throughput"] == pytest.approx(20 / 3, abs=1e-4)
    assert fields["vllm"]["mean_ttft_ms"] == 1000
    assert fields["sglang"]["median_decode_throughput"] == 8
    assert fields["sglang"]["overall_throughput"] == 20


# --- bounds


def test_expected_experts():
    assert model_bounds.expected_experts(8, 2, 1) == 2
    assert model_bounds.expected_experts(8, 2, 8) == pytest.approx(7.2, abs=0.01)
    assert model_bounds.expected_experts(4, 4, 3) == 4


def test_bytes_of_a_step_with_every_expert_are_the_weights():
    config = small_config()
    layout = RankLayout.single(config)
    sizes = model_bounds.decode_bytes(layout, [config.num_experts] * config.n_layers, [10.0, 20.0], 2)
    model = Transformer(layout, RankContext())
    norms = (2 * config.n_layers + 1) * config.dim
    embedding = (config.vocab_size - 2) * config.dim
    assert sum(sizes.values()) - sizes["attention"] == 2 * (
        sum(p.numel() for p in model.parameters()) - norms - embedding
    )
    assert sizes["attention"] == 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * 30


def test_bound_of_the_real_mixtral():
    """One sequence: 25.4 GB a token, so 169 tokens/s at 4.28 TB/s and 174 at 4.42, as the peers' table has it."""
    config = ModelConfig.from_file(MIXTRAL)
    size = sum(model_bounds.decode_bytes(RankLayout.single(config), [2] * 32, [256], 2).values())
    assert 4.28e12 / size == pytest.approx(168, abs=2)
    whole = model_bounds.prefill_operations(RankLayout.single(config), [2048] * 8)
    # 28,100 with a last layer like the others, of which one row a prompt leaves the attention here
    assert 8 * 2048 / (whole / 725e12) == pytest.approx(28900, rel=0.01)


def test_shares_of_ranks_add_up():
    config = ModelConfig.from_file(MIXTRAL)
    plan = contiguous(config.n_layers, config.num_experts, 4)
    single = model_bounds.prefill_operations(RankLayout.single(config), [512] * 8)
    for experts in ("tp", "ep"):
        layouts = [RankLayout(config, ParallelConfig("tp", experts), plan, rank) for rank in range(4)]
        whole = sum(model_bounds.prefill_operations(layout, [512] * 8) for layout in layouts)
        rows = 512 * 8 * (config.n_layers - 1) + 8
        gates = 3 * 2.0 * rows * config.dim * config.num_experts  # every rank computes its own
        assert whole == pytest.approx(single + gates)


@pytest.mark.parametrize("name", ["contiguous", "balanced+2", "everywhere"])
def test_few_rows_read_one_holder_of_each_expert(name):
    """With every replica counted as read, ``everywhere`` on two GPUs had a share of the bound of up to 1.6."""
    config = ModelConfig.from_file(MIXTRAL)
    plan = named_plan(name, np.random.default_rng(0).random((config.n_layers, config.num_experts)), 2)
    layouts = [RankLayout(config, ParallelConfig("dp", "ep"), plan, rank) for rank in range(2)]
    for layer in range(config.n_layers):
        few = [model_bounds.choice_shares(layout, layer, 64) for layout in layouts]
        assert [sum(shares) for shares in few] == [4, 4], "each rank computes half of the experts, and all their rows"
        many = [model_bounds.choice_shares(layout, layer, 4096) for layout in layouts]
        assert sum(map(sum, many)) == pytest.approx(config.num_experts)
        chosen_TK = np.array([[0, 1], [1, 2], [2, 7]])
        assert sum(model_bounds.computed_experts(layout, layer, chosen_TK) for layout in layouts) == 4


def test_operations_are_those_of_the_reference():
    """Prompts of one token that choose every expert, where a count of the reference's products is exact."""
    config = small_config(num_experts=4, num_experts_per_tok=4)
    model = make_model(RankContext(), config)
    with FlopCounterMode(display=False) as counter:
        model_check.reference_logits(model, torch.tensor([[3], [4], [5]]))
    assert model_bounds.prefill_operations(model.layout, [1, 1, 1]) == counter.get_total_flops()


def test_pairs_of_queries_and_keys():
    for window in (None, 3, 40):
        config = small_config(sliding_window=window)
        seen = sum(1 for q in range(9) for k in range(q + 1) if window is None or q - k < window)
        assert model_bounds._pairs(config, 9) == seen


# --- the check


def check(context: RankContext, config: ModelConfig, attention: str, experts: str) -> model_check.Check:
    model = make_model(context, config, attention, experts)
    return model_check.check(model, bench.RandomWords(config.vocab_size), 2, 5, seed=0)


@pytest.mark.parametrize("window", [None, 5])
def test_right_answers_pass(window):
    found = check(RankContext(), small_config(sliding_window=window), "tp", "ep")
    assert found.check_layers == 2
    assert found.passes(torch.float32)


@pytest.mark.parametrize(("attention", "experts"), [("tp", "ep"), ("tp", "tp"), ("dp", "ep")])
def test_right_answers_pass_on_two_ranks(attention, experts):
    for found in run_ranks(check, 2, small_config(), attention, experts):
        assert found.passes(torch.float32)
        assert found.logits is not None


def test_wrong_logits_do_not_pass(monkeypatch):
    right = model_check.rotations
    monkeypatch.setattr(model_check, "rotations", lambda positions, *rest: right(positions + positions, *rest))
    assert not check(RankContext(), small_config(), "tp", "ep").passes(torch.float32)


def test_tokens_that_are_not_the_likeliest_do_not_pass(monkeypatch):
    monkeypatch.setattr(model_check, "GREEDY", replace(model_check.GREEDY, temperature=1.0, top_p=1.0))
    found = check(RankContext(), small_config(), "tp", "ep")
    assert found.answers < 1e-4
    assert not found.passes(torch.float32)


def test_the_check_leaves_the_model_as_it_was():
    model = make_model(RankContext(), small_config())
    before = {name: p.clone() for name, p in model.named_parameters()}
    model_check.check(model, bench.RandomWords(model.params.vocab_size), 2, 5, seed=0)
    assert model.params == small_config()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


# --- the layer's kernels

FP8 = ("fp8:channel", "fp8:tensor", "fp8:block")


def test_lines_of_the_layers_kernels(architecture, tmp_path, capsys):
    output = tmp_path / "lines.json"
    bench_moe_kernels.bench_moe_kernels(
        "1,9", architecture, device="cpu", routing="uniform,skew:0.5", repeats=1, output=output
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2 * 2 * len(bench_moe_kernels.VARIANTS)
    assert capsys.readouterr().out == output.read_text()
    for line in lines:
        assert line["error"] < 1e-4
        assert 2 <= line["touched_experts"] <= 8
        assert line["share_of_bound"] == pytest.approx(line["bound_ms"] / line["ms"], rel=0.1, abs=1e-2)


def test_lines_of_packed_experts(architecture, tmp_path):
    """By compiled kernels, or the reference where there are none; the bound is that of the packed bytes."""
    output, formats = tmp_path / "lines.json", ("plain", "int8", "int4:32", "int4:128", *FP8)
    bench_moe_kernels.bench_moe_kernels(
        "1,5", architecture, device="cpu", formats=formats, variants="kernels,grouped_mm", repeats=1, output=output
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["kernels", "grouped_mm"] * 2 + ["kernels"] * 12
    plain = {line["tokens"]: line for line in lines[::2][:2]}
    for line in lines[4:]:
        assert line["error"] < 1e-3
        assert line["bound"] == "operations" or line["bound_ms"] < plain[line["tokens"]]["bound_ms"]
    with pytest.raises(ValueError, match=r"formats \('int5'\) must be among plain, "):
        bench_moe_kernels.bench_moe_kernels("1", architecture, device="cpu", formats=("int5",))


def test_a_wrong_layer_is_not_timed(architecture, monkeypatch):
    right = bench_moe_kernels.expert_sum
    wrong = {"kernels": (bench_moe_kernels.gate, lambda *inputs: right(*inputs) * 1.001, False)}
    monkeypatch.setattr(bench_moe_kernels, "VARIANTS", wrong)
    with pytest.raises(RuntimeError, match="kernels: differs from float32"):
        bench_moe_kernels.bench_moe_kernels("3", architecture, device="cpu", repeats=1)


# --- the profile


def test_own_times_and_gaps_add_up():
    """Kernels that start while the one before runs count from its end; one inside another counts nothing."""
    events = [("gate", 0, 10), ("_vector_kernel", 8, 20), ("nap", 25, 30), ("inside", 26, 28), ("gate", 30, 40)]
    step = profile_step.summed(events, steps=2)
    own = {kernel.name: kernel.own_us for kernel in step.kernels}
    assert own == {"gate": 10, "_vector_kernel": 5, "nap": 2.5, "inside": 0}
    assert step.idle_us == 2.5
    assert step.whole_us == 20
    assert step.parts() == {"gate": 10, "linear": 5, "other": 2.5}
    assert next(kernel for kernel in step.kernels if kernel.name == "gate").calls == 1
    assert "50.0%" in step.table({"gate": 1e6}, read_rate=1e12)


def test_profile_needs_a_gpu():
    assert profile_step.profiled(lambda: 1, torch.device("cpu")) is None
