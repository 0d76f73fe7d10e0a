"""llama.cpp beside us, for bench_cpu.py: one random model as its file and as our weights, and what a step takes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import torch
import xllamacpp
from gguf import GGMLQuantizationType
from sentencepiece import SentencePieceProcessor

from mixtralkit.checkpoint.quantising import put_packed
from mixtralkit.config import ModelConfig
from mixtralkit.layout import RankLayout

ROWS = 1024  # of a matrix that are rounded at a time
FORMATS = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}


def matrices(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a file of llama.cpp's; rotary rows are in Mistral's order."""
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield "token_embd", (config.vocab_size, config.dim)
    for prefix in (f"blk.{layer}." for layer in range(config.n_layers)):
        yield prefix + "attn_norm", (config.dim,)
        yield prefix + "attn_q", (heads, config.dim)
        yield prefix + "attn_k", (kv_heads, config.dim)
        yield prefix + "attn_v", (kv_heads, config.dim)
        yield prefix + "attn_output", (config.dim, heads)
        yield prefix + "ffn_norm", (config.dim,)
        yield prefix + "ffn_gate_inp", (config.num_experts, config.dim)
        yield prefix + "ffn_gate_exps", (config.num_experts, config.hidden_dim, config.dim)
        yield prefix + "ffn_up_exps", (config.num_experts, config.hidden_dim, config.dim)
        yield prefix + "ffn_down_exps", (config.num_experts, config.dim, config.hidden_dim)
    yield "output_norm", (config.dim,)
    yield "output", (config.vocab_size, config.dim)


def write_model(path: Path, config: ModelConfig, tokenizer: Path, kind: str, seed: int = 0) -> None:
    """Random weights, rounded to float16 and then to ``kind``, so that all kinds are roundings of one model."""
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    words = SentencePieceProcessor(model_file=str(tokenizer))
    ids = range(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([words.id_to_piece(i) for i in ids])
    writer.add_token_scores([words.get_score(i) for i in ids])
    types = gguf.TokenType
    writer.add_token_types([
        types.UNKNOWN if words.is_unknown(i) else types.CONTROL if words.is_control(i)
        else types.BYTE if words.is_byte(i) else types.NORMAL for i in ids
    ])  # fmt: skip
    writer.add_bos_token_id(words.bos_id())
    writer.add_eos_token_id(words.eos_id())
    for name, shape in matrices(config):
        stored = _stored(name, shape, kind)
        sizes = gguf.quant_shape_to_byte_shape(shape, stored) if stored.name.startswith("Q") else shape
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(stored.name, np.uint8))
        writer.add_tensor_info(f"{name}.weight", sizes, dtype, int(np.prod(sizes)) * dtype.itemsize, stored)
    writing = path.with_suffix(".writing")
    writer.write_header_to_file(writing)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = torch.Generator().manual_seed(seed)
    for name, shape in matrices(config):
        random = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        values, stored = random.half(), _stored(name, shape, kind)
        del random
        if stored == GGMLQuantizationType.F16:
            writer.write_tensor_data(values.numpy())
        elif stored == GGMLQuantizationType.F32:
            writer.write_tensor_data(values.float().numpy())
        else:
            rows = values.flatten(0, -2).split(4096)
            parts = [gguf.quantize(part.float().numpy(), stored) for part in rows]
            writer.write_tensor_data(np.concatenate(parts))
    writer.close()
    writing.rename(path)


def _stored(name: str, shape: Sequence[int], kind: str) -> GGMLQuantizationType:
    return GGMLQuantizationType.F32 if len(shape) == 1 or "gate_inp" in name else FORMATS[kind]


def fill(parameters: dict[str, torch.Tensor], layout: RankLayout, path: Path) -> None:
    """Copies the weights of a file of kind f16 to a model on one rank, in the layout's formats."""
    tensors = {tensor.name.removesuffix(".weight"): tensor.data for tensor in gguf.GGUFReader(path, "c").tensors}
    ends = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    inside = {
        "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k",
        "attention.wv": "attn_v", "attention.wo": "attn_output", "feed_forward.gate": "ffn_gate_inp",
        "w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps",
    }  # fmt: skip

    def stored(source: str) -> torch.Tensor:
        name = source.removesuffix(".weight")
        if name in ends:
            return torch.from_numpy(tensors[ends[name]])
        _, layer, leaf = name.split(".", 2)
        if ".experts." not in leaf:
            return torch.from_numpy(tensors[f"blk.{layer}.{inside[leaf]}"])
        _, _, expert, matrix = leaf.split(".")
        return torch.from_numpy(tensors[f"blk.{layer}.{inside[matrix]}"][int(expert)])

    for piece in layout.pieces():
        w = stored(piece.source)
        if not piece.weights.is_plain:
            for first in range(0, len(w), ROWS):
                put_packed(parameters, layout, piece, w[first : first + ROWS], first)
        else:
            parameters[piece.target].data[piece.at] = w.to(parameters[piece.target].dtype)


class LlamaCpp:
    """One model in llama.cpp's server, inside this process."""

    def __init__(self, path: Path, threads: int, sequences: int, length: int) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = sequences * length, sequences
        params.n_batch = params.n_ubatch = max(512, sequences)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_prompt, params.cache_ram_mib, params.warmup, params.verbosity = False, 0, True, -1
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: Sequence[int], new_tokens: int) -> dict:
        """One answer, greedy, with llama.cpp's own times."""
        return self.server.handle_completions({
            "prompt": list(prompt), "n_predict": new_tokens, "ignore_eos": True, "temperature": 0.0,
            "cache_prompt": False, "return_tokens": True, "n_probs": 0,
        })  # fmt: skip

    def step_s(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds of a step in which every sequence gets a token; the first token comes with the prompt."""
        answers: list[dict] = []
        threads = [
            threading.Thread(target=lambda prompt=prompt: answers.append(self.complete(prompt, new_tokens)))
            for prompt in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return median(answer["timings"]["predicted_ms"] for answer in answers) / 1e3 / (new_tokens - 1)

    def prompt_s(self, prompt: Sequence[int]) -> float:
        """Seconds of reading a prompt."""
        return self.complete(prompt, 1)["timings"]["prompt_ms"] / 1e3
