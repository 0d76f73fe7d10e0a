"""Random models for the checkpoint tests, and foreign formats written without the project's writer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mixtralkit.config import ModelConfig
from mixtralkit.layout import RankLayout, canonical_shapes

CONFIGS = {
    "grouped": ModelConfig(
        dim=24, n_layers=2, head_dim=6, hidden_dim=20, n_heads=4, n_kv_heads=2, vocab_size=32, num_experts=4
    ),
    "one_kv_head": ModelConfig(
        dim=20, n_layers=3, head_dim=4, hidden_dim=12, n_heads=4, n_kv_heads=1, vocab_size=28, num_experts=5,
        sliding_window=7,
    ),
    "odd_heads": ModelConfig(
        dim=10, n_layers=1, head_dim=8, hidden_dim=7, n_heads=5, n_kv_heads=5, vocab_size=13, num_experts=3,
        num_experts_per_tok=3, rope_theta=1e4, norm_eps=1e-6, max_seq_len=77,
    ),
    "wide": ModelConfig(
        dim=640, n_layers=1, head_dim=128, hidden_dim=2560, n_heads=8, n_kv_heads=4, vocab_size=64, num_experts=4
    ),
}  # fmt: skip


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical tensors; no two rows of them are alike."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in canonical_shapes(config).items()}


def empty_parameters(layout: RankLayout, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A rank's parameters, to be loaded into."""
    dtypes = {
        name: dtype if part.dtype is None else getattr(torch, part.dtype)
        for layer in range(layout.config.n_layers) for group in layout.groups(layer)
        for matrix in ("w13", "w2") for name, part in group.weights.parameters(matrix + group.suffix)
    } | {part.name: getattr(torch, part.dtype) for part in layout.attention_weights.parts if part.dtype}  # fmt: skip
    return {
        name: torch.empty(shape, dtype=dtypes.get(name.rpartition(".")[2], dtype))
        for name, shape in layout.shapes().items()
    }


def write_params(folder: Path, config: ModelConfig) -> None:
    """Mistral's ``params.json``."""
    (folder / "params.json").write_text(json.dumps(config.to_mistral()))


def write_one_file(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Path:
    """Mistral's one file, by ``torch.save``."""
    write_params(folder, config)
    torch.save(tensors, folder / "consolidated.00.pth")
    return folder / "consolidated.00.pth"


def write_stacked(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
    """The eight-file release: tensors dealt out over the files, parameters in Hugging Face's words."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".feed_forward." not in name}
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}.feed_forward.", f"layers.{layer}.block_sparse_moe."
        stacked[f"{theirs}gate.weight"] = tensors[f"{ours}gate.weight"]
        experts = range(config.num_experts)
        for matrix in ("w1", "w3"):
            stacked[theirs + matrix] = torch.cat([tensors[f"{ours}experts.{e}.{matrix}.weight"] for e in experts])
        stacked[f"{theirs}w2"] = torch.cat([tensors[f"{ours}experts.{e}.w2.weight"].T for e in experts])
    for i in range(8):
        torch.save(dict(list(stacked.items())[i::8]), folder / f"consolidated.{i:02d}.pt")
    params = {
        "hidden_size": config.dim, "num_hidden_layers": config.n_layers, "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "vocab_size": config.vocab_size, "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "max_position_embeddings": config.max_seq_len,
        "sliding_window": config.sliding_window,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


def write_fairscale_shards(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Rows of wq, wk, wv, w1, w3, output and columns of wo, w2, tok_embeddings over the shards; views, not copies."""
    write_params(folder, config)
    for shard in range(shards):
        held = {}
        for name, tensor in tensors.items():
            kind = name.split(".")[-2]
            if kind in ("wq", "wk", "wv", "w1", "w3", "output"):
                if kind in ("wk", "wv") and config.n_kv_heads < shards:
                    held[name] = tensor.chunk(config.n_kv_heads, 0)[shard * config.n_kv_heads // shards]
                else:
                    held[name] = tensor.chunk(shards, 0)[shard]
            elif kind in ("wo", "w2", "tok_embeddings"):
                held[name] = tensor.chunk(shards, 1)[shard]
            else:
                held[name] = tensor
        torch.save(held, folder / f"consolidated.{shard:02d}.pth")
