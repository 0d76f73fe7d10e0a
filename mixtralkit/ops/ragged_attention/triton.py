"""Triton kernel of ``ragged_attention.py``: FlashAttention's running softmax (Dao, 2023) over tiles of the cache.

A program takes a block of one head's queries in one sequence. Tiles of keys that all its queries see come first and
need no mask; the rest are masked, and their values too: rows after a sequence's last hold whatever was there, and
0 · NaN is NaN. A tile lies within one page, and the page of the next one is read a tile ahead.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtralkit.ops.runtime import overlaps_launches, tuned

LOG2_E = math.log2(math.e)
# Finite, so that a query that sees nothing of a tile yet makes no NaN; a power of two, so that its product with any
# scale is exact: a multiply-add would else leave a rounding of 1e22, of which exp2 is infinite.
HIDDEN = tl.constexpr(-(2.0**100))


@triton.jit
def _attend_tile(
    q_MC, k_NC, v_NC, query_M, key_N, top_M, sum_M, acc_MC, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax (base 2): its maximum, its sum and the weighted values of each query."""
    score_MN = tl.dot(q_MC, tl.trans(k_NC), input_precision=PRECISION)
    if MASKED:
        sees_MN = key_N[None, :] <= query_M[:, None]
        if WINDOW > 0:
            sees_MN = sees_MN & (key_N[None, :] > query_M[:, None] - WINDOW)
        score_MN = tl.where(sees_MN, score_MN, HIDDEN)
    new_top_M = tl.maximum(top_M, tl.max(score_MN, 1) * scale)
    weight_MN = tl.exp2(score_MN * scale - new_top_M[:, None])  # one multiply-add an element
    shrink_M = tl.exp2(top_M - new_top_M)
    acc_MC = tl.dot(weight_MN.to(v_NC.dtype), v_NC, acc_MC * shrink_M[:, None], input_precision=PRECISION)
    return new_top_M, sum_M * shrink_M + tl.sum(weight_MN, 1), acc_MC


@triton.jit
def _ragged_attention(
    q_THC, k_tiles, v_tiles, values, tables_SM, spans_B4, out_THC, table_stride, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(1), tl.program_id(2)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot, position = tl.load(spans_B4 + sequence * 4), tl.load(spans_B4 + sequence * 4 + 1)
    queries, start = tl.load(spans_B4 + sequence * 4 + 2), tl.load(spans_B4 + sequence * 4 + 3)
    if block * BLOCK_M >= queries:
        return
    m_M, n_N, c_C = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    at_MC = ((start + m_M).to(tl.int64) * HEADS + head)[:, None] * C + c_C[None, :]
    real_MC = (m_M < queries)[:, None] & (c_C < C)[None, :]
    q_MC = tl.load(q_THC + at_MC, real_MC, other=0.0)
    query_M = position + m_M
    pages, page_rows = tables_SM + slot.to(tl.int64) * table_stride, HEADS // GROUP * P  # the cache being rows of C
    first_row = head // GROUP * P  # of the head in a page

    first = position + block * BLOCK_M  # position of the block's first query
    end = tl.minimum(first + BLOCK_M, position + queries)
    unmasked_end = (first + 1) // BLOCK_N * BLOCK_N
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    top_M = tl.full((BLOCK_M,), HIDDEN, tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    acc_MC = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    page = tl.load(pages + begin // P)
    for n in range(begin, unmasked_end, BLOCK_N):
        row = page * page_rows + first_row + n % P
        k_NC = k_tiles.load([row, 0])
        v_NC = v_tiles.load([row, 0])
        page = tl.load(pages + (n + BLOCK_N) // P, n + BLOCK_N < end, other=0)
        top_M, sum_M, acc_MC = _attend_tile(
            q_MC, k_NC, v_NC, query_M, n + n_N, top_M, sum_M, acc_MC, scale, WINDOW > 0, WINDOW, PRECISION
        )
    for n in range(tl.maximum(begin, unmasked_end), end, BLOCK_N):
        row = page * page_rows + first_row + n % P
        k_NC = k_tiles.load([row, 0])
        v_real_NC = (n + n_N < end)[:, None] & (c_C < C)[None, :]
        v_NC = tl.load(values + (row.to(tl.int64) + n_N)[:, None] * C + c_C[None, :], v_real_NC, other=0.0)
        page = tl.load(pages + (n + BLOCK_N) // P, n + BLOCK_N < end, other=0)
        top_M, sum_M, acc_MC = _attend_tile(
            q_MC, k_NC, v_NC, query_M, n + n_N, top_M, sum_M, acc_MC, scale, True, WINDOW, PRECISION
        )
    tl.store(out_THC + at_MC, (acc_MC / sum_M[:, None]).to(out_THC.dtype.element_ty), real_MC)


def launch_ragged_attention(
    q_THC: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    spans_B4: torch.Tensor,
    longest: int,
    window: int | None = None,
    settings: dict[str, int] | None = None,
) -> torch.Tensor:
    """``ragged_attention.ragged_attention`` by Triton; ``longest`` is the most queries of any sequence."""
    tokens, heads, head_dim = q_THC.shape
    pages, kv_heads, page_size, _ = keys_NJPC.shape
    assert q_THC.is_contiguous()
    assert keys_NJPC.is_contiguous()
    assert values_NJPC.is_contiguous()
    assert tables_SM.dtype == torch.int32
    assert tables_SM.stride(1) == 1
    group, device = heads // kv_heads, q_THC.device
    if settings is None:
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        settings = tuned("ragged_attention", device, tokens, **shape) or _default(q_THC)
    block_c = max(16, triton.next_power_of_2(head_dim))
    block_n = min(settings["block_n"], page_size)
    k_tiles, v_tiles = (
        TensorDescriptor(cache, [pages * kv_heads * page_size, head_dim], [head_dim, 1], [block_n, block_c])
        for cache in (keys_NJPC, values_NJPC)
    )
    out_THC = torch.empty_like(q_THC)
    pdl = overlaps_launches(device)
    _ragged_attention[(triton.cdiv(longest, settings["block_m"]), heads, len(spans_B4))](
        q_THC, k_tiles, v_tiles, values_NJPC, tables_SM, spans_B4, out_THC, tables_SM.stride(0),
        head_dim**-0.5 * LOG2_E, HEADS=heads, GROUP=group, C=head_dim, P=page_size, BLOCK_C=block_c,
        WINDOW=window or 0, BLOCK_M=settings["block_m"], BLOCK_N=block_n,
        PRECISION="ieee" if q_THC.dtype == torch.float32 else "tf32",  # only float32 products heed it
        PDL=pdl, num_warps=settings["num_warps"], num_stages=settings["num_stages"],
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out_THC


def candidates(rows: int, **shape: int) -> list[dict[str, int]]:
    """Settings of ``ragged_attention`` worth timing."""
    return [
        {"block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": num_stages}
        for block_m, block_n, num_warps, num_stages in (
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
        )
    ]  # fmt: skip


def _default(q_THC: torch.Tensor) -> dict[str, int]:
    """Tiles that leave room for two programs on a multiprocessor: at a width of 128, to the byte on Hopper."""
    if q_THC.shape[2] * q_THC.element_size() > 256:
        return {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 2}
    return {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3}
