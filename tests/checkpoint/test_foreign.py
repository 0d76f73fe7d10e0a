"""Checkpoints whose weights others quantised: the same numbers as an oracle has, bit for bit."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtralkit.checkpoint import RankFiles, files, load_into, open_checkpoint, save_checkpoint
from mixtralkit.checkpoint.foreign import base, int32_words
from mixtralkit.config import ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.weights import PackedWeight, parse_weights
from mixtralkit.planning.plan import contiguous
from tests.checkpoint import quantisers
from tests.checkpoint.models import empty_parameters
from tests.checkpoint.quantisers import (
    AWQ,
    AWQ_ORDER,
    CONFIG,
    E4M3,
    FLOATS,
    GPTQ,
    INTS,
    ONES,
    OURS,
    Quantise,
    assert_reads,
    bnb_int8,
    by_blocks,
    by_rows,
    by_scalar,
    change,
    ct,
    hqq,
    in_order_of_use,
    nf4,
    of_bytes,
    of_words,
    packed_int4,
    write,
)
from tests.configs import TOLERANCE
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("quantise", "stated", "kept"),
    [
        (
            by_scalar,
            {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
            "fp8:tensor",
        ),
        (by_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8:block"),
        (lambda w: by_rows(torch.bfloat16, E4M3, 448)(w), FLOATS, "fp8:channel"),
        (lambda w: by_rows(torch.float32, E4M3, 448)(w), {"quant_method": "fbgemm_fp8"}, "fp8:channel"),
        (lambda w: by_rows(torch.float32, torch.int8, 127)(w), INTS, "int8"),
    ],
    ids=["AutoFP8", "fine-grained", "float-quantized", "fbgemm", "int-quantized"],
)
def test_eight_bits_are_kept_as_they_are(tmp_path: Path, quantise: Quantise, stated: dict, kept: str) -> None:
    if stated in (FLOATS, INTS):
        pytest.importorskip("compressed_tensors")
    assert_reads(tmp_path, write(tmp_path, quantise, stated), kept, tmp_path)


@pytest.mark.parametrize(
    ("group", "symmetric", "kept"),
    [(32, True, "int4:32"), (64, False, "int4:64:zeros"), (64, True, "int4:64"), (-1, False, "int4:64:zeros")],
)
def test_packed_int4_is_kept_as_it_is(tmp_path: Path, group: int, symmetric: bool, kept: str) -> None:
    """Scales of a whole output are repeated for groups that divide 256 and 320 columns."""
    pytest.importorskip("compressed_tensors")
    stated = ct(num_bits=4, type="int", strategy="group", group_size=group) | {"format": "pack-quantized"}
    assert_reads(tmp_path, write(tmp_path, packed_int4(group, symmetric), stated), kept, tmp_path)


@pytest.mark.parametrize(
    ("quantise", "stated", "kept"),
    [
        (of_words(range(8), True, ONES), GPTQ | {"sym": False}, "int4:64:zeros"),
        (of_words(range(8), True, 0), GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, "int4:64:zeros"),
        (of_words(range(8), True, ONES, symmetric=True), GPTQ | {"sym": True}, "int4:64"),
        (of_words(range(8), True, 0, symmetric=True), GPTQ | {"sym": True}, "int4:64"),
        (of_words(AWQ_ORDER, False, 0), AWQ, "int4:64:zeros"),
    ],
    ids=["v1", "v2", "v1 symmetric", "v2 labelled v1", "AWQ"],
)
def test_gptq_and_awq_are_kept_as_they_are(tmp_path: Path, quantise: Quantise, stated: dict, kept: str) -> None:
    """A zero point of 0 borrows from its neighbour in GPTQ's first version."""
    assert_reads(tmp_path, write(tmp_path, quantise, stated), kept, tmp_path)


