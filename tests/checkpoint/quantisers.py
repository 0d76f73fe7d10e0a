"""Checkpoints as other quantisers write them, and what their weights mean by an oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixtralkit.checkpoint import load_into, open_checkpoint, save_checkpoint
from mixtralkit.config import ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.weights import PLAIN, ExpertWeights, PackedWeight, parse_weights
from tests.checkpoint.models import empty_parameters, random_tensors

CONFIG = ModelConfig(
    dim=256, n_layers=2, head_dim=32, hidden_dim=320, n_heads=8, n_kv_heads=2, vocab_size=64, num_experts=2
)
LAYER = "model.layers.1.block_sparse_moe.experts.1.w2"
OURS = "layers.1.feed_forward.experts.1.w2"

E4M3 = torch.float8_e4m3fn
ONES = 0x11111111
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}

# a weight [O, K] -> the tensors of the file by the end of their names, and their numbers
Quantise = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def write(
    folder: Path, quantise: Quantise, stated: dict[str, Any] | None, also: str = "_proj.",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Hugging Face's files of a random model, its experts and layers with ``also`` in their names quantised.

    Returns the numbers by our names.
    """
    whole = random_tensors(CONFIG, dtype)
    random = {name: tensor / 8 if tensor.dim() > 1 else tensor for name, tensor in whole.items()}
    save_checkpoint(folder / "plain", CONFIG, random, "hf", 1)
    tensors, numbers = {}, {}
    for name, tensor in load_file(folder / "plain" / "model.safetensors").items():
        if ".experts." in name or also in name:
            made, numbers[name] = quantise(tensor)
            tensors |= {name.removesuffix("weight") + end: part.contiguous() for end, part in made.items()}
        else:
            tensors[name] = numbers[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": stated} if stated else {})))
    floats = {name: tensor.float().contiguous() for name, tensor in numbers.items()}
    save_file(floats, folder / "plain" / "model.safetensors")
    with open_checkpoint(folder / "plain") as reader:
        return {name: reader.read(name) for name in reader.shapes()}


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Puts other tensors in the place of those of ``LAYER``, by the end of their names; None takes one away."""
    path = folder / "model.safetensors"
    held = load_file(path)
    for end, tensor in tensors.items():
        held.pop(f"{LAYER}.{end}", None)
        if tensor is not None:
            held[f"{LAYER}.{end}"] = tensor.contiguous()
    save_file(held, path)


def assert_reads(folder: Path, expected: dict[str, torch.Tensor], kept: str, tmp_path: Path) -> None:
    """The same numbers bit for bit: read in any piece, loaded in the format that experts are kept in, converted."""
    with open_checkpoint(folder) as reader:
        assert reader.weights.name == kept
        for name, values in expected.items():
            assert reader.read(name).float().equal(values), name
        assert reader.read(f"{OURS}.weight", (5, 77), (40, 300)).equal(expected[f"{OURS}.weight"][5:77, 40:300])
        for part in reader.weights.parts:
            name = f"{OURS}.{part.name}"
            whole = reader.read(name)
            rows, columns = (whole.shape[0] // 3, whole.shape[0]), (whole.shape[1] // 2, whole.shape[1])
            assert (
                reader.read(name, rows, columns)
                .view(torch.uint8)
                .equal(whole[slice(*rows), slice(*columns)].contiguous().view(torch.uint8))
            )
        attention = {"fp8:tensor": "fp8:channel", "fp8:channel": "fp8:channel", "int8": "int8"}.get(kept)
        assert reader.formats.get("layers.1.attention.wq", PLAIN) == parse_weights(attention)
        formats = reader.weights, parse_weights(attention, "quantize_attention")
        layout = RankLayout(CONFIG, *_single(), 0, *formats)
        found = empty_parameters(layout)
        load_into(found, layout, reader, RankContext())
        save_checkpoint(tmp_path / "hf", CONFIG, reader, "hf")
    for layer in range(CONFIG.n_layers):
        prefix = f"layers.{layer}.feed_forward."
        up, down = (_floats(found, prefix + matrix, layout.weights) for matrix in ("w13", "w2"))
        for expert in range(CONFIG.num_experts):
            w1, w2, w3 = (expected[f"{prefix}experts.{expert}.{w}.weight"] for w in ("w1", "w2", "w3"))
            assert up[expert].equal(torch.cat([w1, w3]))
            assert down[expert].equal(w2)
        projections = [expected[f"layers.{layer}.attention.w{letter}.weight"] for letter in "qkvo"]
        for name, values in (("wqkv", torch.cat(projections[:3])), ("wo", projections[3])):
            held = tuple(found[f"layers.{layer}.attention.{name}.{part.name}"] for part in formats[1].parts)
            assert (held[0] if attention is None else PackedWeight(formats[1], values.shape[1], held).float()).equal(
                values
            )
    if attention is not None:  # the output matrix is not quantised in the file
        data_VD, scales_V1 = formats[1].quantize(expected["output.weight"]).tensors
        assert found["output.data"].view(torch.uint8).equal(data_VD.view(torch.uint8))
        assert found["output.scales"].equal(scales_V1)
    with open_checkpoint(tmp_path / "hf") as reader:
        for name, values in expected.items():
            assert reader.dtype(name) == reader.dtype("norm.weight") == torch.bfloat16
            assert reader.read(name).equal(values.bfloat16()), name
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def _single():
    layout = RankLayout.single(CONFIG)
    return layout.parallel, layout.plan


def _floats(found: dict[str, torch.Tensor], matrix: str, weights: ExpertWeights) -> torch.Tensor:
    names = [name for name, _ in weights.parameters(matrix)]
    if weights.is_plain:
        return found[matrix]
    columns = CONFIG.dim if matrix.endswith("w13") else CONFIG.hidden_dim
    return PackedWeight(weights, columns, tuple(found[n] for n in names), 2 if matrix.endswith("w13") else 1).float()


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


def pack_words(numbers_RC: torch.Tensor, order=range(8)) -> torch.Tensor:
    """int32 [R, C / 8] by the definition: nibble i of word c is column 8 c + order[i]; of four numbers bytes."""
    columns, count = numbers_RC.shape[1], len(order)
    words = [
        [sum(int(row[count * c + o]) << 32 // count * i for i, o in enumerate(order)) for c in range(columns // count)]
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


def of_bytes(less: int, group: int = 64, in_order: bool = True) -> Quantise:
    """GPTQ in eight bits, with neighbours as groups or any columns."""

    def quantise(w_OK: torch.Tensor):
        inputs = w_OK.shape[1]
        order_K = (
            torch.arange(inputs) if in_order else torch.randperm(inputs, generator=torch.Generator().manual_seed(1))
        )
        index_K = torch.empty_like(order_K).index_copy_(0, order_K, torch.arange(inputs) // group)
        w_OGC = w_OK.float()[:, order_K].unflatten(1, (-1, group))
        low_OG, high_OG = w_OGC.amin(2), w_OGC.amax(2)
        scale_OG = ((high_OG - low_OG) / 255).half()
        zero_OG = (-low_OG / scale_OG.float()).round().clamp(0, 255)
        zero_OG[1, 0] = 0
        scale_OK, zero_OK = scale_OG.float()[:, index_K], zero_OG[:, index_K]
        q_OK = (w_OK.float() / scale_OK + zero_OK).round().clamp(0, 255)
        words = pack_words(zero_OG.T.long(), range(4)).long() - less
        held = {
            "qweight": pack_words(q_OK.long(), range(4)).T, "qzeros": words.to(torch.int32), "scales": scale_OG.T,
            "g_idx": index_K.int(),
        }  # fmt: skip
        return held, (q_OK - zero_OK) * scale_OK

    return quantise


def hqq(bits: int, group: int = 64) -> Quantise:
    """HQQ's layers from the definition of their layout, as its own library (0.2.8) packs them and reads them back."""

    def quantise(w_OK: torch.Tensor):
        w_GC = w_OK.float().reshape(-1, group)
        low_G1, high_G1 = w_GC.amin(1, keepdim=True), w_GC.amax(1, keepdim=True)
        scale_G1 = ((high_G1 - low_G1) / (2**bits - 1)).half()
        zero_G1 = (-low_G1 / scale_G1.float()).half()
        q_GC = (w_GC / scale_G1.float() + zero_G1.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
        packed = 0
        for part in q_GC.chunk(8 // bits):
            packed = packed * 2**bits + part
        said = {"nbits": bits, "group_size": group, "axis": 1, "view_as_float": 0, "quant_scale": 0, "quant_zero": 0}
        held = {end: torch.tensor(value, dtype=torch.int32) for end, value in said.items()}
        held |= {"W_q": packed, "scale": scale_G1, "zero": zero_G1, "shape": torch.tensor(w_OK.shape)}
        held["packing"] = torch.tensor(list(b"4bit_u8"), dtype=torch.uint8)
        return held, ((q_GC.float() - zero_G1.float()) * scale_G1.float()).view(w_OK.shape)

    return quantise


def bnb_int8(w_OK: torch.Tensor):
    """bitsandbytes' own on a CPU; its numbers by ``int8_vectorwise_dequant``."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    data, sizes, _ = int8_vectorwise_quant(w_OK.half())
    held = {"weight": data, "SCB": sizes, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return held, int8_vectorwise_dequant(data, sizes)


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


def nf4(nested: bool) -> Quantise:
    """bitsandbytes' own, on a CPU."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def quantise(w_OK: torch.Tensor):
        packed, state = quantize_4bit(w_OK.float(), compress_statistics=nested, quant_type="nf4")
        held = {f"weight.{end}": tensor for end, tensor in state.as_dict(packed=True).items()}
        return held | {"weight": packed}, dequantize_4bit(packed, state)

    return quantise


FLOATS = ct(num_bits=8, type="float", strategy="channel")
INTS = ct(num_bits=8, type="int", strategy="channel")
