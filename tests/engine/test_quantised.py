"""Texts of a model whose experts are rounded: those of the rounded numbers, whatever ranks, plans and flags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.checkpoint import RankFiles, open_checkpoint, save_checkpoint
from mixtralkit.distributed import RankContext, RankFailed
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.plan import ExpertPlan, contiguous
from tests.engine.parts import engine_config, make_checkpoint
from tests.ranks import run_ranks

CONFIG = engine_config(hidden_dim=256, dim=48)
PROMPTS = ["In the beginning", "def add(", "The command", "Who are you?", "1 + 1 ->"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain"), CONFIG)


def texts(folder: Path, context: RankContext | None = None, **options) -> list[list[int]]:
    mixtral = Mixtral.build(folder, max_seq_len=40, max_batch_size=4, context=context or RankContext(), **options)
    return [answer.tokens for answer in mixtral.complete(PROMPTS, 12, temperature=0.0)]


def numbers_of(folder: Path, name: str, target: Path) -> Path:
    """A plain checkpoint of the rounded weights, in float32."""
    with open_checkpoint(folder) as plain:
        ranks = RankFiles(weights=parse_weights(name))
        save_checkpoint(target / "packed", CONFIG, plain, "mixtralkit", ranks=ranks)
    with open_checkpoint(target / "packed") as packed:
        save_checkpoint(target / "numbers", CONFIG, packed, "mistral")
    return target


@pytest.mark.parametrize("name", ["int8", "int4:32", "int4:128:zeros", "fp8:block"])
def test_rounded_while_loading_converted_or_numbers_again(folder: Path, name: str, tmp_path: Path) -> None:
    where = numbers_of(folder, name, tmp_path)
    found = texts(folder, quantize=name)
    assert texts(where / "packed") == found
    assert texts(where / "numbers") == found
    assert texts(folder) != found


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_attention_is_rounded_while_loading_or_converted(folder: Path, name: str, tmp_path: Path, command_line) -> None:
    """Beside packed experts; numbers again are those of the weights, so the text is the same in float32."""
    options = {"quantize_attention": name, "quantize": "int4:64"}
    found = texts(folder, **options)
    assert found != texts(folder, quantize="int4:64")
    words = ("convert", folder, tmp_path / "packed", "--format", "mixtralkit", "--quantize", "int4:64")
    assert command_line(*words, "--quantize_attention", name).returncode == 0
    assert texts(tmp_path / "packed") == found
    assert command_line("convert", tmp_path / "packed", tmp_path / "again", "--format", "mixtralkit").returncode == 0
    files = [(tmp_path / target / "rank-00-of-01.safetensors").read_bytes() for target in ("packed", "again")]
    assert files[0] == files[1]
    other = "int8" if name == "fp8" else "fp8"
    (tmp_path / "prompts.txt").write_text("In the beginning\n")
    done = command_line("generate", "--prompts", tmp_path / "prompts.txt", "-m", tmp_path / "packed",
                        "--quantize_attention", other)  # fmt: skip
    assert f"must be '{name}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _on_two(context: RankContext, folder: Path, formats: dict[str, str]):
    copies = ExpertPlan.from_dict(contiguous(3, 8, 2).to_dict() | {"slots": [[[0, 1, 2, 3, 7], [4, 5, 6, 7, 0]]] * 3})
    flags = [
        {"attention": "tp", "experts": "tp"},
        {"attention": "tp"},
        {"attention": "dp", "plan": copies},
        {"attention": "dp", "faster_shadow": True, "shadow_memory_gb": 1e-2},
        {"attention": "coherent"},
    ]
    return [texts(folder, context, **formats, **options) for options in flags]


@pytest.mark.parametrize(
    "formats", [{"quantize": "int4:64"}, {"quantize": "fp8", "quantize_attention": "fp8"}], ids=str
)
def test_ranks_plans_and_copies_change_nothing(folder: Path, formats: dict[str, str]) -> None:
    alone = texts(folder, **formats)
    for of_rank in run_ranks(_on_two, 2, folder, formats):
        for found in of_rank:
            assert found == alone


def _moves(context: RankContext, folder: Path, name: str):
    mixtral = Mixtral.build(
        folder, max_seq_len=40, max_batch_size=4, context=context, quantize=name, attention="dp",
        faster_shadow=True, exchange="exact", shadow_memory_gb=1e-2,
    )  # fmt: skip
    model = mixtral.model
    before = [answer.tokens for answer in mixtral.complete(PROMPTS, 8, temperature=0.0)]
    copied = [model.shadows.hint(layer, [0, 1, 6]) for layer in range(3)]
    with_copies = [answer.tokens for answer in mixtral.complete(PROMPTS, 8, temperature=0.0)]
    old, new = [[0, 1, 2, 3, -1], [4, 5, 6, 7, -1]], [[7, 0, 5, 2, 1], [4, 1, 6, 3, 0]]
    plans = [ExpertPlan(np.array([new] * (layer + 1) + [old] * (2 - layer)), 8) for layer in range(3)]
    moved = [model.adopt(layer, plan) for layer, plan in enumerate(plans)]
    sizes = [sum(t.nbytes for t in model.store.experts[0].tensors), model.store.expert_bytes]
    return (
        before,
        with_copies,
        copied,
        moved[0],
        sizes,
        [a.tokens for a in mixtral.complete(PROMPTS, 8, temperature=0.0)],
    )


def test_experts_move_as_they_are_packed(folder: Path) -> None:
    alone = [tokens[:8] for tokens in texts(folder, quantize="int4:128:zeros")]
    for before, with_copies, copied, moved, (held, expert_bytes), after in run_ranks(
        _moves, 2, folder, "int4:128:zeros"
    ):
        assert before == alone
        assert after == alone
        assert with_copies == alone
        assert copied == [(0, 1, 6)] * 3
        assert moved.bytes_moved == len(moved.transfers) * expert_bytes > 0
        assert held == 5 * expert_bytes
        assert expert_bytes == parse_weights("int4:128:zeros").expert_bytes(48, 256)


def test_random_weights_are_rounded_too(folder: Path) -> None:
    model = Mixtral.build(folder, max_seq_len=40, context=RankContext(), quantize="int8").model
    model.initialize(3, std=0.15)
    plain = Mixtral.build(folder, max_seq_len=40, context=RankContext()).model
    plain.initialize(3, std=0.15)
    rounded = model.store.experts[1].matrices[0].float()
    torch.testing.assert_close(rounded, plain.store.experts[1].matrices[0], rtol=0, atol=0.6 * 0.15 * 5 / 127)


def mixed_plan(world: int, slots: list | None = None) -> ExpertPlan:
    """Four formats in every layer, one of them by what the run has."""
    names = ["plain", "int8", "int4:32", "fp8:block", "int4:128:zeros", None, "int8", "plain"]
    plan = contiguous(3, 8, world)
    plan = plan if slots is None else ExpertPlan(np.array([slots] * 3), 8)
    return replace(plan, precision=[names[layer:] + names[:layer] for layer in range(3)])


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan's formats in a checkpoint, and one of the numbers that they stand for."""
    where = tmp_path_factory.mktemp("mixed")
    with open_checkpoint(folder) as plain:
        ranks = RankFiles(plan=mixed_plan(1), weights=parse_weights("int4:64"))
        save_checkpoint(where / "packed", CONFIG, plain, "mixtralkit", ranks=ranks)
    with open_checkpoint(where / "packed") as packed:
        save_checkpoint(where / "numbers", CONFIG, packed, "mistral")
    return where


