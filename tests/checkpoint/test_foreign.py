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
from tests.checkpoint.quantisers import CONFIG, LAYER, OURS, Quantise, assert_reads, change, write
from tests.configs import TOLERANCE
from tests.ranks import run_ranks

E4M3 = torch.float8_e4m3fn


def by_scalar(w_OK: torch.Tensor):
    """AutoFP8: one multiplier a matrix, and one of activations that nobody needs."""
    scale = w_OK.float().abs().amax() / 448
    data = (w_OK.float() / scale).to(E4M3)
    held = {"weight": data, "weight_scale": scale, "input_scale": torch.tensor(3e-3)}
    return held, data.float() * scale


def by_blocks(w_OK: torch.Tensor):
    """transformers' fine-grained FP8, read by its own dequantisation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    outputs, inputs = w_OK.shape
    blocks = torch.nn.functional.pad(w_OK.float(), (0, -inputs % 128, 0, -outputs % 128))
    blocks = blocks.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / 448
    data = (blocks / scales[:, None, :, None]).to(E4M3)
    whole = data.flatten(2).flatten(0, 1)
    numbers = Fp8Dequantize(None)._dequantize_one(whole, scales, torch.float32)[:outputs, :inputs]
    return {"weight": whole[:outputs, :inputs], "weight_scale_inv": scales}, numbers


def by_rows(dtype: torch.dtype, kind: torch.dtype, most: int) -> Quantise:
    """compressed-tensors: a scale an output, of e4m3 or int8, read by its own library."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    def quantise(w_OK: torch.Tensor):
        scale = (w_OK.float().abs().amax(1, keepdim=True) / most).to(dtype)
        data = (w_OK.float() / scale.float()).round(decimals=0 if kind == torch.int8 else 9).to(kind)
        args = QuantizationArgs(num_bits=8, type="int" if kind == torch.int8 else "float", strategy="channel")
        return {"weight": data, "weight_scale": scale}, dequantize(data, scale.float(), args=args)

    return quantise


def ct(**weights: object) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head", "re:.*gate"]}


FLOATS = ct(num_bits=8, type="float", strategy="channel")
INTS = ct(num_bits=8, type="int", strategy="channel")


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


def packed_int4(group: int, symmetric: bool, scale_dtype: torch.dtype = torch.bfloat16, spread: float = 1) -> Quantise:
    """compressed-tensors' ``pack-quantized``, packed and read by its own library."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    def quantise(w_OK: torch.Tensor):
        w_OGC = (w_OK.float() * spread).unflatten(1, (-1, w_OK.shape[1] if group == -1 else group))
        low, high = w_OGC.amin(2), w_OGC.amax(2)
        scale = ((high - low) / 15 if not symmetric else w_OGC.abs().amax(2) / 7.5).to(scale_dtype)
        zero = (-8 - low / scale.float()).round().clamp(-8, 7).to(torch.int8)
        if symmetric:
            zero.zero_()
        data = (w_OGC / scale.float()[..., None] + zero[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(1)
        args = QuantizationArgs(
            num_bits=4, symmetric=symmetric, strategy="channel" if group == -1 else "group",
            group_size=None if group == -1 else group,
        )  # fmt: skip
        held = {
            "weight_packed": pack_to_int32(data, 4), "weight_scale": scale, "weight_shape": torch.tensor(data.shape),
        }  # fmt: skip
        if not symmetric:
            held["weight_zero_point"] = pack_to_int32(zero, 4, packed_dim=0)
        return held, dequantize(data, scale.float(), None if symmetric else zero, args=args)

    return quantise


@pytest.mark.parametrize(
    ("group", "symmetric", "kept"),
    [(32, True, "int4:32"), (64, False, "int4:64:zeros"), (64, True, "int4:64"), (-1, False, "int4:64:zeros")],
)
def test_packed_int4_is_kept_as_it_is(tmp_path: Path, group: int, symmetric: bool, kept: str) -> None:
    """Scales of a whole output are repeated for groups that divide 256 and 320 columns."""
    pytest.importorskip("compressed_tensors")
    stated = ct(num_bits=4, type="int", strategy="group", group_size=group) | {"format": "pack-quantized"}
    assert_reads(tmp_path, write(tmp_path, packed_int4(group, symmetric), stated), kept, tmp_path)


def pack_words(numbers_RC: torch.Tensor, order=range(8)) -> torch.Tensor:
    """int32 [R, C / 8] by the definition: nibble i of word c is column 8 c + order[i]."""
    columns = numbers_RC.shape[1]
    words = [
        [sum(int(row[8 * c + column]) << 4 * i for i, column in enumerate(order)) for c in range(columns // 8)]
        for row in numbers_RC.tolist()
    ]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def of_words(order, along_inputs: bool, less: int, symmetric: bool = False, group: int = 64) -> Quantise:
    """AWQ and GPTQ from the definition of their layouts: layers with inputs as rows, (q - z) · s."""

    def quantise(w_OK: torch.Tensor):
        w_KO = w_OK.float().T
        w_GCO = w_KO.unflatten(0, (-1, group))
        low, high = w_GCO.amin(1), w_GCO.amax(1)
        scale = ((high - low) / 15).half()
        zero = torch.full_like(low, 8) if symmetric else (-low / scale.float()).round().clamp(0, 15)
        zero[0, 1] = 8 if symmetric else 0
        q = (w_GCO / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15).flatten(0, 1)
        numbers = (q - zero.repeat_interleave(group, 0)) * scale.float().repeat_interleave(group, 0)
        zeros = pack_words(zero.long(), order) - less
        qweight = pack_words(q.T.long()).T if along_inputs else pack_words(q.long(), order)
        held = {"qweight": qweight, "qzeros": zeros, "scales": scale}
        if along_inputs:
            held |= {"g_idx": (torch.arange(len(w_KO)) // group).int(), "bias": torch.zeros(len(w_OK)).half()}
        return held, numbers.T

    return quantise


ONES = 0x11111111
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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


def in_order_of_use(group: int = 64) -> Quantise:
    """GPTQ with ``desc_act``: a column's group is by importance, not by place."""

    def quantise(w_OK: torch.Tensor):
        order_K = torch.randperm(w_OK.shape[1], generator=torch.Generator().manual_seed(5))
        held, numbers_OK = of_words(range(8), True, ONES, group=group)(w_OK[:, order_K])
        back_K = order_K.argsort()  # the rows of qweight are in the model's order, as g_idx is
        plain_OK = torch.stack([(held["qweight"].T >> 4 * i) & 15 for i in range(8)], 2).flatten(1)
        held["qweight"], held["g_idx"] = pack_words(plain_OK[:, back_K]).T, held["g_idx"][back_K]
        return held, numbers_OK[:, back_K]

    return quantise


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


