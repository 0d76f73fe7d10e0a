"""Experts that are rounded while they load or are converted: the same bits on every rank, layout, plan and way."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixtralkit.checkpoint import RankFiles, load_into, open_checkpoint, quantising, reader, save_checkpoint, writer
from mixtralkit.checkpoint.unfinished import Unfinished
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.weights import FORMATS, PLAIN, parse_weights
from mixtralkit.planning.plan import contiguous, everywhere
from tests.checkpoint.models import empty_parameters, random_tensors
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    dim=136, n_layers=2, head_dim=32, hidden_dim=256, n_heads=4, n_kv_heads=2, vocab_size=32, num_experts=4
)
NAMES = [name for name in FORMATS if name not in ("int4", "fp8")]


ATTENTION = {"int8": FORMATS["int8"], "fp8:channel": FORMATS["fp8"], "fp8:tensor": FORMATS["fp8"]}  # beside experts'


def loaded(folder: Path, layout: RankLayout, context: RankContext | None = None) -> dict[str, torch.Tensor]:
    parameters = empty_parameters(layout)
    with open_checkpoint(folder) as checkpoint:
        load_into(parameters, layout, checkpoint, context or RankContext())
    return parameters


def rounded(tensors: dict[str, torch.Tensor], layout: RankLayout) -> dict[str, torch.Tensor]:
    """The oracle: whole matrices rounded, then cut and put together."""
    hidden, found = layout.hidden, {}
    everything = [(layer, group) for layer in range(CONFIG.n_layers) for group in layout.groups(layer)]
    for layer, group in everything:
        prefix, weights = f"layers.{layer}.feed_forward.", group.weights
        for matrix, own in (("w13", ("w1", "w3")), ("w2", ("w2",))):
            for i, (name, part) in enumerate(weights.parameters(matrix + group.suffix)):
                slots = []
                for expert in (layout.experts(layer)[slot] for slot in group.slots):
                    parts = []
                    for one in own:
                        tensor = tensors[f"{prefix}experts.{expert}.{one}.weight"]
                        tensor = tensor.float() if weights.is_plain else weights.quantize(tensor).tensors[i]
                        if matrix == "w13":
                            parts.append(tensor[slice(*part.cut_rows(hidden))])
                        else:
                            parts.append(tensor[:, slice(*part.cut_columns(hidden))])
                    slots.append(torch.cat(parts))
                found[prefix + name] = (
                    torch.stack(slots)
                    if slots
                    else torch.empty(
                        0,
                        *layout.shapes()[prefix + name][1:],
                        dtype=torch.float32 if part.dtype is None else getattr(torch, part.dtype),
                    )
                )
    return found


def rounded_attention(tensors: dict[str, torch.Tensor], layout: RankLayout) -> dict[str, torch.Tensor]:
    """The same of attention and output: rows of this rank's heads, and columns of wo."""
    weights, size = layout.attention_weights, CONFIG.head_dim
    heads, kv_heads = ((first * size, last * size) for first, last in (layout.heads, layout.kv_heads))
    found = {}
    for i, part in enumerate(() if weights.is_plain else weights.parts):
        for layer in range(CONFIG.n_layers):
            name = f"layers.{layer}.attention."
            q, k, v, o = (weights.quantize(tensors[f"{name}w{letter}.weight"]).tensors[i] for letter in "qkvo")
            found[f"{name}wqkv.{part.name}"] = torch.cat([q[slice(*heads)], k[slice(*kv_heads)], v[slice(*kv_heads)]])
            found[f"{name}wo.{part.name}"] = o[:, slice(*part.cut_columns(heads))]
        found[f"output.{part.name}"] = weights.quantize(tensors["output.weight"]).tensors[i][slice(*layout.vocab)]
    return found


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_has_the_rounded_matrices(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "BLOCK_BYTES", 40_000)  # several blocks of rows, the last one shorter
    tensors = random_tensors(CONFIG)
    save_checkpoint(tmp_path, CONFIG, tensors, "hf")
    layout = replace(
        RankLayout.single(CONFIG), weights=parse_weights(name), attention_weights=ATTENTION.get(name, PLAIN)
    )
    found = loaded(tmp_path, layout)
    assert_same_bits(found, rounded(tensors, layout) | rounded_attention(tensors, layout))
    assert found["layers.1.feed_forward.gate.weight"].equal(tensors["layers.1.feed_forward.gate.weight"].float())