@pytest.mark.parametrize(("version", "in_order"), [("gptq", True), ("gptq_v2", False)])
def test_gptq_in_eight_bits_becomes_numbers(tmp_path: Path, version: str, in_order: bool) -> None:
    stated = GPTQ | {"bits": 8, "checkpoint_format": version, "desc_act": not in_order}
    expected = write(tmp_path, of_bytes(0x01010101 if version == "gptq" else 0, in_order=in_order), stated)
    with pytest.warns(UserWarning, match=r"by GPTQ become numbers, .*because .*groups of 8 bits"):
        assert_reads(tmp_path, expected, "plain", tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_becomes_numbers(tmp_path: Path, bits: int) -> None:
    stated = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits}}}
    expected = write(tmp_path, hqq(bits), stated)
    with pytest.warns(UserWarning, match=r"by HQQ become numbers, .*because .*zero points are fractions"):
        assert_reads(tmp_path, expected, "plain", tmp_path)
    change(tmp_path, axis=torch.tensor(0, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"w2\.axis: found 0, wanted 1"):
        open_checkpoint(tmp_path)


def test_bitsandbytes_int8_is_kept(tmp_path: Path) -> None:
    """The same steps of the same size, which it divides by 127 after and not before they are multiplied."""
    pytest.importorskip("bitsandbytes")
    expected = write(tmp_path, bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    layout = replace(RankLayout.single(CONFIG), weights=parse_weights("int8"), attention_weights=parse_weights("int8"))
    found = empty_parameters(layout)
    with open_checkpoint(tmp_path) as reader:
        assert reader.weights == layout.weights
        load_into(found, layout, reader, RankContext())
    parts = tuple(found[f"layers.1.feed_forward.{name}"] for name, _ in layout.weights.parameters("w2"))
    w2_EDF = PackedWeight(layout.weights, CONFIG.hidden_dim, parts).float()
    wo_DQ = PackedWeight(
        layout.weights, 256, tuple(found[f"layers.1.attention.wo.{end}"] for end in ("data", "scales"))
    )
    for numbers, name in ((w2_EDF[1], f"{OURS}.weight"), (wo_DQ.float(), "layers.1.attention.wo.weight")):
        torch.testing.assert_close(numbers, expected[name], rtol=2.4e-7, atol=0.0)


def test_act_order_becomes_numbers_with_a_word_on_memory(tmp_path: Path) -> None:
    expected = write(tmp_path, in_order_of_use(), GPTQ | {"sym": False, "desc_act": True})
    with pytest.warns(UserWarning, match=r"by GPTQ become numbers, 0.0 GB of memory in 16 bits, because .*act-order"):
        assert_reads(tmp_path, expected, "plain", tmp_path)


@pytest.mark.parametrize(
    ("dtype", "spread", "why"),
    [(torch.bfloat16, 1e-7, "scales are bfloat16 and beyond float16"), (torch.float32, 1, "float32 and beyond")],
)
def test_scales_that_float16_does_not_hold(tmp_path: Path, dtype: torch.dtype, spread: float, why: str) -> None:
    pytest.importorskip("compressed_tensors")
    stated = ct(num_bits=4, type="int", strategy="group", group_size=32)
    expected = write(tmp_path, packed_int4(32, True, dtype, spread), stated)
    with pytest.warns(UserWarning, match=why):
        assert_reads(tmp_path, expected, "plain", tmp_path)


def test_experts_of_which_one_is_not_quantised_become_numbers(tmp_path: Path) -> None:
    expected = write(tmp_path, of_words(AWQ_ORDER, False, 0), AWQ)
    whole = expected[f"{OURS}.weight"].bfloat16()
    change(tmp_path, qweight=None, qzeros=None, scales=None, weight=whole)
    expected[f"{OURS}.weight"] = whole.float()
    with pytest.warns(UserWarning, match=r"in several formats, int4:64:zeros \(.*\), plain \(.* is not quantised\)"):
        assert_reads(tmp_path, expected, "plain", tmp_path)


def test_what_is_said_beside_config_json(tmp_path: Path) -> None:
    expected = write(tmp_path, of_words(AWQ_ORDER, False, 0), None)
    beside = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(beside))
    assert_reads(tmp_path, expected, "int4:64:zeros", tmp_path)


def test_another_format_is_rounded_to_when_it_is_asked_for(tmp_path: Path) -> None:
    """From the numbers that the file means, not from those of its dtype."""
    expected = write(tmp_path, of_words(AWQ_ORDER, False, 0), AWQ)
    layout = replace(RankLayout.single(CONFIG), weights=parse_weights("int8"))
    found = empty_parameters(layout)
    with open_checkpoint(tmp_path) as reader:
        load_into(found, layout, reader, RankContext())
        save_checkpoint(tmp_path / "int8", CONFIG, reader, "mixtralkit", ranks=RankFiles(weights=layout.weights))
        save_checkpoint(tmp_path / "kept", CONFIG, reader, "mixtralkit", ranks=RankFiles(weights=reader.weights))
    again = empty_parameters(layout)
    with open_checkpoint(tmp_path / "int8") as reader:
        load_into(again, layout, reader, RankContext())
    w2 = layout.weights.quantize(expected[f"{OURS}.weight"])
    for one in (found, again):
        assert one["layers.1.feed_forward.w2_data"][1].equal(w2.tensors[0])
        assert one["layers.1.feed_forward.w2_scales"][1].equal(w2.tensors[1])
    kept = replace(layout, weights=parse_weights("int4:64:zeros"))
    found = empty_parameters(kept)
    with open_checkpoint(tmp_path / "kept") as reader:
        load_into(found, kept, reader, RankContext())
    parts = tuple(found[f"layers.1.feed_forward.{name}"] for name, _ in kept.weights.parameters("w2"))
    assert PackedWeight(kept.weights, CONFIG.hidden_dim, parts).float()[1].equal(expected[f"{OURS}.weight"])


@pytest.mark.parametrize(("kind", "dtype"), [("fp8", torch.float32), ("awq", torch.float32), ("awq", torch.bfloat16)])
def test_logits_are_hugging_faces_on_the_same_numbers(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    from transformers import MixtralForCausalLM

    quantise, stated = {"fp8": (by_scalar, {"quant_method": "fp8"}), "awq": (of_words(AWQ_ORDER, False, 0), AWQ)}[kind]
    write(tmp_path, quantise, stated)
    theirs = MixtralForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with open_checkpoint(tmp_path) as reader:
        ours = Transformer(replace(RankLayout.single(CONFIG), weights=reader.weights), RankContext(), dtype)
        load_into(ours.named_tensors(), ours.layout, reader, RankContext())
    tokens = torch.tensor([[1, 17, 4, 33, 8, 2, 41]])
    with torch.no_grad():
        expected = theirs(tokens).logits
    found = ours.forward(tokens).float()
    assert (found - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("kind", ["awq", "gptq", "act-order"])
def test_a_wide_model_is_read_once_and_in_small_pieces(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words across the layer's rows are read in the order of the file, not once for every block of rows."""
    config = replace(CONFIG, dim=1024, hidden_dim=3584, n_layers=1)
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (3584 // 4, 1024), dtype=np.int32)

    def quantise(w_OK: torch.Tensor):
        outputs, inputs = w_OK.shape
        groups = inputs // 64
        shape = (inputs, outputs // 8) if kind == "awq" else (inputs // 8, outputs)
        held = {
            "qweight": torch.from_numpy(np.resize(words, shape).copy()), "scales": torch.ones(groups, outputs).half(),
            "qzeros": torch.zeros(groups, outputs // 8, dtype=torch.int32),
        }  # fmt: skip
        if kind == "act-order":
            held["g_idx"] = (torch.arange(inputs) % groups).int()
        return held, w_OK

    monkeypatch.setattr(quantisers, "CONFIG", config)
    write(tmp_path, quantise, AWQ if kind == "awq" else GPTQ | {"sym": False}, also="none")
    sizes, asked, real = [], [], os.preadv
    whole = base.piece
    monkeypatch.setattr(int32_words, "piece", lambda *at: [sizes.append((found := whole(*at)).nbytes), found][1])
    monkeypatch.setattr(files.os, "preadv", lambda *at: [asked.append(got := real(*at)), got][1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = open_checkpoint(tmp_path)
    layout = replace(RankLayout.single(config), weights=reader.weights)
    with reader:
        load_into(empty_parameters(layout), layout, reader, RankContext())
    assert max(sizes) <= 2 << 20
    most = 1.7 if kind == "act-order" else 1.2  # each piece of columns needs all scales again
    assert sum(asked) < most * reader.file_bytes


def _check_rank(context: RankContext, folder: Path, expected: dict[str, torch.Tensor]):
    with open_checkpoint(folder) as reader:
        for experts in ("ep", "tp"):
            plan, parallel = contiguous(CONFIG.n_layers, CONFIG.num_experts, 2), ParallelConfig("tp", experts)
            layout = RankLayout(reader.config, parallel, plan, context.rank, reader.weights)
            found = empty_parameters(layout)
            load_into(found, layout, reader, context)
            first, last = layout.hidden
            parts = tuple(found[f"layers.1.feed_forward.{name}"] for name, _ in layout.weights.parameters("w2"))
            numbers = PackedWeight(layout.weights, last - first, parts).float()
            for slot, expert in enumerate(layout.experts(1)):
                whole = expected[f"layers.1.feed_forward.experts.{expert}.w2.weight"]
                assert numbers[slot].equal(whole[:, first:last])
            wo = expected["layers.1.attention.wo.weight"].chunk(2, 1)[context.rank]
            assert found["layers.1.attention.wo.weight"].equal(wo)


def test_ranks_have_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, hidden_dim=256)
    monkeypatch.setattr(quantisers, "CONFIG", config)
    expected = write(tmp_path, of_words(AWQ_ORDER, False, 0), AWQ)
    run_ranks(_check_rank, 2, tmp_path, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_becomes_numbers(tmp_path: Path, nested: bool) -> None:
    pytest.importorskip("bitsandbytes")
    expected = write(tmp_path, nf4(nested), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.warns(UserWarning, match="by bitsandbytes become numbers, 0.0 GB of memory in 16 bits, because"):
        assert_reads(tmp_path, expected, "plain", tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx_becomes_numbers(tmp_path: Path, bits: int) -> None:
    """By its own library, with the experts of a layer in one tensor and the embedding quantised too."""
    mx = pytest.importorskip("mlx.core")

    def quantise(w_OK: torch.Tensor):
        parts = mx.quantize(mx.array(w_OK.float().numpy()), group_size=64, bits=bits)
        words, scales, biases = (torch.from_numpy(np.array(part)) for part in parts)
        numbers = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=64, bits=bits)))
        return {"weight": words.view(torch.uint32), "scales": scales, "biases": biases}, numbers

    expected = write(tmp_path, quantise, None, also="embed_tokens")
    tensors, stacked = load_file(tmp_path / "model.safetensors"), {}
    for name, tensor in tensors.items():
        stem, found, end = name.partition(".experts.")
        if found:
            expert, matrix, part = end.split(".")
            projection = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[matrix]
            stacked.setdefault(f"{stem}.switch_mlp.{projection}.{part}", []).append(tensor)
            assert len(stacked[f"{stem}.switch_mlp.{projection}.{part}"]) == int(expert) + 1
        else:
            stacked[name] = [tensor]
    whole = {name: torch.stack(parts) if "switch_mlp" in name else parts[0] for name, parts in stacked.items()}
    save_file(whole, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization": {"group_size": 64, "bits": bits}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="by MLX become numbers"):
        assert_reads(tmp_path, expected, "plain", tmp_path)
    router = "model.layers.0.block_sparse_moe.gate"
    quantised, _ = quantise(whole.pop(f"{router}.weight"))
    save_file(whole | {f"{router}.{end}": part for end, part in quantised.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{router}\.weight: found a router quantised by MLX, wanted"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["fine-grained FP8", "pack-quantized"])
def test_transformers_makes_the_same_numbers_of_the_same_file(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what it reads on a CPU; columns in whole blocks, as it wants; the second is rounded."""
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config, MixtralForCausalLM

    monkeypatch.setattr(quantisers, "CONFIG", replace(CONFIG, hidden_dim=384))
    if kind == "pack-quantized":
        pytest.importorskip("compressed_tensors")
        stated = ct(num_bits=4, type="int", strategy="group", group_size=64, symmetric=True)
        stated |= {"format": "pack-quantized", "quantization_status": "compressed"}
        write(tmp_path, packed_int4(64, True), stated)
        as_numbers = CompressedTensorsConfig(run_compressed=False)
    else:
        write(tmp_path, by_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]})
        as_numbers = FineGrainedFP8Config(dequantize=True)
    theirs = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=as_numbers)
    state, expert = theirs.state_dict(), "layers.1.feed_forward.experts.1"

    def ours(name: str) -> torch.Tensor:
        numbers = reader.read(f"{name}.weight")
        return numbers.bfloat16().float() if kind == "pack-quantized" else numbers

    with open_checkpoint(tmp_path) as reader:
        w13 = torch.cat([ours(f"{expert}.w1"), ours(f"{expert}.w3")])
        assert state["model.layers.1.mlp.experts.gate_up_proj"][1].float().equal(w13)
        assert state["model.layers.1.mlp.experts.down_proj"][1].float().equal(ours(f"{expert}.w2"))
        assert state["model.layers.0.self_attn.o_proj.weight"].float().equal(ours("layers.0.attention.wo"))