def load(folder: Path) -> None:
    with open_checkpoint(folder) as reader:
        layout = replace(RankLayout.single(CONFIG), weights=reader.weights)
        load_into(empty_parameters(layout), layout, reader, RankContext())


def said_of(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).partition(": ")[2]


def test_damaged_files_get_one_sentence(tmp_path: Path) -> None:
    """Tensor, found, wanted; what only the numbers show is found while they are read."""
    stated = {"quant_method": "fp8"}
    write(tmp_path, by_scalar, stated)
    held = load_file(tmp_path / "model.safetensors")
    for changes, says in (
        ({"weight_scale": None}, "weight_scale: found nothing, wanted a tensor [1] or [1, 1] or [256, 1] or"),
        ({"weight_scale": torch.ones(7)}, "weight_scale: found [7], wanted [1] or [1, 1] or [256, 1] or [256]"),
        ({"weight_scale": torch.tensor(0.0)}, "weight_scale: found a scale of 0.0, wanted finite numbers other than 0"),
        ({"weight_scale": torch.tensor(float("nan"))}, "weight_scale: found a scale of nan, wanted finite numbers"),
        ({"weight_scale": torch.ones(1).long()}, "weight_scale: found int64, wanted float32 or bfloat16 or float16"),
        ({"weight": torch.ones(256, 310).to(E4M3)}, "weight: found [256, 310], wanted [256, 320]"),
        ({"weight": torch.ones(256, 320).to(torch.int8)}, "weight: found int8, wanted float8_e4m3fn"),
        ({"zero": torch.ones(3)}, "zero: found float32 [3], wanted no such tensor of FP8"),
    ):
        save_file(held, tmp_path / "model.safetensors")
        change(tmp_path, **changes)
        assert said_of(tmp_path).startswith(f"{LAYER}.{says}"), says
    router = "model.layers.0.block_sparse_moe.gate"
    data, scale = torch.ones(2, 256).to(E4M3), torch.ones(1)
    save_file(held | {f"{router}.weight": data, f"{router}.weight_scale": scale}, tmp_path / "model.safetensors")
    assert said_of(tmp_path) == f"{router}.weight: found a router quantised by FP8, wanted its weight in full precision"


