"""The two ways a step attends to the cache, kernels' calls and plain torch, against each other."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.model import attention
from mixtralkit.model.attention import CachedAttention
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.rope import rope_table, rotations
from mixtralkit.model.batch import ForwardBatch

HEADS, KV_HEADS, WIDTH, SLOTS, LENGTH, THETA = 6, 2, 8, 7, 40, 1e4

# (slot, position, tokens) of each sequence of a step
STEPS = {
    "prompts": [(3, 0, 5), (0, 0, 9), (6, 0, 2)],
    "prompts in several pieces": [(3, 7, 5), (0, 0, 9), (6, 31, 2)],
    "decode": [(1, 12, 1), (0, 0, 1), (5, 39, 1)],
    "decode, then prompts": [(1, 12, 1), (5, 30, 1), (2, 0, 4), (3, 20, 6)],
    "prompts, then decode": [(2, 0, 4), (4, 0, 6), (1, 12, 1), (5, 30, 1)],
    "mixed": [(2, 3, 4), (1, 12, 1), (4, 0, 6), (5, 30, 1), (0, 0, 1), (6, 8, 3)],
}


def build(pieces: list[tuple[int, int, int]]) -> tuple[ForwardBatch, KVCache, torch.Tensor]:
    """A step, a cache full of random keys and values, and the step's projections."""
    generator = torch.Generator().manual_seed(len(pieces))
    shape = (2, SLOTS, KV_HEADS, LENGTH, WIDTH)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    batch = ForwardBatch.build([(slot, position, [0] * tokens) for slot, position, tokens in pieces], "cpu")
    qkv_TP = torch.randn(len(batch.tokens_T), (HEADS + 2 * KV_HEADS) * WIDTH, generator=generator)
    return batch, KVCache(keys, values, rope_table(LENGTH, WIDTH, THETA, torch.device("cpu"))), qkv_TP


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("step", STEPS)
def test_kernels_calls_are_the_plain_path(step, window, monkeypatch):
    """Which rows go to which call, and back to which place."""
    batch, cache, qkv_TP = build(STEPS[step])
    rope = rotations(batch.positions_T, WIDTH, THETA)
    plain_cache = KVCache(cache.keys.clone(), cache.values.clone(), cache.rope_SC)
    plain = CachedAttention(batch, plain_cache, window)
    wanted = [plain(layer, qkv_TP, rope, (HEADS, KV_HEADS)) for layer in range(2)]
    monkeypatch.setattr(attention, "runs_triton", lambda _: True)
    by_kernels = CachedAttention(batch, cache, window)
    for layer in range(2):
        got = by_kernels(layer, qkv_TP, rope, (HEADS, KV_HEADS))
        torch.testing.assert_close(got, wanted[layer], rtol=1e-4, atol=1e-5)
    assert torch.equal(cache.keys, plain_cache.keys)
    assert torch.equal(cache.values, plain_cache.values)


def test_no_sequence_gives_no_rows():
    _, cache, _ = build(STEPS["decode"])
    batch = ForwardBatch.build([], "cpu")
    qkv_TP = torch.empty(0, (HEADS + 2 * KV_HEADS) * WIDTH)
    out = CachedAttention(batch, cache, None)(0, qkv_TP, rotations(batch.positions_T, WIDTH, THETA), (HEADS, KV_HEADS))
    assert out.shape == (0, HEADS * WIDTH)