def test_formats_side_by_side_are_their_numbers(folder: Path, mixed: Path) -> None:
    """Rounded while loading by the plan, written so, or as numbers: one text."""
    found = texts(folder, quantize="int4:64", plan=mixed_plan(1))
    assert texts(mixed / "packed") == found
    assert texts(mixed / "numbers") == found
    assert len({str(texts(folder, **one)) for one in ({}, {"quantize": "int8"}, {"quantize": "int4:64"})} | {
        str(found)}) == 4  # fmt: skip


def _mixed_on_two(context: RankContext, folder: Path, packed: Path):
    copies = mixed_plan(2, [[0, 1, 2, 3, 7], [4, 5, 6, 7, 0]])
    flags = [
        {"attention": "tp", "experts": "tp"},
        {"attention": "tp"},
        {"attention": "dp", "plan": copies},
        {"attention": "coherent"},
    ]
    found = [texts(folder, context, **{"quantize": "int4:64", "plan": mixed_plan(2)} | one) for one in flags]
    found.append(texts(packed, context, attention="dp", plan=replace(copies, precision=None)))
    refused = []
    for one in ({"faster_shadow": True}, {"moe_backend": "fastmoe"}):
        with pytest.raises((ValueError, RankFailed)) as caught:
            texts(folder, context, attention="dp", plan=mixed_plan(2), **one)
        refused.append(str(caught.value))
    return found, refused