def test_numbers_in_eight_bits_without_a_scale_are_no_numbers(tmp_path: Path) -> None:
    """They were read as they are where the file calls them otherwise than layers, as transformers 5 does."""
    write(tmp_path, by_scalar, {"quant_method": "fp8"})
    held = load_file(tmp_path / "model.safetensors")
    packed = "model.layers.0.mlp.experts.down_proj"
    for name, shape in ((packed, (2, 256, 320)), ("model.norm.weight", (256,))):
        save_file(held | {name: torch.ones(shape).to(E4M3)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{name}: found float8_e4m3fn, wanted numbers of 16 bits or more"):
            load(tmp_path)


def test_damaged_words_get_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, of_words(range(8), True, ONES), GPTQ | {"sym": False})
    held = load_file(tmp_path / "model.safetensors")
    for changes, says in (
        ({"qweight": torch.zeros(40, 128).int()}, "qweight: found [40, 128], wanted [40, 256]"),
        ({"qzeros": None}, "qzeros: found nothing, wanted a tensor [5, 32]"),
        ({"scales": torch.ones(4, 256).half()}, "scales: found [4, 256], wanted [5, 256]"),
        ({"scales": torch.full((5, 256), torch.inf).half()}, "scales: found a scale of inf, wanted finite numbers"),
        ({"g_idx": torch.full((320,), 5).int()}, "g_idx: found group 5, wanted 0 to 4"),
        ({"bias": torch.ones(256).half()}, "bias: found numbers other than 0, wanted none"),
    ):
        save_file(held, tmp_path / "model.safetensors")
        change(tmp_path, **changes)
        assert said_of(tmp_path).startswith(f"{LAYER}.{says}"), says
    save_file(held, tmp_path / "model.safetensors")
    text = (tmp_path / "config.json").read_text()
    for group, says in ((96, "group_size (96) must divide 256 columns"), ("64", "group_size ('64') must be a number")):
        (tmp_path / "config.json").write_text(text.replace('"group_size": 64', f'"group_size": {json.dumps(group)}'))
        assert says in said_of(tmp_path)


def test_damaged_packed_tensors_get_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    write(tmp_path, packed_int4(32, False), ct(num_bits=4, type="int", strategy="group", group_size=32))
    held = load_file(tmp_path / "model.safetensors")
    for changes, says in (
        ({"weight_packed": torch.zeros(256, 20).int()}, "weight_packed: found [256, 20], wanted [256, 40]"),
        ({"weight_shape": torch.tensor([256, 319])}, "weight_shape: found [256, 319], wanted [256, 320]"),
        (
            {"weight_scale": torch.ones(256, 7)},
            "weight_scale: found 7 groups, wanted a number of groups that",
        ),
        ({"weight_zero_point": torch.zeros(32, 9).int()}, "weight_zero_point: found [32, 9], wanted [32, 10]"),
    ):
        save_file(held, tmp_path / "model.safetensors")
        change(tmp_path, **changes)
        assert said_of(tmp_path).startswith(f"{LAYER}.{says}"), says


def nf4(nested: bool) -> Quantise:
    """bitsandbytes' own, on a CPU."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def quantise(w_OK: torch.Tensor):
        packed, state = quantize_4bit(w_OK.float(), compress_statistics=nested, quant_type="nf4")
        held = {f"weight.{end}": tensor for end, tensor in state.as_dict(packed=True).items()}
        return held | {"weight": packed}, dequantize_4bit(packed, state)

    return quantise


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
    assert said_of(tmp_path).startswith(f"{router}.weight: found a router quantised by MLX, wanted")


@pytest.mark.filterwarnings("ignore:.* become numbers")
def test_damaged_nf4_gets_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write(tmp_path, nf4(True), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    held, state = load_file(tmp_path / "model.safetensors"), "weight.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(held[f"{LAYER}.{state}"].tolist()))

    def stating(**changes: object) -> torch.Tensor:
        return torch.tensor(list(json.dumps(said | changes).encode()), dtype=torch.uint8)

    for changes, says in (
        ({"weight": torch.zeros(99, 1).byte()}, "weight: found [99, 1], wanted [40960, 1]"),
        ({state: None}, "weight.quant_state: found nothing, wanted the bytes of a JSON object"),
        ({state: torch.zeros(9).byte()}, f"{state}: found text that is not JSON"),
        ({state: stating(blocksize=96)}, "weight.quant_state: found blocksize 96, wanted one that divides 320 columns"),
        ({state: stating(nested_offset=None)}, "weight.quant_state: found nested_blocksize 256, offset None, wanted"),
        ({"weight.absmax": torch.zeros(7).byte()}, "weight.absmax: found [7], wanted [1280]"),
        ({"weight.nested_absmax": torch.full((5,), torch.nan)}, "weight.absmax: found an infinite or undefined number"),
    ):
        save_file(held, tmp_path / "model.safetensors")
        change(tmp_path, **changes)
        assert said_of(tmp_path).startswith(f"{LAYER}.{says}"), says


def test_transformers_makes_the_same_numbers_of_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fine-grained FP8, which it reads on a CPU; columns in whole blocks, as it wants them."""
    from transformers import FineGrainedFP8Config, MixtralForCausalLM

    monkeypatch.setattr(quantisers, "CONFIG", replace(CONFIG, hidden_dim=384))
    write(tmp_path, by_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    theirs = MixtralForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).state_dict()
    with open_checkpoint(tmp_path) as reader:
        w13 = torch.cat([reader.read(f"layers.1.feed_forward.experts.1.{name}.weight") for name in ("w1", "w3")])
        assert theirs["model.layers.1.mlp.experts.gate_up_proj"][1].equal(w13)
        w2 = reader.read("layers.1.feed_forward.experts.1.w2.weight")
        assert theirs["model.layers.1.mlp.experts.down_proj"][1].equal(w2)
        assert theirs["model.layers.0.self_attn.o_proj.weight"].equal(reader.read("layers.0.attention.wo.weight"))