def _check_rank(context: RankContext, folder: Path, name: str, seed: int):
    tensors = random_tensors(CONFIG, seed=seed)
    for experts, plan in (("ep", contiguous(2, 4, 2)), ("ep", everywhere(2, 4, 2)), ("tp", contiguous(2, 4, 2))):
        formats = parse_weights(name), ATTENTION.get(name, PLAIN)
        layout = RankLayout(CONFIG, ParallelConfig("tp", experts), plan, context.rank, *formats)
        expected = rounded(tensors, layout) | rounded_attention(tensors, layout)
        assert_same_bits(loaded(folder, layout, context), expected)


@pytest.mark.parametrize("name", ["int8", "int4:128:zeros", "fp8:tensor", "fp8:block"])
def test_ranks_have_their_parts_of_the_same(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG, seed=1), "mistral-shards")
    run_ranks(_check_rank, 2, tmp_path, name, 1)


@pytest.mark.parametrize("name", NAMES)
def test_converted_files_load_as_what_is_rounded_while_loading(tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr(quantising, "BLOCK_BYTES", 70_000)
    tensors, weights, attention = random_tensors(CONFIG), parse_weights(name), ATTENTION.get(name, PLAIN)
    save_checkpoint(tmp_path / "plain", CONFIG, tensors)
    one = RankFiles(weights=weights, attention_weights=attention)
    with open_checkpoint(tmp_path / "plain") as plain:
        save_checkpoint(tmp_path / "one", CONFIG, plain, "mixtralkit", ranks=one)
        cut = RankFiles(2, ParallelConfig("tp", "tp"), weights=weights, attention_weights=attention)
        save_checkpoint(tmp_path / "cut", CONFIG, plain, "mixtralkit", ranks=cut)
    with open_checkpoint(tmp_path / "cut") as packed:
        assert (packed.weights, packed.attention_weights) == (weights, attention)
        save_checkpoint(tmp_path / "again", CONFIG, packed, "mixtralkit", ranks=one)
        save_checkpoint(tmp_path / "numbers", CONFIG, packed, "hf")
    files = [(tmp_path / folder / "rank-00-of-01.safetensors").read_bytes() for folder in ("one", "again")]
    assert files[0] == files[1]
    layout = replace(RankLayout.single(CONFIG), weights=weights, attention_weights=attention)
    expected = rounded(tensors, layout) | rounded_attention(tensors, layout)
    for folder in ("one", "cut", "again"):  # the last one is said to be of one rank, as it is
        assert_same_bits(loaded(tmp_path / folder, layout), expected)
    numbers = loaded(tmp_path / "numbers", RankLayout.single(CONFIG))
    w2_DF = weights.quantize(tensors["layers.1.feed_forward.experts.3.w2.weight"]).float()
    assert numbers["layers.1.feed_forward.w2"][3].equal(w2_DF.bfloat16().float())
    if not attention.is_plain:
        output_VD = attention.quantize(tensors["output.weight"]).float()
        assert numbers["output.weight"].equal(output_VD.bfloat16().float())


def test_a_stopped_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind its last whole tensor; another call, or another source, starts anew. What fails leaves nothing."""
    save_checkpoint(tmp_path / "plain", CONFIG, random_tensors(CONFIG))
    ranks = RankFiles(weights=FORMATS["int4"], attention_weights=FORMATS["fp8"])
    fill, filled, stop_at = writer._FileWriter._fill, [], [-1]

    def stopping(self, descriptor, region, stored, bar):
        if len(filled) == stop_at[0]:
            raise KeyboardInterrupt
        filled.append(region.name)
        fill(self, descriptor, region, stored, bar)

    def convert(target: str, ranks: RankFiles, stop: int = -1) -> int:
        filled.clear()
        stop_at[0] = stop
        with open_checkpoint(tmp_path / "plain") as plain:
            save_checkpoint(tmp_path / target, CONFIG, plain, "mixtralkit", ranks=ranks)
        return len(filled)

    monkeypatch.setattr(writer._FileWriter, "_fill", stopping)
    count = convert("whole", ranks)
    other = replace(ranks, attention_weights=FORMATS["int8"])
    for first, second, left in ((ranks, ranks, count - 7), (ranks, other, count), (other, ranks, count)):
        with pytest.raises(KeyboardInterrupt):
            convert("stopped", first, 7)
        assert [path.name for path in (tmp_path / "stopped").iterdir()] == [".partial"]
        assert convert("stopped", second) == left
        names = ["checkpoint.json", "rank-00-of-01.safetensors"]
        assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == names
        if second is ranks:
            for name in names:
                assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        shutil.rmtree(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        convert("stopped", ranks, 7)
    os.utime(tmp_path / "plain" / "consolidated.00.pth", ns=(1, 1))
    assert convert("stopped", ranks) == count
    held = Unfinished(tmp_path / "whole", "call")
    with pytest.raises(ValueError, match="whole: another process writes a checkpoint there"):
        Unfinished(tmp_path / "whole", "call")
    held.discard()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_no_conversion_made_is_not_taken_away(tmp_path: Path, kind: str) -> None:
    folder, kept = tmp_path / "target", tmp_path / "kept"
    folder.mkdir(), kept.mkdir()
    inside = {"file": folder / ".partial", "folder": folder / ".partial" / "mine", "link": kept / "mine"}[kind]
    if kind == "folder":
        inside.parent.mkdir()
    elif kind == "link":
        (folder / ".partial").symlink_to(kept)
    inside.write_text("mine")
    with pytest.raises(ValueError, match=r"target/\.partial: is in the way, and no conversion's"):
        save_checkpoint(folder, CONFIG, random_tensors(CONFIG))
    assert inside.read_text() == "mine"


def test_a_conversion_stopped_while_its_files_are_moved_can_be_made_again(tmp_path: Path, monkeypatch) -> None:
    tensors, finish = random_tensors(CONFIG), Unfinished.finish

    def stops(self: Unfinished) -> list[Path]:
        assert finish(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "finish", stops)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, CONFIG, tensors)
    assert len(save_checkpoint(tmp_path, CONFIG, tensors)) == len(list(tmp_path.iterdir())) > 1


def test_formats_of_a_plan_are_rounded_written_and_read_each_by_itself(tmp_path: Path, monkeypatch) -> None:
    """Four formats in a layer, cut for two ranks one of which lacks some of them."""
    monkeypatch.setattr(quantising, "BLOCK_BYTES", 70_000)
    tensors = random_tensors(CONFIG)
    plan = replace(contiguous(2, 4, 1), precision=[["int8", "plain", "fp8:block", "int4"], ["int4:64:zeros"] * 4])
    save_checkpoint(tmp_path / "plain", CONFIG, tensors)
    cut = RankFiles(2, ParallelConfig("dp", "tp"), replace(contiguous(2, 4, 2), precision=plan.precision))
    apart = replace(cut, parallel=ParallelConfig("dp", "ep"))
    with open_checkpoint(tmp_path / "plain") as plain:
        for name, ranks in (("one", RankFiles(plan=plan)), ("cut", cut), ("apart", apart)):
            save_checkpoint(tmp_path / name, CONFIG, plain, "mixtralkit", ranks=ranks)
    for name in ("cut", "apart"):
        with open_checkpoint(tmp_path / name) as packed:
            assert packed.found.precision == plan.precision
            save_checkpoint(tmp_path / f"{name}-one", CONFIG, packed, "mixtralkit", ranks=RankFiles(plan=plan))
    one, *others = ((tmp_path / n / "rank-00-of-01.safetensors").read_bytes() for n in ("one", "cut-one", "apart-one"))
    assert others == [one, one]
    layout = RankLayout(CONFIG, ParallelConfig(), plan)
    for name in ("plain", "one", "cut", "apart"):
        assert_same_bits(loaded(tmp_path / name, layout), rounded(tensors, layout))
    with open_checkpoint(tmp_path / "one") as packed:
        save_checkpoint(tmp_path / "numbers", CONFIG, packed, "hf")
        further = RankFiles(plan=replace(plan, precision=[["int8", "int8", "fp8:block", "int4"], plan.precision[1]]))
        save_checkpoint(
            tmp_path / "further", CONFIG, packed, "mixtralkit", ranks=further
        )  # what is plain may be rounded
        other = RankFiles(plan=replace(plan, precision=[["int4"] * 4] * 2))
        with pytest.raises(ValueError, match=r"quantize \('int4:32'\) must be 'int8'"):
            save_checkpoint(tmp_path / "other", CONFIG, packed, "mixtralkit", ranks=other)
    numbers = loaded(tmp_path / "numbers", RankLayout.single(CONFIG))["layers.0.feed_forward.w2"]
    w2_EDF = [tensors[f"layers.0.feed_forward.experts.{expert}.w2.weight"] for expert in range(4)]
    assert numbers[1].equal(w2_EDF[1].float())
    assert numbers[2].equal(parse_weights("fp8:block").quantize(w2_EDF[2]).float().bfloat16().float())
    wrong = replace(layout, plan=replace(plan, precision=[["int4"] * 4] * 2))
    with pytest.raises(ValueError, match=r"quantize \('int4:32'\) of layer 0, expert 0 must be 'int8'"):
        loaded(tmp_path / "one", wrong)


def _mixed_rank(context: RankContext, folder: Path):
    tensors = random_tensors(CONFIG, seed=1)
    names = [["int8", "plain", "fp8:block", "int4"], ["plain", "int8", "int8", "plain"]]
    for experts, plan in (("ep", contiguous(2, 4, 2)), ("ep", everywhere(2, 4, 2)), ("tp", contiguous(2, 4, 2))):
        layout = RankLayout(CONFIG, ParallelConfig("dp", experts), replace(plan, precision=names), context.rank)
        assert_same_bits(loaded(folder, layout, context), rounded(tensors, layout))


def test_ranks_have_their_parts_of_several_formats(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG, seed=1), "mistral-shards")
    run_ranks(_mixed_rank, 2, tmp_path)


def test_files_of_one_format_are_no_other(tmp_path: Path) -> None:
    ranks = RankFiles(weights=parse_weights("int8"))
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), "mixtralkit", ranks=ranks)
    for weights in (PLAIN, parse_weights("int4")):
        with pytest.raises(ValueError, match=rf"quantize \('{weights.name}'\) must be 'int8'"):
            loaded(tmp_path, replace(RankLayout.single(CONFIG), weights=weights))
    other = RankFiles(weights=parse_weights("int4"))
    attention = RankFiles(weights=parse_weights("int8"), attention_weights=FORMATS["fp8"])
    with open_checkpoint(tmp_path) as packed:
        save_checkpoint(tmp_path / "attention", CONFIG, packed, "mixtralkit", ranks=attention)
    wrong = replace(RankLayout.single(CONFIG), weights=FORMATS["int8"], attention_weights=FORMATS["int8"])
    with pytest.raises(ValueError, match=r"quantize_attention \('int8'\) must be 'fp8:channel'"):
        loaded(tmp_path / "attention", wrong)
    with open_checkpoint(tmp_path) as packed, pytest.raises(ValueError, match=r"\('int4:32'\) must be 'int8'"):
        save_checkpoint(tmp_path / "other", CONFIG, packed, "mixtralkit", ranks=other)
    text = (tmp_path / "checkpoint.json").read_text()
    (tmp_path / "checkpoint.json").write_text(text.replace('"int8"', '"int3"'))
    with pytest.raises(ValueError, match=r"quantize \('int3'\) must be one of"):
        open_checkpoint(tmp_path)
    (tmp_path / "checkpoint.json").write_text(text.replace('"quantize": "int8"', '"version": 1'))
    with pytest.raises(ValueError, match="I8"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="needs format 'mixtralkit'"):
        save_checkpoint(tmp_path / "hf", CONFIG, random_tensors(CONFIG), "hf", ranks=ranks)


@pytest.mark.parametrize(("name", "hidden"), [("int8", 160), ("int4:128", 320), ("fp8:block", 320)])
def test_groups_are_not_cut(name: str, hidden: int) -> None:
    layout = RankLayout(
        replace(CONFIG, hidden_dim=hidden), ParallelConfig("tp", "ep"), contiguous(2, 4, 2), 0, parse_weights(name)
    )
    with pytest.raises(ValueError, match=rf"hidden_dim \({hidden}\) must be cut into multiples of"):
        replace(layout, parallel=ParallelConfig("tp", "tp"))


def test_blocks_stay_within_the_memory_promise(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG))
    with open_checkpoint(tmp_path) as checkpoint:
        wide = replace(CONFIG, dim=4096, hidden_dim=14336)
        layout = replace(RankLayout.single(wide), weights=parse_weights("fp8:block"))
        piece = next(piece for piece in layout.pieces() if piece.is_expert)
        checkpoint.shapes = lambda: {piece.source: (14336, 4096)}
        blocks = list(quantising.rounded_blocks(checkpoint, {}, layout, piece))
        assert max(block.nbytes for block in blocks) <= reader.BLOCK_BYTES
        assert [block.rows for block in blocks][-1][1] == 14336
        assert all(block.rows[0] % 128 == 0 for block in blocks)
