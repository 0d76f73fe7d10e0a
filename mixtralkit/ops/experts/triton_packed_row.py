"""One row of half precision through experts in fewer bits, by the ordinary cores: ``triton_small``'s way for one row.

A single row leaves the matrix units nearly idle, and bringing weights to them costs more than the products. Here words
go from memory to registers, 16 bytes a thread, many at a time, and are multiplied there, two weights at once, as
float16: four or eight bits in the last bits of a float16 are their number times 2^-24, with nothing to be done but an
AND; those of e4m3, moved by one bit, are 2^-8 of it. Rows are scaled to fit, by a power of two for each chunk of a
thread's columns, and a chunk's sum is float32 again: float16 sums 16 products of 11 bits, which is finer than the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.experts.triton_small import _add_row, _start_counting
from mixtralkit.ops.experts.triton_words import Operand, matrices_at
from mixtralkit.ops.runtime import overlaps_launches

CHUNK = tl.constexpr(4)  # words of 32 bits that a thread loads at once, all of one group


def default_settings(halves: bool) -> dict[str, int]:
    """What was fastest on an H200 for Mixtral-8x7B.

    ``up_f`` and ``down_d`` outputs a program; ``down_words`` of 32 bits that one multiplies of each.
    """
    down_words, down_warps = (128, 1) if halves else (256, 4)
    return {
        "up_f": 8 if halves else 4, "up_warps": 4, "down_d": 16, "down_words": down_words, "down_warps": down_warps
    }  # fmt: skip


def expert_sum_packed_row(
    x_1D: torch.Tensor,
    slots_1K: torch.Tensor,
    weights_1K: torch.Tensor,
    up: Operand,
    down: Operand,
    residual_1D: torch.Tensor | None,
    out_1D: torch.Tensor,
    storage_S: torch.Tensor | None,
    settings: dict[str, int] | None = None,
) -> torch.Tensor:
    """``experts.expert_sum`` of one row of half precision and packed weights on a GPU.

    Args:
        settings: see ``default_settings``; None takes these.
    """
    (_, width), top_k, hidden = x_1D.shape, slots_1K.shape[1], down.columns
    s = settings or default_settings(up.word == 4)
    overlaps = overlaps_launches(x_1D.device)
    more = {"TOP_K": top_k, "PDL": overlaps} | ({"launch_pdl": True} if overlaps else {})
    h_KF, blocks, words = x_1D.new_empty(top_k, hidden), triton.cdiv(width, s["down_d"]), hidden // (2 * down.word)
    parts = triton.cdiv(words, s["down_words"])
    arrived_B = torch.empty(blocks, dtype=torch.int32, device=x_1D.device)
    _up_packed_row[triton.cdiv(hidden, s["up_f"]), top_k](
        x_1D, slots_1K, weights_1K, *up.tensors, storage_S, h_KF, arrived_B, blocks, width, hidden,
        BLOCK_F=s["up_f"], BLOCK_W=triton.next_power_of_2(width // (2 * up.word)),
        COUNTERS=triton.next_power_of_2(blocks), **up.numbers, **more, num_warps=s["up_warps"],
    )  # fmt: skip
    sums_ND = torch.empty((top_k * parts, width), dtype=torch.float32, device=x_1D.device)
    _down_packed_row[blocks, top_k * parts](
        h_KF, slots_1K, *down.tensors, storage_S, residual_1D, sums_ND, arrived_B, out_1D, width, hidden,
        PARTS=parts, BLOCK_D=s["down_d"], BLOCK_W=s["down_words"], **down.numbers, **more, num_warps=s["down_warps"],
    )  # fmt: skip
    return out_1D


@triton.jit
def _up_packed_row(
    x, slots, weights, data, scales, zeros, storage, h, arrived, counters, width, hidden,
    BLOCK_F: tl.constexpr, BLOCK_W: tl.constexpr, COUNTERS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    HEIGHT: tl.constexpr, ASM: tl.constexpr, TOP_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[k, f] of one choice and some f, as ``triton_small._up_one_row``."""
    k, word_W = tl.program_id(1), tl.arange(0, BLOCK_W)
    f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = f_F < hidden
    row_F = tl.where(inside_F, f_F, 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + k).to(tl.int64)
    place = tl.maximum(slot, 0)
    if storage is not None:
        place = tl.load(storage + place)
    words = _words(slot, width, KIND)
    gate = matrices_at(data, scales, zeros, place * 2, row_F, hidden, width, KIND, GROUP, HEIGHT)
    up = matrices_at(data, scales, zeros, place * 2 + 1, row_F, hidden, width, KIND, GROUP, HEIGHT)
    inside_FW = inside_F[:, None] & (word_W < words)[None, :]
    w1_FW = tl.load(_in_words(gate[0])[:, None] + word_W[None, :], inside_FW, 0, eviction_policy="evict_first")
    w3_FW = tl.load(_in_words(up[0])[:, None] + word_W[None, :], inside_FW, 0, eviction_policy="evict_first")
    gate_groups = _groups_of(gate, zeros, 0, words, BLOCK_W, KIND, GROUP)
    up_groups = _groups_of(up, zeros, 0, words, BLOCK_W, KIND, GROUP)
    weight = tl.load(weights + k)
    _start_counting(arrived, counters, COUNTERS)
    x_W, unit_X, sums_X = _scaled_row(x, word_W, word_W < words, KIND, ASM)
    gate_F = _products(w1_FW, x_W, unit_X, sums_X, gate_groups, KIND, GROUP, zeros is not None, ASM)
    up_F = _products(w3_FW, x_W, unit_X, sums_X, up_groups, KIND, GROUP, zeros is not None, ASM)
    h_F = weight * (gate_F * tl.sigmoid(gate_F) * up_F)
    tl.store(h + k * hidden + f_F, h_F.to(h.dtype.element_ty), f_F < tl.where(slot >= 0, hidden, 0))


