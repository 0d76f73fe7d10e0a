"""``plan="auto"`` where a model is built: the choice runs, ranks agree, budgets hold, what happens without figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.automatic import RESERVE_GB, find_hardware, with_free_memory
from mixtralkit.config import EngineConfig, ModelConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.mixtral import choose_layout
from mixtralkit.planning.memory import Room, rank_memory
from tests.configs import small_config
from tests.ranks import RankError, run_ranks

ROOT = Path(__file__).resolve().parent.parent
CKPTS, H200 = ROOT / "ckpts", ROOT / "configs" / "hardware" / "h200x4.json"


def layout_for(world: int, **asked: object):
    engine = EngineConfig.of(plan="auto", symmetric_rows=1).but(**asked)
    return choose_layout(small_config().with_limits(64, 8), RankContext(world_size=world), engine)


def build(context: RankContext, memory_gb: float | None) -> tuple:
    mixtral = Mixtral.build(
        CKPTS, max_seq_len=64, max_batch_size=4, context=context, plan="auto", symmetric_rows=1, hardware="h200x4",
        memory_gb=memory_gb, explain=True,
    )  # fmt: skip
    text = mixtral.text_completion(["In the beginning"], temperature=0, max_gen_len=6)[0]["generation"]
    layout = mixtral.model.layout
    return layout.parallel, layout.plan.policy, layout.plan.meta.get("name"), text


def test_ranks_choose_alike_and_the_text_is_that_of_one_rank():
    alone = Mixtral.build(CKPTS, max_seq_len=64, max_batch_size=4, device="cpu")
    text = alone.text_completion(["In the beginning"], temperature=0, max_gen_len=6)[0]["generation"]
    first, second = run_ranks(build, 2, None)
    assert first == second
    assert first[3] == text


def test_a_budget_that_nothing_fits_is_refused_by_all_ranks():
    with pytest.raises(RankError, match=r"memory_gb \(0.001\) must be at least .* a rank, which the smallest layout"):
        run_ranks(build, 2, 0.001)


def test_the_budget_is_kept():
    free = layout_for(2, hardware=H200)
    room = Room(8, 64, 8192, None)
    needs = rank_memory(free.config, free.parallel, free.plan, room).total
    tight = layout_for(2, hardware=H200, memory_gb=needs)
    assert rank_memory(tight.config, tight.parallel, tight.plan, room).total <= needs


def test_what_is_asked_for_is_kept():
    assert layout_for(2, hardware=H200, attention="dp", experts="ep").parallel.attention == "dp"
    assert layout_for(2, hardware=H200, experts="tp").parallel.experts == "tp"
    scheduled = layout_for(2, hardware=H200, faster_schedule=True, symmetric_rows=None)
    assert scheduled.parallel.attention == "dp", "the schedule needs rows that travel"


def test_without_figures_of_the_device_auto_is_as_without_a_plan():
    assert find_hardware(None, RankContext()) is None
    layout = layout_for(2)
    assert (layout.parallel.attention, layout.parallel.experts, layout.plan.policy) == ("tp", "ep", "contiguous")


def test_a_file_for_this_gpu_is_found(monkeypatch):
    context = RankContext(world_size=4, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert find_hardware(None, context).name == "h200x4"
    assert find_hardware(None, replace(context, world_size=2)).name == "h200x2", "measured among as many ranks"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H20")
    assert find_hardware(None, context) is None


def test_the_budget_left_out_is_the_least_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70e9, 80e9))
    on_gpu = RankContext(device=torch.device("cuda", 0))
    auto = EngineConfig.of(plan="auto")
    assert with_free_memory(auto, on_gpu).parallel.memory_gb == 70 - RESERVE_GB
    assert with_free_memory(auto.but(memory_gb=40.0), on_gpu).parallel.memory_gb == 40
    assert with_free_memory(auto, RankContext()) == auto
    assert with_free_memory(auto.but(plan=None), on_gpu).parallel.memory_gb is None


def test_one_gpu_that_is_too_small_gets_fewer_bits_or_other_memory(monkeypatch, capsys):
    """What is chosen is said in a sentence, with --explain beside all else that was tried."""
    model = ModelConfig.from_file(ROOT / "configs" / "models" / "mixtral-8x7b.json").with_limits(2048, 1)
    on_gpu = RankContext(device=torch.device("cuda", 0))

    def chosen(**asked: object):
        options = {"plan": "auto", "hardware": H200, "prefill_budget": 2048, "memory_gb": 30.0} | asked
        return choose_layout(model, on_gpu, EngineConfig.of(**options))

    layout = chosen()
    said = capsys.readouterr().err
    assert len(layout.formats) > 1
    assert layout.plan.tier is None
    assert said.startswith("plan auto: 93.9 GB as it is, and 30 to use: precision: ")
    assert len(said.splitlines()) == 1
    layout = chosen(gpu_memory_gb=16.0, explain=True)
    said = capsys.readouterr().err
    assert layout.plan.on_host_LE.any()
    assert layout.weights.name == "int4:128"
    assert "tier: " in said.splitlines()[-1]
    assert "tokens/s predicted" in said
    assert "too large" in said
    assert chosen(quantize="int8").weights.name == "int8", "what is asked for is kept"
    assert chosen(memory_gb=120.0).plan.precision is None
    with pytest.raises(ValueError, match=r"memory_gb \(3\) must be at least"):
        chosen(memory_gb=3.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_gb": 3.0}, r"memory_gb \(3.0\) needs plan 'auto'"),
        ({"trace": "t.npz", "plan": "plan.json"}, r"trace \(t.npz\) needs plan 'auto'"),
        ({"explain": True}, r"explain \(True\) needs plan 'auto'"),
    ],
)
def test_what_only_auto_goes_by_is_not_ignored(options, words):
    with pytest.raises(ValueError, match=words):
        Mixtral.build(CKPTS, context=RankContext(), **options)


def test_coherent_attention_needs_whole_experts():
    assert layout_for(1, plan=None, attention="coherent").parallel == ParallelConfig("coherent", "ep")
    for kind in (ParallelConfig, EngineConfig.of):
        with pytest.raises(ValueError, match=r"experts \('tp'\) must be 'ep' with attention 'coherent'"):
            kind(attention="coherent", experts="tp")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_gb": 0.0}, r"memory_gb \(0.0\) must be a number above 0"),
        ({"dtype": "int3"}, r"dtype \('int3'\)"),
        ({"symmetric_rows": -1}, r"symmetric_rows \(-1\)"),
        ({"exchange": "fast"}, r"exchange \('fast'\)"),
    ],
)
def test_wrong_options_are_named_before_anything_is_loaded(options, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig.of(**options)
