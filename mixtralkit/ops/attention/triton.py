"""Triton kernels of ``attention.py``.

Decode: the query heads that share a key head are the rows of one small product with a tile of its keys, so every key
and value is read once. Keys are split over programs (Dao et al., "Flash-Decoding", 2023); how many of the programs
launched for a sequence have work follows from its position on the device, the others end at once. The program of a
pair (sequence, key head) that arrives last merges the parts, in the order of the splits: results do not vary.

A tile of keys lies within one page, and the page of the next one is read a tile ahead: nothing waits for a table.

Before ``gdc_wait`` the decode kernel reads slots, positions, tables, ``rope_SC`` and the first cached keys and values.
None of these may be written by a kernel of the same unbroken chain of overlapping launches; a kernel launched the
ordinary way between them and this one, such as the embedding's at the start of a step, breaks the chain.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from mixtralkit.ops.runtime import multiprocessors, overlaps_launches, tuned

MAX_PAIRS = 1 << 16  # (sequence, key head) pairs of one call that may be split over programs
LOG2_E = math.log2(math.e)


@triton.jit
def _turned(x_RC, rope_P2, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Features (2i, 2i+1) of every row turned by angle i, in float32."""
    cos_P, sin_P = tl.split(rope_P2)
    even_RP, odd_RP = tl.split(tl.reshape(x_RC.to(tl.float32), (ROWS, BLOCK_C // 2, 2)))
    turned_RP2 = tl.join(even_RP * cos_P - odd_RP * sin_P, even_RP * sin_P + odd_RP * cos_P)
    return tl.reshape(turned_RP2, (ROWS, BLOCK_C))


@triton.jit
def _page(pages, tile, last, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of a tile of a sequence's keys; any for tile ``last`` and those behind it."""
    return tl.load(pages + tile * BLOCK_N // P, tile < last, other=0)


@triton.jit
def _sees(start, begin, end, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Which of the positions ``start …`` lie in ``begin:end``, ``begin`` being 0 without a window."""
    position_N = start + tl.arange(0, BLOCK_N)
    sees_N = position_N < end
    if WINDOW > 0:
        sees_N = sees_N & (position_N >= begin)
    return sees_N


@triton.jit
def _load_tile(
    head, page, start, begin, end, page_stride,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Positions ``start …`` of one head's cache: [BLOCK_N, BLOCK_C], zero outside ``begin:end``."""
    c_C = tl.arange(0, BLOCK_C)
    mask = _sees(start, begin, end, BLOCK_N, WINDOW)[:, None]
    if C < BLOCK_C:
        mask = mask & (c_C < C)[None, :]
    rows = head + page.to(tl.int64) * page_stride + start % P * C
    return tl.load(rows + tl.arange(0, BLOCK_N)[:, None] * C + c_C[None, :], mask, other=0.0)


@triton.jit
def _attend_tile(
    q_GC, k_NC, v_NC, start, begin, end, top_G, sum_G, acc_GC, scale,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax (base 2) over a tile of keys: its maximum, its sum and the weighted values."""
    score_GN = tl.dot(q_GC, tl.trans(k_NC), input_precision=PRECISION) * scale
    score_GN = tl.where(_sees(start, begin, end, BLOCK_N, WINDOW)[None, :], score_GN, float("-inf"))
    new_top_G = tl.maximum(top_G, tl.max(score_GN, 1))
    weight_GN = tl.exp2(score_GN - new_top_G[:, None])
    shrink_G = tl.exp2(top_G - new_top_G)
    acc_GC = tl.dot(weight_GN.to(v_NC.dtype), v_NC, acc_GC * shrink_G[:, None], input_precision=PRECISION)
    return new_top_G, sum_G * shrink_G + tl.sum(weight_GN, 1), acc_GC


@triton.jit
def _decode_attention(
    qkv_BQ, keys, values, tables_SM, slots_B, positions_B, rope_SC, out_BO, parts, tops, sums, arrivals,
    qkv_stride, page_stride, head_stride, table_stride, out_stride, scale, whole_tiles, min_tiles,
    GROUP: tl.constexpr, C: tl.constexpr, P: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_B + row)
    position = tl.load(positions_B + row).to(tl.int32)
    g_G, c_C = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C)
    real_C = c_C < C
    real_GC = (g_G < GROUP)[:, None] & real_C[None, :]
    out_GC = out_BO + row.to(tl.int64) * out_stride + (kv_head * GROUP + g_G)[:, None] * C + c_C[None, :]
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        if split == 0:
            tl.store(out_GC, tl.zeros((BLOCK_G, BLOCK_C), out_BO.dtype.element_ty), real_GC)
        return

    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(position + 1 - WINDOW, 0)
    # of cached keys, the first with the keys in front of the window: the token's own never leaves the registers
    skipped = begin // BLOCK_N
    tiles = tl.cdiv(position, BLOCK_N) - skipped
    active = 1
    if tiles > whole_tiles:
        active = tl.minimum(tl.cdiv(tiles, min_tiles), SPLITS)
    if split >= active:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    first, last = skipped + split * tiles // active, skipped + (split + 1) * tiles // active
    pages = tables_SM + slot.to(tl.int64) * table_stride
    keys += kv_head.to(tl.int64) * head_stride
    values += kv_head.to(tl.int64) * head_stride
    page = _page(pages, first, last, P, BLOCK_N)
    own_page = tl.load(pages + position // P)
    start = first * BLOCK_N
    if EARLY:
        k_NC = _load_tile(keys, page, start, begin, position, page_stride, C, P, BLOCK_C, BLOCK_N, WINDOW)
        v_NC = _load_tile(values, page, start, begin, position, page_stride, C, P, BLOCK_C, BLOCK_N, WINDOW)
        first += 1
        page = _page(pages, first, last, P, BLOCK_N)
    p_P, two = tl.arange(0, BLOCK_C // 2), tl.arange(0, 2)
    rope = rope_SC + position * C + p_P[:, None] * 2 + two[None, :]
    rope_P2 = tl.load(rope, (p_P < C // 2)[:, None], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    qkv = qkv_BQ + row.to(tl.int64) * qkv_stride
    q_GC = tl.load(qkv + (kv_head * GROUP + g_G)[:, None] * C + c_C[None, :], real_GC, other=0.0)
    own = qkv + (kv_heads * GROUP + kv_head) * C + c_C[None, :]
    own_k_1C = tl.load(own, real_C[None, :], other=0.0)
    own_v_1C = tl.load(own + kv_heads * C, real_C[None, :], other=0.0)
    q_GC = _turned(q_GC, rope_P2, BLOCK_G, BLOCK_C).to(q_GC.dtype)
    own_k_1C = _turned(own_k_1C, rope_P2, 1, BLOCK_C).to(q_GC.dtype)
    if split == 0:
        place = own_page.to(tl.int64) * page_stride + position % P * C + c_C[None, :]
        tl.store(keys + place, own_k_1C, real_C[None, :])
        tl.store(values + place, own_v_1C, real_C[None, :])

    # The running softmax starts, in the first split, with the token's own key as the only one.
    own_score_G = tl.sum(q_GC.to(tl.float32) * own_k_1C.to(tl.float32), 1) * scale
    top_G = tl.where(split == 0, own_score_G, float("-inf"))
    sum_G = tl.where(split == 0, 1.0, 0.0) + tl.zeros((BLOCK_G,), tl.float32)
    acc_GC = tl.where(split == 0, own_v_1C.to(tl.float32), 0.0) + tl.zeros((BLOCK_G, BLOCK_C), tl.float32)
    if EARLY:
        top_G, sum_G, acc_GC = _attend_tile(
            q_GC, k_NC, v_NC, start, begin, position, top_G, sum_G, acc_GC, scale, BLOCK_N, WINDOW, PRECISION
        )
    for tile in range(first, last):
        start = tile * BLOCK_N
        k_NC = _load_tile(keys, page, start, begin, position, page_stride, C, P, BLOCK_C, BLOCK_N, WINDOW)
        v_NC = _load_tile(values, page, start, begin, position, page_stride, C, P, BLOCK_C, BLOCK_N, WINDOW)
        page = _page(pages, tile + 1, last, P, BLOCK_N)
        top_G, sum_G, acc_GC = _attend_tile(
            q_GC, k_NC, v_NC, start, begin, position, top_G, sum_G, acc_GC, scale, BLOCK_N, WINDOW, PRECISION
        )

    if SPLITS == 1 or active == 1:
        tl.store(out_GC, (acc_GC / sum_G[:, None]).to(out_BO.dtype.element_ty), real_GC)
    else:
        pair = row * kv_heads + kv_head
        part_G = (pair * SPLITS + split) * GROUP + g_G
        tl.store(parts + part_G.to(tl.int64)[:, None] * BLOCK_C + c_C[None, :], acc_GC, (g_G < GROUP)[:, None])
        tl.store(tops + part_G, top_G, g_G < GROUP)
        tl.store(sums + part_G, sum_G, g_G < GROUP)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == active - 1:
            tl.store(arrivals + pair, 0)  # as the next call wants it
            out = out_BO + row.to(tl.int64) * out_stride + kv_head * GROUP * C
            _merge(parts, tops, sums, out, pair, active, GROUP, SPLITS, C, BLOCK_C)


@triton.jit
def _merge(
    parts, tops, sums, out, pair, active,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The output of a key head's query heads from the parts of its ``active`` splits, some splits at a time."""
    BLOCK_G: tl.constexpr = triton.next_power_of_2(GROUP)
    CHUNK: tl.constexpr = max(1, min(SPLITS, 8192 // (BLOCK_G * BLOCK_C)))
    s_S, g_G, c_C = tl.arange(0, SPLITS), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C)
    part_SG = (pair * SPLITS + s_S[:, None]) * GROUP + g_G[None, :]
    real_SG = (s_S < active)[:, None] & (g_G < GROUP)[None, :]
    # .cg: another multiprocessor wrote these, and this one's L1 may hold what lay there in the call before
    top_G = tl.max(tl.load(tops + part_SG, real_SG, other=float("-inf"), cache_modifier=".cg"), 0)
    top_G = tl.where(g_G < GROUP, top_G, 0.0)
    sum_G = tl.zeros((BLOCK_G,), tl.float32)
    acc_GC = tl.zeros((BLOCK_G, BLOCK_C), tl.float32)
    for split in range(0, active, CHUNK):
        s_U = split + tl.arange(0, CHUNK)
        part_UG = (pair * SPLITS + s_U[:, None]) * GROUP + g_G[None, :]
        real_UG = (s_U < active)[:, None] & (g_G < GROUP)[None, :]
        top_UG = tl.load(tops + part_UG, real_UG, other=float("-inf"), cache_modifier=".cg")
        sum_UG = tl.load(sums + part_UG, real_UG, other=0.0, cache_modifier=".cg")
        at_UGC = part_UG.to(tl.int64)[:, :, None] * BLOCK_C + c_C[None, None, :]
        part_UGC = tl.load(parts + at_UGC, real_UG[:, :, None], other=0.0, cache_modifier=".cg")
        weight_UG = tl.exp2(top_UG - top_G[None, :])
        sum_G += tl.sum(sum_UG * weight_UG, 0)
        acc_GC += tl.sum(part_UGC * weight_UG[:, :, None], 0)
    real_GC = (g_G < GROUP)[:, None] & (c_C < C)[None, :]
    tl.store(out + g_G[:, None] * C + c_C[None, :], (acc_GC / sum_G[:, None]).to(out.dtype.element_ty), real_GC)


def launch_decode_attention(
    qkv_BQ: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    slots_B: torch.Tensor,
    positions_B: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
    window: int | None = None,
    out: torch.Tensor | None = None,
    settings: dict[str, int] | None = None,
) -> torch.Tensor:
    """``attention.decode_attention`` by Triton."""
    rows, device = qkv_BQ.shape[0], qkv_BQ.device
    _, kv_heads, page_size, head_dim = keys_NJPC.shape
    group = heads // kv_heads
    _check(qkv_BQ, keys_NJPC, values_NJPC, tables_SM, rope_SC, heads)
    if out is None:
        out = qkv_BQ.new_empty(rows, heads * head_dim)
    shape = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    if settings is None:
        settings = tuned("decode_attention", device, rows, **shape) or _default(rows, device, qkv_BQ.dtype, **shape)
    splits = settings["splits"] if rows * kv_heads <= MAX_PAIRS else 1
    block_n = min(settings["block_n"], page_size)
    finer = settings["block_n"] // block_n
    block_c = triton.next_power_of_2(head_dim)
    parts = torch.empty(rows * kv_heads * splits * group * (block_c + 2) * (splits > 1), device=device)
    tops, sums = parts[len(parts) // (block_c + 2) * block_c :].chunk(2) if splits > 1 else (parts, parts)
    pdl = overlaps_launches(device)
    _decode_attention[(kv_heads, rows, splits)](
        qkv_BQ, keys_NJPC, values_NJPC, tables_SM, slots_B, positions_B, rope_SC, out, parts, tops, sums,
        _arrivals(device), qkv_BQ.stride(0), keys_NJPC.stride(0), keys_NJPC.stride(1), tables_SM.stride(0),
        out.stride(0), head_dim**-0.5 * LOG2_E, finer * settings["whole_tiles"], finer * settings["min_tiles"],
        GROUP=group, C=head_dim, P=page_size, WINDOW=window or 0, SPLITS=splits,
        BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_C=block_c, BLOCK_N=block_n,
        EARLY=settings["early"], PRECISION="ieee" if qkv_BQ.dtype == torch.float32 else "tf32",  # for float32 only
        PDL=pdl, num_warps=settings["num_warps"], num_stages=settings["num_stages"],
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def candidates(rows: int, **shape: int) -> list[dict[str, int]]:
    """Settings of ``decode_attention`` worth timing: with a first tile fetched ahead, and without."""
    pairs = rows * shape["kv_heads"]
    tiles = [
        (32, 4, 4, 0, 2, 4), (32, 16, 16, 0, 2, 4), (32, 16, 16, 0, 4, 4), (64, 8, 8, 0, 4, 2),
        (64, 4, 1, 1, 4, 2), (128, 1, 1, 1, 4, 2), (128, 2, 1, 1, 4, 2), (128, 3, 1, 1, 4, 2),
    ]  # fmt: skip
    names = ("block_n", "whole_tiles", "min_tiles", "early", "num_warps", "num_stages")
    return [
        {"splits": splits, **dict(zip(names, tile, strict=True))}
        for splits in (1, 2, 4, 8, 16, 32, 64)
        if splits == 1 or pairs * splits <= 8192
        for tile in tiles
    ]


def _default(rows: int, device: torch.device, dtype: torch.dtype, **shape: int) -> dict[str, int]:
    """A rule for GPUs and shapes nobody measured.

    With few pairs latency counts: a first tile fetched ahead, and contexts of a few hundred tokens left whole; smaller
    tiles for a single sequence, whose programs are few. With many it is the stream of keys: small deep tiles, and one
    warp a program where merging the splits leaves room in its registers (H200, 256 sequences of 256 tokens: 68 us
    instead of 73, of which 59 are reading). Programs for splits that a short context does not need cost little, and
    without them one long sequence among short ones would keep a few multiprocessors busy alone.
    """
    pairs, processors = rows * shape["kv_heads"], multiprocessors(device)
    few, alone = pairs <= processors, 16 * pairs <= processors
    row_bytes = triton.next_power_of_2(shape["head_dim"]) * dtype.itemsize
    block_n = max(16, min(64 if alone else 128, 32768 // row_bytes) if few else min(32, 8192 // row_bytes))
    splits = max(1, min(32, 4 * processors // pairs)) if few else max(2, min(16, 16 * processors // pairs))
    whole = triton.cdiv(256 if alone else 384 if few else 512, block_n)
    return {
        "splits": 1 << (splits.bit_length() - 1), "block_n": block_n, "whole_tiles": whole,
        "min_tiles": 1 if few else whole, "early": int(few), "num_warps": 4 if few else 1 if splits <= 4 else 2,
        "num_stages": 2 if few else 3 if pairs >= 8 * processors else 4,
    }  # fmt: skip


@functools.lru_cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """Counters, zero between calls, of the programs of each pair that are done."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call decode_attention once before capturing it: its counters are to outlive the graph")
    return torch.zeros(MAX_PAIRS, dtype=torch.int32, device=device)


def _check(qkv_TQ, keys_NJPC, values_NJPC, tables_SM, rope_SC, heads: int) -> None:
    """What the kernels' addresses take for granted."""
    _, kv_heads, page_size, head_dim = keys_NJPC.shape
    assert page_size >= 16
    assert page_size & (page_size - 1) == 0
    assert tables_SM.dtype == torch.int32
    assert tables_SM.stride(1) == 1
    assert rope_SC.shape[0] <= tables_SM.shape[1] * page_size
    assert qkv_TQ.shape[1] == (heads + 2 * kv_heads) * head_dim
    assert keys_NJPC.stride() == values_NJPC.stride()
    assert keys_NJPC.stride()[2:] == (head_dim, 1)
    assert rope_SC.shape[1:] == (head_dim // 2, 2)
    assert qkv_TQ.stride(1) == 1
    assert rope_SC.is_contiguous()


@triton.jit
def _rotate_and_store(
    qkv_TQ, keys, values, tables_SM, slots_T, positions_T, rope_SC, q_THC,
    qkv_stride, page_stride, head_stride, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots_T + token).to(tl.int64)
    if slot < 0:
        return
    position = tl.load(positions_T + token).to(tl.int64)
    page = tl.load(tables_SM + slot * table_stride + position // P).to(tl.int64)
    p_P, two, c_C = tl.arange(0, BLOCK_C // 2), tl.arange(0, 2), tl.arange(0, BLOCK_C)
    h_H, j_J = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_J)
    real_HC = (h_H < HEADS)[:, None] & (c_C < C)[None, :]
    real_JC = (j_J < KV_HEADS)[:, None] & (c_C < C)[None, :]
    at_HC = h_H[:, None] * C + c_C[None, :]
    at_JC = j_J[:, None] * C + c_C[None, :]
    rope = rope_SC + position * C + p_P[:, None] * 2 + two[None, :]
    rope_P2 = tl.load(rope, (p_P < C // 2)[:, None], other=0.0)
    qkv = qkv_TQ + token * qkv_stride
    q_HC = tl.load(qkv + at_HC, real_HC, other=0.0)
    k_JC = tl.load(qkv + HEADS * C + at_JC, real_JC, other=0.0)
    v_JC = tl.load(qkv + (HEADS + KV_HEADS) * C + at_JC, real_JC, other=0.0)
    q_HC = _turned(q_HC, rope_P2, BLOCK_H, BLOCK_C).to(q_HC.dtype)
    k_JC = _turned(k_JC, rope_P2, BLOCK_J, BLOCK_C).to(k_JC.dtype)
    tl.store(q_THC + token * HEADS * C + at_HC, q_HC, real_HC)
    place_JC = page * page_stride + position % P * C + j_J.to(tl.int64)[:, None] * head_stride + c_C[None, :]
    tl.store(keys + place_JC, k_JC, real_JC)
    tl.store(values + place_JC, v_JC, real_JC)


def launch_rotate_and_store(
    qkv_TQ: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    slots_T: torch.Tensor,
    positions_T: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """``attention.rotate_and_store`` by Triton: one program a token."""
    tokens, device = qkv_TQ.shape[0], qkv_TQ.device
    _, kv_heads, page_size, head_dim = keys_NJPC.shape
    _check(qkv_TQ, keys_NJPC, values_NJPC, tables_SM, rope_SC, heads)
    q_THC = qkv_TQ.new_empty(tokens, heads, head_dim)
    pdl = overlaps_launches(device)
    _rotate_and_store[(tokens,)](
        qkv_TQ, keys_NJPC, values_NJPC, tables_SM, slots_T, positions_T, rope_SC, q_THC, qkv_TQ.stride(0),
        keys_NJPC.stride(0), keys_NJPC.stride(1), tables_SM.stride(0), HEADS=heads, KV_HEADS=kv_heads, C=head_dim,
        P=page_size,
        BLOCK_H=triton.next_power_of_2(heads), BLOCK_J=triton.next_power_of_2(kv_heads),
        BLOCK_C=triton.next_power_of_2(head_dim), PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return q_THC
