"""Model configurations that tests share: small, odd on purpose, and one tolerance a dtype."""

from __future__ import annotations

import random

import torch

from mixtralkit.config import ModelConfig

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def small_config(**changes) -> ModelConfig:
    """Four heads, two key-value heads, eight experts: divisible by 1, 2 and 4 ranks."""
    values = {
        "dim": 48, "n_layers": 3, "head_dim": 16, "hidden_dim": 56, "n_heads": 4, "n_kv_heads": 2,
        "vocab_size": 101, "max_seq_len": 64, "max_batch_size": 8,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def random_config(seed: int) -> ModelConfig:
    """Odd head counts, 1 to 8 key-value heads, 2 to 16 experts, top-1 to top-4, head_dim unlike dim / heads."""
    rng = random.Random(seed)
    n_kv_heads = rng.choice([1, 1, 2, 3, 4, 5, 8])
    n_heads = n_kv_heads * rng.choice([1, 2, 3])
    num_experts = rng.randint(2, 16)
    return ModelConfig(
        dim=8 * rng.randint(3, 12),
        n_layers=rng.randint(1, 3),
        head_dim=2 * rng.randint(2, 12),
        hidden_dim=rng.randint(9, 70),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=rng.randint(50, 150),
        norm_eps=rng.choice([1e-5, 1e-6]),
        rope_theta=rng.choice([1e4, 1e6]),
        max_seq_len=64,
        max_batch_size=8,
        sliding_window=rng.choice([None, None, 5]),
        num_experts=num_experts,
        num_experts_per_tok=rng.randint(1, min(4, num_experts)),
    )