@triton.jit
def _down_packed_row(
    h, slots, data, scales, zeros, storage, residual, sums, arrived, out, width, hidden,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    HEIGHT: tl.constexpr, ASM: tl.constexpr, TOP_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One choice's part of out[d] for some d, as ``triton_small._down_one_row``: the weights come before the wait."""
    k, first = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS * BLOCK_W
    d_D, word_W = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W)
    inside_D = d_D < width
    slot = tl.load(slots + k, cache_modifier=".cg").to(tl.int64)
    present = 0
    for choice in tl.static_range(TOP_K):
        present += tl.where(tl.load(slots + choice, cache_modifier=".cg") >= 0, 1 << choice, 0)
    place = tl.maximum(slot, 0)
    if storage is not None:
        place = tl.load(storage + place, cache_modifier=".cg")
    words = _words(slot, hidden, KIND)
    row_D = tl.where(inside_D, d_D, 0)
    matrix = matrices_at(data, scales, zeros, place, row_D, width, hidden, KIND, GROUP, HEIGHT)
    inside_W = word_W < words - first
    w_DW = tl.load(
        _in_words(matrix[0])[:, None] + (first + word_W)[None, :], inside_D[:, None] & inside_W[None, :], 0,
        eviction_policy="evict_first",
    )  # fmt: skip
    groups = _groups_of(matrix, zeros, first, words, BLOCK_W, KIND, GROUP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    h_W, unit_X, sums_X = _scaled_row(h + k * hidden + first * (8 if KIND == 0 else 4), word_W, inside_W, KIND, ASM)
    sum_D = _products(w_DW, h_W, unit_X, sums_X, groups, KIND, GROUP, zeros is not None, ASM)
    tl.store(sums + tl.program_id(1) * width + d_D, sum_D, inside_D)
    _add_row(sums, residual, arrived, out, present, width, d_D, inside_D, PARTS, BLOCK_D, TOP_K)


@triton.jit
def _words(slot, columns, KIND: tl.constexpr):
    """Words of 32 bits of an output of a slot, none of slot -1."""
    return tl.multiple_of(tl.where(slot >= 0, columns // (8 if KIND == 0 else 4), 0), 8)


@triton.jit
def _in_words(data_O):
    return data_O.to(tl.pointer_type(tl.int32))


@triton.jit
def _both(pair, DTYPE: tl.constexpr):
    """The two numbers of half precision in 32 bits, in float32."""
    low = pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _by_chunk(a_W):
    return tl.reshape(a_W, (a_W.shape[0] // CHUNK, CHUNK))


@triton.jit
def _scaled_row(x, word_W, inside_W, KIND: tl.constexpr, ASM: tl.constexpr):
    """What the weights of every word are multiplied with: pairs of columns, for its first and third quarters, …

    Returns:
        the pairs, of float16 in a word or apart in float32 for the interpreter; what a chunk's sum is multiplied with;
        and a chunk's sums of x, of the first and of the second half of its pairs.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    if KIND == 0:  # of 64 columns, word i has 2i and 2i + 1 of each 16
        at_W = x.to(tl.pointer_type(tl.int32)) + tl.max_contiguous(tl.multiple_of(word_W // 8 * 32 + word_W % 8, 4), 4)
        a, b = _both(tl.load(at_W, inside_W, 0), DTYPE)
        c, d = _both(tl.load(at_W + 8, inside_W, 0), DTYPE)
        e, f = _both(tl.load(at_W + 16, inside_W, 0), DTYPE)
        g, h = _both(tl.load(at_W + 24, inside_W, 0), DTYPE)
        sums = tl.sum(_by_chunk(a + b + c + d), 1), tl.sum(_by_chunk(e + f + g + h), 1)
        most_W = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
        most_W = tl.maximum(most_W, tl.maximum(tl.maximum(tl.abs(e), tl.abs(f)), tl.maximum(tl.abs(g), tl.abs(h))))
    else:  # word i has 4i … 4i + 3, of which the even ones are a pair
        four_W = tl.load(x.to(tl.pointer_type(tl.int64)) + word_W, inside_W, 0)
        a, c = _both(four_W.to(tl.int32), DTYPE)
        b, d = _both((four_W >> 32).to(tl.int32), DTYPE)
        sums = tl.sum(_by_chunk(a + b), 1), tl.sum(_by_chunk(c + d), 1)
        most_W = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
    # 2^n times the largest of a chunk lies below 2^15, or where weights are not small 2^11
    TOP: tl.constexpr = 10 if KIND == 2 else 14
    SMALL: tl.constexpr = 8 if KIND == 2 else 24  # -log2 of what float16 makes of a weight 1
    exponent_X = tl.maximum(tl.max(_by_chunk(most_W), 1).to(tl.int32, bitcast=True) & 0x7F800000, 64 << 23)
    lift_X = ((254 << 23) - exponent_X + (TOP << 23)).to(tl.float32, bitcast=True)
    unit_X = (exponent_X + ((SMALL - TOP) << 23)).to(tl.float32, bitcast=True)
    lift_W = tl.reshape(tl.broadcast_to(lift_X[:, None], (lift_X.shape[0], CHUNK)), word_W.shape)
    if KIND == 0:
        high_W = lift_W * 0.0625  # of bits 4 … 7, which are 16 times as much
        pairs = (
            _pair(a, b, lift_W, ASM), _pair(c, d, high_W, ASM), _pair(e, f, lift_W, ASM), _pair(g, h, high_W, ASM)
        )  # fmt: skip
    else:
        pairs = _pair(a, b, lift_W, ASM), _pair(c, d, lift_W, ASM)
    return pairs, unit_X, sums


@triton.jit
def _pair(a_W, b_W, lift_W, ASM: tl.constexpr):
    """Two numbers lifted, as float16 in one word; for the interpreter apart."""
    if ASM:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [a_W * lift_W, b_W * lift_W], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pair = a_W * lift_W, b_W * lift_W
    return pair


@triton.jit
def _products(
    words_OW, x, unit_X, sums_X, groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float32 [O]: each output's words times their columns; ``groups`` are scales and zero points (``_groups_of``)."""
    if KIND == 0:
        if GROUP == 32:
            front_OW, back_OW = _four_bits_apart(words_OW, x, ASM)
            sum_OX = _of_groups(front_OW, unit_X, sums_X[0], groups[0], KIND, GROUP, ZEROS, ASM)
            sum_OX += _of_groups(back_OW, unit_X, sums_X[1], groups[1], KIND, GROUP, ZEROS, ASM)
        else:
            sum_OW = _four_bits(words_OW, x, ASM)
            sum_OX = _of_groups(sum_OW, unit_X, sums_X[0] + sums_X[1], groups[0], KIND, GROUP, ZEROS, ASM)
    else:
        sum_OW = _eight_bits(words_OW, x, KIND, ASM)
        sum_OX = _of_groups(sum_OW, unit_X, sums_X[0] + sums_X[1], groups[0], KIND, GROUP, ZEROS, ASM)
    sum_O = tl.sum(sum_OX, 1)
    if GROUP == 0:
        sum_O *= groups[0][0].to(tl.float32)
    return sum_O


@triton.jit
def _groups_of(matrix, zeros, first, words, BLOCK_W: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr):
    """Scales and zero points [O, chunks] of the first half of each word and of the last, or one scale an output.

    Where there are no zero points, or both halves are of one group, the second of a pair is the first again.
    """
    if GROUP:
        chunk_X = first + tl.arange(0, BLOCK_W // CHUNK) * CHUNK
        group_X = tl.where(chunk_X < words, chunk_X // 8 * 64 // GROUP if KIND == 0 else chunk_X * 4 // GROUP, 0)
        scale = tl.load(matrix[1][:, None] + group_X[None, :])
        more_scale = tl.load(matrix[1][:, None] + group_X[None, :] + 1) if GROUP == 32 else scale
        zero, more_zero = scale, more_scale
        if zeros is not None:
            zero = tl.load(matrix[2][:, None] + group_X[None, :])
            more_zero = tl.load(matrix[2][:, None] + group_X[None, :] + 1) if GROUP == 32 else zero
    else:
        scale = tl.load(matrix[1])
        more_scale, zero, more_zero = scale, scale, scale
    return (scale, zero), (more_scale, more_zero)


@triton.jit
def _four_bits(words_OW, x, ASM: tl.constexpr):
    """Sums over a word's weights, times 2^-24."""
    if ASM:
        sum_OW = tl.inline_asm_elementwise(
            """{
            .reg .b32 s, w;
            and.b32 w, $1, 0x000f000f;
            mul.rn.f16x2 $0, w, $2;
            and.b32 w, $1, 0x00f000f0;
            fma.rn.f16x2 $0, w, $3, $0;
            shr.u32 s, $1, 8;
            and.b32 w, s, 0x000f000f;
            fma.rn.f16x2 $0, w, $4, $0;
            and.b32 w, s, 0x00f000f0;
            fma.rn.f16x2 $0, w, $5, $0;
            }""",
            "=&r,r,r,r,r,r", [words_OW, x[0], x[1], x[2], x[3]], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        sum_OW = _apart(words_OW, 0, 15, x[0]) + _apart(words_OW, 0, 240, x[1])
        sum_OW += _apart(words_OW, 8, 15, x[2]) + _apart(words_OW, 8, 240, x[3])
    return sum_OW


@triton.jit
def _four_bits_apart(words_OW, x, ASM: tl.constexpr):
    """``_four_bits`` of bits 0 … 7 of either half, and of bits 8 … 15."""
    if ASM:
        front, back = tl.inline_asm_elementwise(
            """{
            .reg .b32 s, w;
            and.b32 w, $2, 0x000f000f;
            mul.rn.f16x2 $0, w, $3;
            and.b32 w, $2, 0x00f000f0;
            fma.rn.f16x2 $0, w, $4, $0;
            shr.u32 s, $2, 8;
            and.b32 w, s, 0x000f000f;
            mul.rn.f16x2 $1, w, $5;
            and.b32 w, s, 0x00f000f0;
            fma.rn.f16x2 $1, w, $6, $1;
            }""",
            "=&r,=&r,r,r,r,r,r", [words_OW, x[0], x[1], x[2], x[3]], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        front = _apart(words_OW, 0, 15, x[0]) + _apart(words_OW, 0, 240, x[1])
        back = _apart(words_OW, 8, 15, x[2]) + _apart(words_OW, 8, 240, x[3])
    return front, back


@triton.jit
def _apart(words_OW, shift: tl.constexpr, mask: tl.constexpr, x):
    """What the assembly does with some bits of either half, in float32."""
    low, high = words_OW >> shift & mask, words_OW >> 16 + shift & mask
    return (low.to(tl.float32) * x[0][None, :] + high.to(tl.float32) * x[1][None, :]) * 2**-24


@triton.jit
def _eight_bits(words_OW, x, KIND: tl.constexpr, ASM: tl.constexpr):
    """Sums over a word's weights: of int8 those above -128, times 2^-24; of e4m3, times 2^-8."""
    if not ASM:
        if KIND == 1:
            above_OW = words_OW ^ -0x7F7F7F80
            sum_OW = _apart(above_OW, 0, 255, x[0]) + _apart(above_OW, 8, 255, x[1])
        else:
            sum_OW = _e4m3(words_OW, 0) * x[0][0][None, :] + _e4m3(words_OW, 16) * x[0][1][None, :]
            sum_OW += _e4m3(words_OW, 8) * x[1][0][None, :] + _e4m3(words_OW, 24) * x[1][1][None, :]
    elif KIND == 1:
        sum_OW = tl.inline_asm_elementwise(
            """{
            .reg .b32 s, w;
            xor.b32 s, $1, 0x80808080;
            and.b32 w, s, 0x00ff00ff;
            mul.rn.f16x2 $0, w, $2;
            shr.u32 s, s, 8;
            and.b32 w, s, 0x00ff00ff;
            fma.rn.f16x2 $0, w, $3, $0;
            }""",
            "=&r,r,r,r", [words_OW, x[0], x[1]], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        sum_OW = tl.inline_asm_elementwise(
            """{
            .reg .b32 s, w;
            shl.b32 s, $1, 8;
            shr.u32 w, s, 1;
            and.b32 w, w, 0x3f803f80;
            lop3.b32 w, s, 0x80008000, w, 0xea;
            mul.rn.f16x2 $0, w, $2;
            shr.u32 w, $1, 1;
            and.b32 w, w, 0x3f803f80;
            lop3.b32 w, $1, 0x80008000, w, 0xea;
            fma.rn.f16x2 $0, w, $3, $0;
            }""",
            "=&r,r,r,r", [words_OW, x[0], x[1]], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return sum_OW


@triton.jit
def _e4m3(words_OW, shift: tl.constexpr):
    """A byte of e4m3 as 2^-8 of its number."""
    byte = words_OW >> shift & 255
    return ((byte & 128) << 8 | (byte & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _add(a, b, ASM: tl.constexpr):
    """Two sums, of two float16 each where they are in a word."""
    if ASM:
        sum = tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        sum = a + b
    return sum


@triton.jit
def _of_groups(
    sum_OW, unit_X, sums_X, group,
    KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float32 [O, chunks] of the words' sums, of weights less 8, 128 or their zero point, times their scale."""
    SIZE: tl.constexpr = sum_OW.shape[0]
    CHUNKS: tl.constexpr = sum_OW.shape[1] // CHUNK
    a, b = tl.split(tl.reshape(sum_OW, (SIZE, CHUNKS * 2, 2)))
    a, b = tl.split(tl.reshape(_add(a, b, ASM), (SIZE, CHUNKS, 2)))
    sum_OX = _add(a, b, ASM)
    if ASM:
        low, high = _both(sum_OX, tl.float16)
        sum_OX = low + high
    sum_OX *= unit_X[None, :]
    if ZEROS:
        sum_OX -= group[1].to(tl.float32) * sums_X[None, :]
    elif KIND != 2:
        sum_OX -= (8.0 if KIND == 0 else 128.0) * sums_X[None, :]
    return sum_OX * group[0].to(tl.float32) if GROUP else sum_OX
