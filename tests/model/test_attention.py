"""Any step's attention to the cache against one query and one head at a time."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.model.attention import CachedAttention
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.rope import rope_table, rotate, rotations
from mixtralkit.ops.attention import split_heads

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


def slow(layer: int, batch: ForwardBatch, cache: KVCache, qkv_TP: torch.Tensor, window: int | None) -> torch.Tensor:
    """One query and one head at a time, after all keys and values are stored."""
    q_THC, k_TJC, v_TJC = split_heads(qkv_TP, HEADS, KV_HEADS)
    rope = rotations(batch.positions_T, WIDTH, THETA)
    q_THC, k_TJC = rotate(q_THC, *rope), rotate(k_TJC, *rope)
    places = list(zip(batch.slots_T.tolist(), batch.positions_T.tolist(), strict=True))
    for row, (slot, position) in enumerate(places):
        cache.keys[layer, slot, :, position], cache.values[layer, slot, :, position] = k_TJC[row], v_TJC[row]
    out = []
    for row, (slot, position) in enumerate(places):
        seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
        for head in range(HEADS):
            keys, values = (
                memory[layer, slot, head * KV_HEADS // HEADS, seen] for memory in (cache.keys, cache.values)
            )
            out.append((keys @ q_THC[row, head] / WIDTH**0.5).softmax(0) @ values)
    return torch.stack(out).view(len(places), HEADS * WIDTH)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("step", STEPS)
def test_every_row_attends_to_its_sequence(step, window):
    batch, cache, qkv_TP = build(STEPS[step])
    slow_cache = KVCache(cache.keys.clone(), cache.values.clone(), cache.rope_SC)
    attend = CachedAttention(cache, window, batch.spans, torch.device("cpu"))
    for layer in range(2):
        got = attend(layer, qkv_TP, batch, (HEADS, KV_HEADS))
        torch.testing.assert_close(got, slow(layer, batch, slow_cache, qkv_TP, window), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.keys, slow_cache.keys)
    assert torch.equal(cache.values, slow_cache.values)


@pytest.mark.parametrize("window", [None, 6])
def test_rows_that_fill_the_shape_write_nothing(window):
    batch, cache, qkv_TP = build(STEPS["decode"])
    slow_cache = KVCache(cache.keys.clone(), cache.values.clone(), cache.rope_SC)
    fill = torch.zeros(2, dtype=torch.int64)
    columns = (torch.cat([t, fill - i]) for t, i in ((batch.tokens_T, 0), (batch.positions_T, 0), (batch.slots_T, 1)))
    padded = ForwardBatch.of_rows(*columns, rows_per_rank=5)
    got = CachedAttention(cache, window)(0, torch.cat([qkv_TP, qkv_TP[:2]]), padded, (HEADS, KV_HEADS))
    torch.testing.assert_close(got[:3], slow(0, batch, slow_cache, qkv_TP, window), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.keys, slow_cache.keys)


def test_no_sequence_gives_no_rows():
    _, cache, _ = build(STEPS["decode"])
    batch = ForwardBatch.build([], "cpu")
    qkv_TP = torch.empty(0, (HEADS + 2 * KV_HEADS) * WIDTH)
    assert CachedAttention(cache, None)(0, qkv_TP, batch, (HEADS, KV_HEADS)).shape == (0, HEADS * WIDTH)
