"""llama.cpp's files, written with its own package ``gguf``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.checkpoint.gguf_blocks import BLOCK_TYPES
from mixtralkit.config import ModelConfig
from mixtralkit.engine.tokenizer import Tokenizer
from tests.checkpoint.models import random_tensors

gguf = pytest.importorskip("gguf")
CONFIG = ModelConfig(
    dim=256, n_layers=2, head_dim=32, hidden_dim=512, n_heads=8, n_kv_heads=2, vocab_size=48, num_experts=4,
    rope_theta=1e6, max_seq_len=128,
)  # fmt: skip
APART = {"ffn_gate": ["w1"], "ffn_up": ["w3"], "ffn_down": ["w2"]}
PROJECTIONS = {"stacked": APART, "single": APART, "merged": {"ffn_gate_up": ["w1", "w3"], "ffn_down": ["w2"]}}
QUANTISED = {"F32": 0, "F16": 1, "BF16": 30} | {kind.name: number for number, kind in BLOCK_TYPES.items()}


def random_blocks(kind, count: int) -> np.ndarray:
    """Bytes of blocks with scales that are numbers."""
    blocks = np.random.default_rng(kind.size).integers(0, 256, (count, kind.size), dtype=np.uint8)
    halves = {
        "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
        "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    }  # fmt: skip
    scales = np.random.default_rng(1).normal(0, 0.1, (count, 2)).astype(np.float16)
    for i, place in enumerate(halves[kind.name]):
        blocks[:, place : place + 2] = scales[:, i : i + 1].copy().view(np.uint8)
    return blocks


def write_gguf(path: Path, layout: str, kind: str, **changes) -> dict[str, torch.Tensor]:
    """A Mixtral as llama.cpp's converter writes it; what it means under our names, by ``gguf`` itself.

    Random, with blocks of any bytes and words without a type, but for ``model`` and ``tokenizer``.
    """
    config, tensors = changes.pop("model", (CONFIG, None))
    is_random, tokenizer, expected = tensors is None, changes.pop("tokenizer", None), {}
    tensors = random_tensors(config, torch.float32) if is_random else tensors
    writer = gguf.GGUFWriter(path, changes.pop("arch", "llama"), split_max_tensors=changes.pop("split", 0))
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim != config.dim // config.n_heads:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if tokenizer is None:
        writer.add_token_list([f"word {i}" for i in range(config.vocab_size)])
        writer.add_token_scores([0.5] * config.vocab_size)
    else:
        add_vocabulary(writer, tokenizer)
    for key, value in changes.items():
        writer.add_string(f"llama.{key}", value)

    def add(name: str, parts: list[str], stack: bool = False) -> None:
        values = [tensors[part].numpy() for part in parts]
        plain = values[0].ndim == 1 or "gate_inp" in name
        stored = gguf.GGMLQuantizationType["F32" if plain else kind]
        if stored.value in BLOCK_TYPES and is_random:  # ``gguf`` writes only some of the types
            size = BLOCK_TYPES[stored.value]
            raw = [random_blocks(size, v.size // size.weights).reshape(v.shape[0], -1) for v in values]
        else:
            raw = [gguf.quantize(v, stored) for v in values]
        for part, value in zip(parts, raw, strict=True):
            expected[part] = torch.from_numpy(gguf.dequantize(value, stored))
        whole = np.stack(raw).reshape(config.num_experts, -1, raw[0].shape[1]) if stack else raw[0]
        writer.add_tensor(f"{name}.weight", whole, raw_dtype=stored)

    add("token_embd", ["tok_embeddings.weight"])
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}.", f"blk.{layer}."
        for name, source in (
            ("attn_q", "attention.wq"), ("attn_k", "attention.wk"), ("attn_v", "attention.wv"),
            ("attn_output", "attention.wo"), ("attn_norm", "attention_norm"), ("ffn_norm", "ffn_norm"),
            ("ffn_gate_inp", "feed_forward.gate"),
        ):  # fmt: skip
            add(theirs + name, [f"{ours}{source}.weight"])
        for name, matrices in PROJECTIONS[layout].items():
            experts = [
                f"{ours}feed_forward.experts.{e}.{matrix}.weight"
                for e in range(config.num_experts)
                for matrix in matrices
            ]
            if layout == "single":
                for e, expert in enumerate(experts):
                    add(f"{theirs}{name}.{e}", [expert])
            else:
                add(f"{theirs}{name}_exps", experts, stack=True)
    add("output_norm", ["norm.weight"])
    add("output", ["output.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_vocabulary(path: Path, ours: Tokenizer, added: tuple[str, ...] = (), **changes) -> None:
    """Only the keys of a vocabulary, as llama.cpp's converter writes those of a sentencepiece model."""
    writer = gguf.GGUFWriter(path, "llama")
    add_vocabulary(writer, ours, added, **changes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer, ours: Tokenizer, added: tuple[str, ...] = (), **changes) -> None:
    model, kind = ours.sp_model, gguf.TokenType
    tokens = [model.id_to_piece(i) for i in range(len(model))]
    types = [
        kind.UNKNOWN if model.is_unknown(i) else kind.CONTROL if model.is_control(i) else kind.BYTE if model.is_byte(i)
        else kind.NORMAL for i in range(len(model))
    ]  # fmt: skip
    scores = [model.get_score(i) for i in range(len(model))]
    writer.add_tokenizer_model(changes.pop("model", "llama"))
    writer.add_token_list(changes.pop("tokens", [*tokens, *added]))
    writer.add_token_scores(changes.pop("scores", [*scores, *(-1000.0 for _ in added)]))
    writer.add_token_types(changes.pop("types", [*types, *(kind.CONTROL for _ in added)]))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(changes.pop("eos", 2))
    writer.add_unk_token_id(0)
    if "template" in changes:
        writer.add_chat_template(changes.pop("template"))
    for key, value in changes.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
