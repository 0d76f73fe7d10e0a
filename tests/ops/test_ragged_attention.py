"""Attention of several tokens a sequence: the plain reference against the definition, Triton against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixtralkit.ops.ragged_attention import ragged_attention, ragged_attention_reference, span_table
from mixtralkit.ops.ragged_attention.triton import HIDDEN, LOG2_E, candidates, launch_ragged_attention
from tests.ops.pages import paged

SLOTS, LENGTH = 5, 72
SETTINGS = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 2}
SPANS = [
    [(3, 0, 33), (0, 0, 16), (4, 0, 1)],
    [(2, 20, 17), (4, 40, 32), (1, 0, 5)],  # pieces that continue, up to the cache's end
    [(1, 3, 2)],
    [(0, 0, 15), (1, 15, 2), (2, 31, 1), (3, 32, 1)],  # around the ends of pages of 16 and 32
]
SHAPES = [(4, 1, 16), (8, 2, 64), (6, 2, 48), (3, 3, 40), (2, 1, 128)]


def tensors(heads: int, kv_heads: int, width: int, spans, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, and a cache that holds NaN wherever no key is."""
    generator = torch.Generator().manual_seed(heads + len(spans))
    q_THC = torch.randn(sum(n for *_, n in spans), heads, width, generator=generator)
    keys, values = (torch.full((SLOTS, kv_heads, LENGTH, width), float("nan")) for _ in range(2))
    for slot, position, queries in spans:
        for cache in (keys, values):
            cache[slot, :, : position + queries] = torch.randn(kv_heads, position + queries, width, generator=generator)
    return q_THC.to(dtype), keys.to(dtype), values.to(dtype)


@pytest.mark.parametrize(("window", "page_size"), [(None, 16), (7, 32), (None, 128)])
@pytest.mark.parametrize("spans", SPANS)
def test_reference_is_the_definition(spans, window, page_size):
    q_THC, keys, values = tensors(6, 2, 48, spans)
    got_THC = ragged_attention_reference(q_THC, *paged(keys, values, page_size), spans, window)
    row = 0
    for slot, position, queries in spans:
        for at in range(position, position + queries):
            begin = 0 if window is None else max(0, at + 1 - window)
            for h in range(6):
                k_NC, v_NC = (x[slot, h // 3, begin : at + 1].double() for x in (keys, values))
                wanted_C = (k_NC @ q_THC[row, h].double() / math.sqrt(48)).softmax(0) @ v_NC
                torch.testing.assert_close(got_THC[row, h].double(), wanted_C, rtol=1e-4, atol=1e-5)
            row += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("window", "page_size"), [(None, 16), (7, 32), (30, 16), (None, 128)])
@pytest.mark.parametrize(("shape", "spans"), list(zip(SHAPES, [*SPANS[:3], SPANS[1], SPANS[3]], strict=True)))
def test_triton_is_the_reference(shape, spans, window, page_size, dtype):
    compare(shape, spans, window, dtype, SETTINGS, page_size)


@pytest.mark.parametrize("changed", [{"block_m": 32}, {"block_n": 32}, {"block_m": 64, "block_n": 64}])
def test_triton_with_other_blocks(changed):
    for window in (None, 7):
        compare((4, 2, 16), SPANS[1], window, torch.float32, {**SETTINGS, **changed}, 32)  # a block of 64 is cut


@pytest.mark.parametrize("page_size", [16, 32])
def test_prompts_that_share_pages_read_them(page_size):
    spans, shape = [(2, 32, 17), (4, 40, 20), (1, 32, 1), (0, 0, 33)], (4, 2, 16)
    q_THC, keys, values = tensors(*shape, spans)
    for cache in (keys, values):
        cache[[2, 4, 1], :, :32] = cache[0, :, :32]
    apart, shared = (
        paged(keys, values, 16),
        paged(keys, values, page_size, 1, [(n, 0, 32 // page_size) for n in (1, 2, 4)]),
    )
    wanted = ragged_attention_reference(q_THC, *apart, spans)
    assert shared[2][:3, 0].unique().numel() == 1
    for got in (
        ragged_attention_reference(q_THC, *shared, spans),
        ragged_attention(q_THC, *shared, spans, span_table(spans)),
        launch_ragged_attention(q_THC, *shared, span_table(spans), 33, None, SETTINGS),
    ):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def compare(shape, spans, window: int | None, dtype: torch.dtype, settings: dict[str, int], page_size: int) -> None:
    q_THC, keys, values = tensors(*shape, spans, dtype)
    wanted = ragged_attention_reference(q_THC, *paged(keys, values, 16, seed=1), spans, window)
    longest = max(queries for *_, queries in spans)
    cache = paged(keys, values, page_size)
    got = launch_ragged_attention(q_THC, *cache, span_table(spans), longest, window, settings)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_candidates_are_complete():
    assert all(SETTINGS.keys() == c.keys() for c in candidates(2048, heads=32, kv_heads=8, head_dim=128))


@pytest.mark.parametrize("width", [16, 48, 64, 80, 96, 128, 256])
def test_a_hidden_score_times_the_scale_is_exact(width):
    """With -1e30 it was not: where a window hid a whole tile from a query, the rounding that a multiply-add left, 1e22,
    made exp2 infinite and the output NaN. Widths of 16 and 48 showed it on a GPU, 128 did not."""
    hidden, scale = np.float32(HIDDEN.value), np.float32(width**-0.5 * LOG2_E)
    assert float(hidden * scale) == float(hidden) * float(scale)
