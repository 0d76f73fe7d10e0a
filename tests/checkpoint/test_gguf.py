"""llama.cpp's files, against its own package ``gguf``: every type bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixtralkit.checkpoint import load_into, open_checkpoint, save_checkpoint
from mixtralkit.checkpoint.gguf_blocks import BLOCK_TYPES
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.weights import PackedWeight, parse_weights
from tests.checkpoint.gguf_files import CONFIG, QUANTISED, random_blocks, write_gguf
from tests.checkpoint.models import empty_parameters

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:.* become numbers")


@pytest.mark.parametrize("number", BLOCK_TYPES, ids=lambda number: BLOCK_TYPES[number].name)
def test_every_type_is_as_llama_cpp_has_it(number: int) -> None:
    kind = BLOCK_TYPES[number]
    theirs = gguf.GGMLQuantizationType(number)
    assert theirs.name == kind.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.weights, kind.size)
    blocks = random_blocks(kind, 64)
    expected = torch.from_numpy(gguf.dequantize(blocks, theirs))
    found = kind.numbers(torch.from_numpy(blocks))
    assert found.shape == expected.shape == (64, kind.weights)
    assert found.view(torch.int32).equal(expected.view(torch.int32))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("layout", ["stacked", "single"])
def test_a_model_is_read_bit_for_bit(tmp_path: Path, layout: str, kind: str) -> None:
    expected = write_gguf(tmp_path / "model.gguf", layout, kind)
    with open_checkpoint(tmp_path) as reader:
        assert reader.weights.name == ("int4:32" if kind == "Q4_0" else "plain")
        assert reader.config == CONFIG
        for name, values in expected.items():
            assert reader.read(name).float().equal(values), name
        some = reader.read("layers.1.feed_forward.experts.2.w2.weight", (3, 9), (40, 300)).float()
        assert some.equal(expected["layers.1.feed_forward.experts.2.w2.weight"][3:9, 40:300])
        found = empty_parameters(RankLayout.single(CONFIG))
        load_into(found, RankLayout.single(CONFIG), reader, RankContext())
    assert found["layers.0.feed_forward.w2"][1].equal(expected["layers.0.feed_forward.experts.1.w2.weight"])


@pytest.mark.parametrize(
    ("layout", "kind", "split"), [("merged", "Q6_K", 0), ("single", "Q8_0", 9), ("stacked", "F16", 20)]
)
def test_gate_and_up_in_one_and_models_in_parts(tmp_path: Path, layout: str, kind: str, split: int) -> None:
    expected = write_gguf(tmp_path / "model.gguf", layout, kind, split=split)
    assert len(list(tmp_path.iterdir())) > 1 or not split
    with open_checkpoint(tmp_path, "gguf") as reader:
        for name, values in expected.items():
            assert reader.read(name).float().equal(values), name


def test_it_converts_and_rounds_like_any_other(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "model.gguf", "stacked", "Q4_K")
    with open_checkpoint(tmp_path) as reader, pytest.warns(UserWarning, match=r"no tokenizer is written: .*token_type"):
        save_checkpoint(tmp_path / "hf", CONFIG, reader, "hf")
    with open_checkpoint(tmp_path / "hf") as reader:
        assert reader.read("layers.0.attention.wk.weight").equal(expected["layers.0.attention.wk.weight"])
    layout = replace(RankLayout.single(CONFIG), weights=parse_weights("int8"))
    found = empty_parameters(layout)
    with open_checkpoint(tmp_path) as reader:
        load_into(found, layout, reader, RankContext())
    w2 = layout.weights.quantize(expected["layers.1.feed_forward.experts.3.w2.weight"])
    assert found["layers.1.feed_forward.w2_data"][3].equal(w2.tensors[0])


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"gguf") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_and_foreign_files_get_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "stacked", "Q8_0")
    content = path.read_bytes()
    for cut in (3, 20, 700, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert "truncated" in refused(tmp_path) or cut == 3
    path.write_bytes(content.replace(b"GGUF\3", b"GGUF\x09", 1))
    assert "version (9) must be 2 or 3" in refused(tmp_path)
    place = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    path.write_bytes(content[:place] + (23).to_bytes(4, "little") + content[place + 4 :])
    assert "blk.0.attn_q.weight is stored as IQ4_XS; only F32, F16, BF16, Q4_0" in refused(tmp_path)
    path.write_bytes(content[: place + 4] + (2**62).to_bytes(8, "little") + content[place + 12 :])
    assert "truncated: blk.0.attn_q.weight ends at byte" in refused(tmp_path)
    path.write_bytes(content[: place + 4] + (64).to_bytes(8, "little") + content[place + 12 :])
    assert "begins at byte" in refused(tmp_path)
    path.write_bytes(content[: place + 4] + (7).to_bytes(8, "little") + content[place + 12 :])
    assert "wanted a multiple of 32 bytes behind" in refused(tmp_path)
    path.write_bytes(content + bytes(33))
    assert "padded or damaged: " in refused(tmp_path)
    path.write_bytes(content[:8] + (2**60).to_bytes(8, "little") + content[16:])
    assert "damaged: it claims" in refused(tmp_path)
    path.unlink()
    write_gguf(path, "stacked", "F16", arch="qwen2moe")
    assert "architecture 'qwen2moe' without experts, not a Mixtral" in refused(tmp_path)
    path.unlink()
    write_gguf(path, "stacked", "F16", **{"rope.scaling.type": "yarn"})
    assert "llama.rope.scaling.type ('yarn') is not followed" in refused(tmp_path)
    (tmp_path / "other.gguf").write_bytes(content)
    assert "holds several models, keep one" in refused(tmp_path)
    for name in ("model.gguf", "other.gguf"):
        (tmp_path / name).unlink()
    (tmp_path / "model-00002-of-00003.gguf").write_bytes(content)
    assert "lacks parts of model-of-00003.gguf: it has those numbered 2" in refused(tmp_path)


@pytest.mark.parametrize("layout", ["stacked", "single", "merged"])
def test_q4_0_experts_are_kept_as_they_are(tmp_path: Path, layout: str) -> None:
    expected = write_gguf(tmp_path / "model.gguf", layout, "Q4_0")
    kept = replace(RankLayout.single(CONFIG), weights=parse_weights("int4:32"))
    found = empty_parameters(kept)
    with open_checkpoint(tmp_path) as reader:
        assert reader.weights == kept.weights
        load_into(found, kept, reader, RankContext())
    for matrix, columns, own in (("w13", CONFIG.dim, ("w1", "w3")), ("w2", CONFIG.hidden_dim, ("w2",))):
        parts = tuple(found[f"layers.1.feed_forward.{name}"] for name, _ in kept.weights.parameters(matrix))
        numbers = PackedWeight(kept.weights, columns, parts, len(own)).float()
        for e in range(CONFIG.num_experts):
            whole = torch.cat([expected[f"layers.1.feed_forward.experts.{e}.{w}.weight"] for w in own])
            assert numbers[e].equal(whole)


def test_experts_without_an_exact_home_take_memory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "stacked", "Q8_0")
    with pytest.warns(UserWarning, match="by GGUF become numbers, 0.0 GB of memory in 16 bits, because .*Q8_0 has no"):
        open_checkpoint(tmp_path).close()