def test_formats_side_by_side_on_ranks(folder: Path, mixed: Path) -> None:
    expected = texts(mixed / "numbers")
    for found, refused in run_ranks(_mixed_on_two, 2, folder, mixed / "packed"):
        assert found == [expected] * 5
        assert "copying experts (faster_shadow, dynamic) needs all experts in one format" in refused[0]
        assert (
            "moe_backend 'fastmoe' needs all experts in one format, and the plan's precision has plain, int8"
            in refused[1]
        )


def test_one_format_for_all_by_the_plan_is_that_of_the_run(folder: Path) -> None:
    plan = replace(contiguous(3, 8, 1), precision=[["int8"] * 8] * 3)
    model = Mixtral.build(folder, max_seq_len=40, context=RankContext(), plan=plan).model
    assert model.layout.weights == parse_weights("int8")
    assert set(model.named_tensors()) == set(replace(model.layout, plan=contiguous(3, 8, 1)).shapes())


def test_the_command_says_what_is_wrong(folder: Path, mixed: Path, tmp_path: Path, command_line) -> None:
    mixed_plan(1).save(tmp_path / "mixed.json")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("In the beginning\n")
    convert = ("convert", "--format", "mixtralkit")
    for words, sentence in [
        (("generate", "hello", "-m", folder, "--quantize", "int5"), "quantize ('int5') must be one of int4, fp8, int8"),
        (("generate", "hello", "-m", folder, "--quantize_attention", "int4"),
         "quantize_attention ('int4') must be one of int8, fp8, fp8:channel"),
        (("convert", folder, tmp_path / "a", "--format", "hf", "--quantize", "int8"), "needs format 'mixtralkit'"),
        (("convert", folder, tmp_path / "a", "--format", "hf", "--quantize_attention", "fp8"),
         "quantize_attention ('fp8:channel') needs format 'mixtralkit'"),
        ((*convert, folder, tmp_path / "a", "--quantize", "int4", "--experts", "tp", "--world_size", 8, "--attention",
          "dp"), "hidden_dim (256) must be cut into multiples of 64"),
        (("generate", "--prompts", prompts, "-m", mixed / "packed", "--quantize", "int8"),
         "quantize ('int8') of layer 0, expert 5 must be 'int4:64', in which the checkpoint is"),
        (("generate", "--prompts", prompts, "-m", folder, "--plan", tmp_path / "mixed.json", "--update_step", 4),
         "update_step needs all experts in one format, and the plan's precision has plain, int8, int4:32"),
    ]:  # fmt: skip
        done = command_line(*words)
        assert done.returncode != 0
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
    for source, target, *more in ((folder, "b", "--quantize", "int4:64"), (tmp_path / "b", "c")):
        assert command_line(*convert, source, tmp_path / target, *more).returncode == 0
    more = ("--plan", tmp_path / "mixed.json", "--quantize", "int4:64")
    done = command_line(*convert, folder, tmp_path / "d", *more)
    assert "precision: 3 experts as run, 3 experts fp8:block" in done.stdout
    assert command_line(*convert, tmp_path / "d", tmp_path / "e").returncode == 0
    name = "rank-00-of-01.safetensors"
    for folder in ("d", "e"):
        assert (tmp_path / folder / name).read_bytes() == (mixed / "packed" / name).read_bytes()
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
