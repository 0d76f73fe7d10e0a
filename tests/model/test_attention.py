"""Any step's attention to the cache against one query and one head at a time."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.config import CacheOptions
from mixtralkit.layout import RankLayout
from mixtralkit.model.attention import CachedAttention
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.rope import rope_table, rotate, rotations
from mixtralkit.ops.attention import split_heads
from tests.configs import small_config

HEADS, KV_HEADS, WIDTH, SLOTS, LENGTH, PAGE, THETA = 6, 2, 8, 7, 40, 16, 1e4

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
    each = -(-LENGTH // PAGE)
    shape = (2, SLOTS * each + 1, KV_HEADS, PAGE, WIDTH)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    tables_SM = torch.randperm(SLOTS * each + 1, generator=generator)[:-1].view(SLOTS, each).int()
    batch = ForwardBatch.build([(slot, position, [0] * tokens) for slot, position, tokens in pieces], "cpu")
    qkv_TQ = torch.randn(len(batch.tokens_T), (HEADS + 2 * KV_HEADS) * WIDTH, generator=generator)
    return batch, KVCache(keys, values, tables_SM, rope_table(LENGTH, WIDTH, THETA, torch.device("cpu"))), qkv_TQ


def slow(layer: int, batch: ForwardBatch, cache: KVCache, qkv_TQ: torch.Tensor, window: int | None) -> torch.Tensor:
    """One query and one head at a time, after all keys and values are stored."""
    q_THC, k_TJC, v_TJC = split_heads(qkv_TQ, HEADS, KV_HEADS)
    rope = rotations(batch.positions_T, WIDTH, THETA)
    q_THC, k_TJC = rotate(q_THC, *rope), rotate(k_TJC, *rope)
    places = list(zip(batch.slots_T.tolist(), batch.positions_T.tolist(), strict=True))
    for row, (slot, position) in enumerate(places):
        at = (layer, int(cache.tables_SM[slot, position // PAGE]), slice(None), position % PAGE)
        cache.keys[at], cache.values[at] = k_TJC[row], v_TJC[row]
    out = []
    for row, (slot, position) in enumerate(places):
        seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
        table = cache.tables_SM[slot].long()
        for head in range(HEADS):
            keys, values = (
                memory[layer, table, head * KV_HEADS // HEADS].flatten(0, 1)[seen]
                for memory in (cache.keys, cache.values)
            )
            out.append((keys @ q_THC[row, head] / WIDTH**0.5).softmax(0) @ values)
    return torch.stack(out).view(len(places), HEADS * WIDTH)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("step", STEPS)
def test_every_row_attends_to_its_sequence(step, window):
    batch, cache, qkv_TQ = build(STEPS[step])
    slow_cache = KVCache(cache.keys.clone(), cache.values.clone(), cache.tables_SM, cache.rope_SC)
    attend = CachedAttention(cache, window, batch.spans, torch.device("cpu"))
    for layer in range(2):
        got = attend(layer, qkv_TQ, batch, (HEADS, KV_HEADS))
        torch.testing.assert_close(got, slow(layer, batch, slow_cache, qkv_TQ, window), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.keys, slow_cache.keys)
    assert torch.equal(cache.values, slow_cache.values)


@pytest.mark.parametrize("window", [None, 6])
def test_rows_that_fill_the_shape_write_nothing(window):
    batch, cache, qkv_TQ = build(STEPS["decode"])
    slow_cache = KVCache(cache.keys.clone(), cache.values.clone(), cache.tables_SM, cache.rope_SC)
    fill = torch.zeros(2, dtype=torch.int64)
    columns = (torch.cat([t, fill - i]) for t, i in ((batch.tokens_T, 0), (batch.positions_T, 0), (batch.slots_T, 1)))
    padded = ForwardBatch.of_rows(*columns, rows_per_rank=5)
    got = CachedAttention(cache, window)(0, torch.cat([qkv_TQ, qkv_TQ[:2]]), padded, (HEADS, KV_HEADS))
    torch.testing.assert_close(got[:3], slow(0, batch, slow_cache, qkv_TQ, window), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.keys, slow_cache.keys)


def test_no_sequence_gives_no_rows():
    _, cache, _ = build(STEPS["decode"])
    batch = ForwardBatch.build([], "cpu")
    qkv_TQ = torch.empty(0, (HEADS + 2 * KV_HEADS) * WIDTH)
    assert CachedAttention(cache, None)(0, qkv_TQ, batch, (HEADS, KV_HEADS)).shape == (0, HEADS * WIDTH)


def test_a_cache_takes_whole_pages():
    cache = KVCache.allocate(RankLayout.single(small_config()), 3, 40, torch.float32, torch.device("cpu"), 16)
    assert cache.keys.shape == cache.values.shape == (3, 9, 2, 16, 16)
    assert (cache.slots, cache.max_seq_len, cache.pages, cache.page_size) == (3, 40, 9, 16)
    assert cache.tables_SM.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_growing_sequence_takes_pages_and_copies_nothing():
    """A sequence goes on in a page that it is given later, one that held another's keys and NaN."""
    cpu = torch.device("cpu")
    kind = (RankLayout.single(small_config()), 2, 48, torch.float32, cpu, 16)
    cache, own = KVCache.allocate(*kind, pages=4), KVCache.allocate(*kind)
    assert cache.pages == 4
    for memory in (cache.keys, cache.values):
        memory.fill_(float("nan"))
    address = cache.tables_SM.data_ptr()
    heads, generator = (4, 2), torch.Generator().manual_seed(0)
    # (entries of the tables that change before a step, the step)
    for entries, pieces in (
        ([(0, 0, 3)], [(0, 0, 15)]),
        ([(0, 1, 1), (1, 0, 0)], [(0, 15, 1), (1, 0, 3)]),
        ([], [(0, 16, 1), (1, 3, 1)]),
        ([(0, 2, 2)], [(0, 17, 16), (1, 4, 1)]),
        ([(1, 0, 3), (1, 1, 0)], [(1, 16, 2)]),  # another sequence, with the first one's prefix
        ([], []),
    ):
        cache.place(entries)
        batch = ForwardBatch.build([(slot, position, [0] * tokens) for slot, position, tokens in pieces], "cpu")
        qkv_TQ = torch.randn(len(batch), (4 + 2 * 2) * 16, generator=generator)
        if pieces == [(1, 16, 2)]:
            for memory in (own.keys, own.values):
                memory[:, 3] = memory[:, 0]
        got, wanted = (CachedAttention(c, None, batch.spans, cpu)(1, qkv_TQ, batch, heads) for c in (cache, own))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert cache.tables_SM.tolist() == [[3, 1, 2], [3, 0, 0]]
    assert cache.tables_SM.data_ptr() == address


@pytest.mark.parametrize("size", [0, 8, 24, 100, 16.0, True, "16"])
def test_a_bad_page_size_is_named(size):
    with pytest.raises(
        ValueError, match=r"page_size \(.*\) must be a whole number that is a power of two of at least 16"
    ):
        CacheOptions(page_size=size)
