"""Decode attention and rotate-and-store: plain references against a loop over heads, Triton against the references."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from mixtralkit.model.rope import rope_table, rotations
from mixtralkit.ops.attention import decode_attention, decode_attention_reference, rotate_and_store_reference
from mixtralkit.ops.attention.triton import (
    _arrivals,
    candidates,
    launch_decode_attention,
    launch_rotate_and_store,
)
from tests.ops.pages import in_one_piece, paged

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
SETTINGS = {"splits": 4, "whole_tiles": 1, "min_tiles": 1, "block_n": 16, "early": 1, "num_warps": 4, "num_stages": 2}


@dataclass
class Case:
    """One layer's cache with random content, and tokens that extend it. What is not written yet is NaN."""

    heads: int
    kv_heads: int
    head_dim: int
    positions: list[int]
    slots: list[int]
    cache_slots: int = 6
    max_seq_len: int = 96
    dtype: torch.dtype = torch.float32

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """qkv, keys, values, slots, positions and the table of rotations."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.cache_slots, self.kv_heads, self.max_seq_len, self.head_dim)
        qkv, keys, values = (
            torch.randn(*dims, generator=generator).to(self.dtype)
            for dims in ((len(self.slots), (self.heads + 2 * self.kv_heads) * self.head_dim), shape, shape)
        )
        written = torch.zeros(self.cache_slots, dtype=torch.int64)
        for slot, position in zip(self.slots, self.positions, strict=True):
            if slot >= 0:
                written[slot] = position
        nothing = torch.arange(self.max_seq_len) >= written[:, None]
        keys, values = (x.masked_fill(nothing[:, None, :, None], float("nan")) for x in (keys, values))
        slots, positions = torch.tensor(self.slots), torch.tensor(self.positions)
        return qkv, keys, values, slots, positions, rope_table(self.max_seq_len, self.head_dim, 1e4, "cpu")


CASES = [
    Case(4, 1, 16, [0], [3]),
    Case(8, 2, 16, [16, 40, 65, 0, 95], [5, 0, -1, 2, 1]),  # on a tile's border, over all splits, filler, empty
    Case(8, 2, 64, [17, 63, 64], [1, 4, 0]),
    Case(6, 2, 48, [33, 5], [2, 0]),  # neither the group nor the width is a power of two
    Case(4, 4, 16, [31, 32, 7, 7], [-1, 1, -1, 0]),
    Case(4, 1, 128, [15, 16, 17, 32, 33], [1, 0, 5, 2, 3]),  # around the ends of pages of 16 and 32
]


def turned(x_C: torch.Tensor, position: int, theta: float = 1e4) -> torch.Tensor:
    """A head's features turned by the definition, pair by pair, in float64."""
    out_C = x_C.double().clone()
    for i in range(len(x_C) // 2):
        angle = position / theta ** (2 * i / len(x_C))
        even, odd = float(x_C[2 * i]), float(x_C[2 * i + 1])
        out_C[2 * i] = even * math.cos(angle) - odd * math.sin(angle)
        out_C[2 * i + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return out_C


def slow_decode(case: Case, qkv_BP, keys, values, window: int | None) -> torch.Tensor:
    """A loop over sequences and heads in float64; extends ``keys`` and ``values``."""
    width, group = case.head_dim, case.heads // case.kv_heads
    out_BHC = torch.zeros(len(case.slots), case.heads, width, dtype=torch.float64)
    for row, (slot, position) in enumerate(zip(case.slots, case.positions, strict=True)):
        if slot < 0:
            continue
        heads = qkv_BP[row].view(-1, width)
        for j in range(case.kv_heads):
            keys[slot, j, position] = turned(heads[case.heads + j], position)
            values[slot, j, position] = heads[case.heads + case.kv_heads + j]
        begin = 0 if window is None else max(0, position + 1 - window)
        for h in range(case.heads):
            k_NC, v_NC = (x[slot, h // group, begin : position + 1].double() for x in (keys, values))
            weights_N = (k_NC @ turned(heads[h], position) / math.sqrt(width)).softmax(0)
            out_BHC[row, h] = weights_N @ v_NC
    return out_BHC.flatten(1)


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case, window, page_size):
    qkv, keys, values, *rest = case.tensors()
    cache = paged(keys, values, page_size)
    wanted = slow_decode(case, qkv, keys, values, window)
    got = decode_attention_reference(qkv, *cache, *rest, case.heads, window)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    assert_holds(cache, keys, values, 1e-4)


def assert_holds(cache, keys, values, tolerance: float) -> None:
    """The pages hold what the caches in one piece do, and NaN where those do."""
    got_keys, got_values = (in_one_piece(memory, cache[2], keys.shape[2]) for memory in cache[:2])
    torch.testing.assert_close(got_keys, keys, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(got_values, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("window", "page_size"), [(None, 16), (9, 32), (40, 16), (None, 128), (1, 16)])
@pytest.mark.parametrize("case", CASES)
def test_triton_decode_is_the_reference(case, window, page_size, dtype):
    case = Case(**{**vars(case), "dtype": dtype})
    compare_decode(case, window, SETTINGS, page_size)


@pytest.mark.parametrize("page_size", [16, 32])
def test_sequences_that_share_pages_read_them(page_size):
    """A common prefix lies in one sequence's pages alone."""
    case, pages = Case(8, 2, 16, [70, 33, 64, 90], [2, 0, 4, 1]), 32 // page_size
    qkv, keys, values, *rest = case.tensors()
    for cache in (keys, values):
        cache[[0, 4, 1], :, :32] = cache[2, :, :32]
    wanted = slow_decode(case, qkv, wanted_keys := keys.clone(), wanted_values := values.clone(), None)
    for attend in (decode_attention_reference, decode_attention, launch_decode_attention):
        cache = paged(keys, values, page_size, shared=[(slot, 2, pages) for slot in (0, 4, 1)])
        got = attend(qkv, *cache, *rest, case.heads)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
        assert_holds(cache, wanted_keys, wanted_values, 1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"splits": 1},
        {"splits": 1, "early": 0},
        {"early": 0},
        {"splits": 8, "min_tiles": 2},
        {"whole_tiles": 3},
        {"block_n": 32},
        {"block_n": 64, "min_tiles": 2},  # more than a page
    ],
)
def test_triton_decode_with_other_settings(changed):
    compare_decode(CASES[1], None, {**SETTINGS, **changed}, 32)
    compare_decode(CASES[3], 20, {**SETTINGS, **changed}, 32)


def compare_decode(case: Case, window: int | None, settings: dict[str, int], page_size: int) -> None:
    qkv, keys, values, *rest = case.tensors()
    cache, wanted_cache = (paged(keys, values, page_size, seed) for seed in (0, 1))
    wanted = decode_attention_reference(qkv, *wanted_cache, *rest, case.heads, window)
    out = torch.full_like(wanted, float("nan"))
    launch_decode_attention(qkv, *cache, *rest, case.heads, window, out, settings)
    torch.testing.assert_close(out, wanted, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])
    wanted_keys, wanted_values = (in_one_piece(x, wanted_cache[2], case.max_seq_len) for x in wanted_cache[:2])
    assert_holds(cache, wanted_keys, wanted_values, TOLERANCE[case.dtype])
    assert not _arrivals(qkv.device).any(), "counters are zero between calls"


def test_rows_of_larger_tensors_and_default_settings():
    """``qkv`` and ``out`` with a row stride of their own, the cache of one layer out of several."""
    case = CASES[2]
    qkv, keys, values, *rest = case.tensors()
    *pages, tables = paged(keys, values, 32)
    stacked = [torch.stack([x, x]) for x in pages]
    wanted = decode_attention_reference(qkv, *(x.clone() for x in pages), tables, *rest, case.heads)
    wide = torch.cat([qkv, qkv], 1)
    out = torch.full((len(wanted), wanted.shape[1] + 8), float("nan"))
    launch_decode_attention(
        wide[:, : qkv.shape[1]], *(x[1] for x in stacked), tables, *rest, case.heads, None, out[:, : wanted.shape[1]]
    )
    torch.testing.assert_close(out[:, : wanted.shape[1]], wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(stacked[0][0], pages[0], rtol=0, atol=0, equal_nan=True)
    assert out[:, wanted.shape[1] :].isnan().all()


def test_several_steps_continue_each_other():
    """A sequence decoded from its first token is causal attention over the whole of it."""
    case = Case(4, 2, 16, [0], [1])
    steps = torch.randn(20, 8 * 16, generator=torch.Generator().manual_seed(1))
    keys, values, rope = *case.tensors()[1:3], case.tensors()[5]
    slots, positions = torch.full((20,), 1), torch.arange(20)
    cache, whole = paged(keys, values, 16), paged(keys, values, 32)
    q = rotate_and_store_reference(steps, *whole, slots, positions, rope, 4)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        *(in_one_piece(x, whole[2][1:2], 20) for x in whole[:2]),
        is_causal=True,
        enable_gqa=True,
    )
    wanted = wanted[0].transpose(0, 1).flatten(1)
    for step in range(20):
        at = slice(step, step + 1)
        got = decode_attention(steps[at], *cache, slots[at], positions[at], rope, 4)
        torch.testing.assert_close(got, wanted[at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_triton_rotate_and_store_is_the_reference(case, dtype):
    """Rows that only fill the shape store nothing."""
    case = Case(**{**vars(case), "dtype": dtype})
    qkv, keys, values, *rest = case.tensors()
    real_B = rest[0] >= 0
    cache, wanted_cache = (paged(keys, values, 16) for _ in range(2))
    wanted = rotate_and_store_reference(qkv, *wanted_cache, *rest, case.heads)
    got = launch_rotate_and_store(qkv, *cache, *rest, case.heads)
    for one, other in zip((got[real_B], *cache), (wanted[real_B], *wanted_cache), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_table_is_the_rotations(head_dim):
    table = rope_table(300, head_dim, 1e6, torch.device("cpu"))
    positions = torch.tensor([0, 1, 7, 299, 128, 255])
    for part, wanted in zip(table[positions].unbind(-1), rotations(positions, head_dim, 1e6), strict=True):
        assert torch.equal(part, wanted.squeeze(1))


def test_candidates_are_complete():
    for rows in (1, 64):
        assert all(SETTINGS.keys() == c.keys() for c in candidates(rows, kv_heads=8))
