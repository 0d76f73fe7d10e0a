"""Experts in fewer bits: weights are read packed, and become numbers in registers in front of the matrix units.

By the number of rows: one of half precision through the ordinary cores (``triton_packed_row``); up to sixteen in two
launches, as ``triton_small``; sorted rows whose weights are read once, as ``triton_grouped``'s streamed form; and for
many rows an expert the layer's weights are unpacked first.

Where ``triton_words`` multiplies in another order than the columns', ``_arrange`` copies a layer's rows into it, and
what the first product gives is stored in it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mixtralkit.moe.weights import PackedWeight
from mixtralkit.ops.experts.triton_grouped import STREAMED, _spread, _weighted_sum, expert_sum_grouped
from mixtralkit.ops.experts.triton_packed_row import expert_sum_packed_row
from mixtralkit.ops.experts.triton_small import BLOCK_R, _add_parts, _choice_of, _start_counting
from mixtralkit.ops.experts.triton_sorting import sort_rows
from mixtralkit.ops.experts.triton_words import (
    INT4,
    Operand,
    column_of,
    in_order4,
    matrices_at,
    packed_dot,
    place_of,
    weights_of,
)
from mixtralkit.ops.runtime import multiprocessors, overlaps_launches

ROWS = 32  # of a weight matrix that a program unpacks


def expert_sum_packed(
    x_RD: torch.Tensor,
    slots_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    w13_SGD: PackedWeight,
    w2_SDF: PackedWeight,
    residual_RD: torch.Tensor | None = None,
    out_RD: torch.Tensor | None = None,
    storage_S: torch.Tensor | None = None,
    settings: dict[str, int] | None = None,
    likely_rows: int | None = None,
    likely_slots: int | None = None,
) -> torch.Tensor:
    """``experts.expert_sum`` of packed weights on a GPU; ``takes_packed`` says of which."""
    rows, top_k = slots_RK.shape
    slots = len(w2_SDF if storage_S is None else storage_S)
    up, down = Operand.of(w13_SGD), Operand.of(w2_SDF)
    x_RD, slots_RK, weights_RK = x_RD.contiguous(), slots_RK.contiguous(), weights_RK.contiguous()
    out_RD = torch.empty_like(x_RD) if out_RD is None else out_RD
    rest = (residual_RD, out_RD)
    if rows == 1 and x_RD.dtype != torch.float32:
        return expert_sum_packed_row(x_RD, slots_RK, weights_RK, up, down, *rest, storage_S, settings)
    mean = (rows if likely_rows is None else likely_rows) * top_k / (likely_slots or slots)
    settings = settings or default_settings(rows, mean, up.kind == INT4)
    if mean > STREAMED:
        plain = [_unpacked(operand, slots, storage_S, x_RD.dtype, stacked) for operand, stacked in ((up, 2), (down, 1))]
        more = {"likely_rows": likely_rows, "likely_slots": likely_slots}
        return expert_sum_grouped(x_RD, slots_RK, weights_RK, *plain, *rest, **more)
    if up.turned:
        x_RD = _arranged(x_RD)
    if rows <= BLOCK_R:
        return _sum_small(x_RD, slots_RK, weights_RK, up, down, *rest, storage_S, slots, settings)
    return _sum_streamed(x_RD, slots_RK, weights_RK, up, down, *rest, storage_S, slots, settings)


def default_settings(rows: int, mean: float, halves: bool) -> dict[str, int]:
    """What was fastest on an H200 for Mixtral-8x7B, whole.

    Outputs and columns of a tile, warps and stages of either product; ``parts`` programs that share the columns of w2
    in a small batch; ``block_r`` rows and ``programs`` a multiprocessor of the streamed form, for ``mean`` rows an
    expert.
    """
    more = {"parts": 1, "block_r": 32 if mean <= 24 else 64 if mean <= 48 or halves else 128, "programs": 2}
    if rows <= BLOCK_R:
        wide = 2 if halves and rows <= 8 else 1
        up, down = ((wide * block_o, 256, 4, 3 if halves else 4) for block_o in (32, 64))
        more["parts"] = 2
    elif halves:
        up, down = (64, 128, 4, 3), (128, 128, 4, 3)
    elif more["block_r"] == 32:
        up, down = (32, 256, 4, 4), (128, 128, 8, 3)
    else:
        up, down = (64, 128, 8, 3), (64, 128, 4, 4)
    names, parts = ("block_o", "block_k", "num_warps", "num_stages"), {"up": up, "down": down}.items()
    return {f"{part}_{name}": v for part, values in parts for name, v in zip(names, values, strict=True)} | more


@functools.lru_cache
def _has_warp_groups(device: torch.device) -> bool:
    """Whether four warps multiply 16 rows or more as one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _launch(x: torch.Tensor, settings: dict[str, int], part: str, block_r: int) -> dict[str, int | bool]:
    overlaps, warps = overlaps_launches(x.device), settings[f"{part}_num_warps"]
    more = {"PDL": overlaps, "num_warps": warps, "num_stages": settings[f"{part}_num_stages"]}
    more["WHOLE"] = block_r > 8 and warps % 4 == 0 and _has_warp_groups(x.device)
    return more | ({"launch_pdl": True} if overlaps else {})


def _sum_small(x_RD, slots_RK, weights_RK, up, down, residual_RD, out_RD, storage_S, slots: int, s) -> torch.Tensor:
    (rows, width), top_k, hidden, parts = x_RD.shape, slots_RK.shape[1], down.columns, s["parts"]
    common = {"TOP_K": top_k, "BLOCK_R": 8 if rows <= 8 else BLOCK_R}
    h_NF = x_RD.new_empty(rows * top_k, hidden)
    block_d = s["down_block_o"]
    arrived_B = torch.empty(triton.cdiv(width, block_d), dtype=torch.int32, device=x_RD.device)
    constants = up.constants(s["up_block_k"])
    _up_packed[(triton.cdiv(hidden, s["up_block_o"]), slots)](
        x_RD, slots_RK, weights_RK, *up.tensors, storage_S, h_NF, arrived_B, len(arrived_B), rows, width, hidden,
        TURNED=down.turned, BLOCK_F=s["up_block_o"], COUNTERS=triton.next_power_of_2(len(arrived_B)), **common,
        **constants, **_launch(x_RD, s, "up", common["BLOCK_R"]),
    )  # fmt: skip
    constants = down.constants(s["down_block_k"])
    sums_NPD = torch.empty((rows * top_k, parts, width), dtype=torch.float32, device=x_RD.device)
    span = triton.cdiv(hidden, parts * constants["BLOCK_K"]) * constants["BLOCK_K"]
    _down_packed[(len(arrived_B), slots * parts)](
        h_NF, slots_RK, *down.tensors, storage_S, residual_RD, sums_NPD, arrived_B, out_RD, rows, width, hidden, span,
        PARTS=parts, BLOCK_D=block_d, **common, **constants, **_launch(x_RD, s, "down", common["BLOCK_R"]),
    )  # fmt: skip
    return out_RD


def _sum_streamed(x_RD, slots_RK, weights_RK, up, down, residual_RD, out_RD, storage_S, slots: int, s) -> torch.Tensor:
    (rows, width), top_k, hidden = x_RD.shape, slots_RK.shape[1], down.columns
    overlap = overlaps_launches(x_RD.device)
    pdl = {"launch_pdl": True} if overlap else {}
    order = sort_rows(slots_RK, slots, s["block_r"], overlap, storage_S)
    x_PD, block_d = x_RD.new_empty(order.places, width), min(triton.next_power_of_2(width), 1024)
    _spread[rows + len(order.slot_B), triton.cdiv(width, block_d)](
        x_RD, order.place_N, order.rows_B, x_PD, rows, width,
        TOP_K=top_k, BLOCK_R=order.block_r, CUT=1, BLOCK_D=block_d, PDL=overlap, num_warps=4, **pdl,
    )  # fmt: skip
    h_PF, y_PD = x_RD.new_empty(order.places, hidden), x_RD.new_empty(order.places, width)
    for part, rows_PI, operand, out_PO in (("up", x_PD, up, h_PF), ("down", h_PF, down, y_PD)):
        block_o, outer = s[f"{part}_block_o"], out_PO.shape[1]
        tiles = triton.cdiv(outer, block_o)
        programs = min(len(order.slot_B) * tiles, s["programs"] * multiprocessors(x_RD.device))
        _product_packed[programs,](
            rows_PI, *operand.tensors, out_PO, order.slot_B, order.rows_B, order.blocks, operand.columns, outer, tiles,
            SWIGLU=part == "up", TURNED=part == "up" and down.turned, BLOCK_R=order.block_r, BLOCK_O=block_o,
            **operand.constants(s[f"{part}_block_k"]), **_launch(x_RD, s, part, order.block_r),
        )  # fmt: skip
    residual_RD = None if residual_RD is None else residual_RD.contiguous()
    _weighted_sum[rows, triton.cdiv(width, block_d)](
        y_PD, order.place_N, weights_RK, residual_RD, out_RD, width,
        TOP_K=top_k, BLOCK_D=block_d, RESIDUAL=residual_RD is not None, PDL=overlap, num_warps=4, **pdl,
    )  # fmt: skip
    return out_RD


def _arranged(x_RD: torch.Tensor) -> torch.Tensor:
    """Rows in the order in which weights of eight bits are multiplied."""
    (rows, width), overlap = x_RD.shape, overlaps_launches(x_RD.device)
    out_RD, block = torch.empty_like(x_RD), min(triton.next_power_of_2(width), 1024)
    more = {"launch_pdl": True} if overlap else {}
    _arrange[rows, triton.cdiv(width, block)](x_RD, out_RD, width, BLOCK=block, PDL=overlap, num_warps=4, **more)
    return out_RD


def _unpacked(operand: Operand, slots: int, storage_S, dtype: torch.dtype, stacked: int) -> torch.Tensor:
    """Plain matrices of all slots."""
    _, rows, _ = operand.data.shape
    out_SOK = torch.empty(slots, rows, operand.columns, dtype=dtype, device=operand.data.device)
    constants = operand.constants(128)
    _unpack[(triton.cdiv(rows // stacked, ROWS), stacked, slots)](
        *operand.tensors, storage_S, out_SOK, rows // stacked, operand.columns,
        STACKED=stacked, BLOCK_O=ROWS, **constants, num_warps=4,
    )  # fmt: skip
    return out_SOK


@triton.jit
def _arrange(x_RD, out_RD, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_RD + row * width + column_of(place), place < width)
    tl.store(out_RD + row * width + place, x, place < width)


@triton.jit(do_not_specialize=["rows"])
def _up_packed(
    x, slots, weights, data, scales, zeros, storage, h, arrived, counters, rows, width, hidden,
    TURNED: tl.constexpr, BLOCK_F: tl.constexpr, COUNTERS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_R: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
    ASM: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h of every row that chose one slot, for some f, as ``triton_small._up_some_rows``."""
    row_R, g_G = tl.arange(0, BLOCK_R), tl.arange(0, 2 * BLOCK_F)
    f_G = tl.program_id(0) * BLOCK_F + g_G % BLOCK_F
    f_G = tl.where(f_G < hidden, f_G, 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot, place = _slot_of(storage, tl.program_id(1))
    _start_counting(arrived, counters, COUNTERS)
    choice_R, _ = _choice_of(slots, slot, rows, BLOCK_R, TOP_K)
    chose_R = choice_R >= 0
    if tl.max(choice_R, 0) >= 0:
        matrix_G = place * 2 + g_G // BLOCK_F
        data_G, scale_G, zero_G = matrices_at(data, scales, zeros, matrix_G, f_G, hidden, width, KIND, GROUP, HEIGHT)
        sum_GR = packed_dot(
            data_G, scale_G, None if zeros is None else zero_G, x + tl.where(chose_R, row_R, 0) * width, chose_R,
            0, width, width, KIND, GROUP, 2 * BLOCK_F, BLOCK_R, BLOCK_K, ASM, WHOLE,
        )  # fmt: skip
        gate_FR, up_FR = tl.split(tl.permute(tl.reshape(sum_GR, (2, BLOCK_F, BLOCK_R)), (1, 2, 0)))
        weight_R = tl.load(weights + choice_R, chose_R, 0.0)
        h_FR = gate_FR * tl.sigmoid(gate_FR) * up_FR * weight_R[None, :]
        f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        stored_F = place_of(f_F, TURNED)
        places_FR = h + choice_R.to(tl.int64)[None, :] * hidden + stored_F[:, None]
        tl.store(places_FR, h_FR.to(h.dtype.element_ty), (f_F < hidden)[:, None] & chose_R[None, :])


@triton.jit(do_not_specialize=["rows"])
def _down_packed(
    h, slots, data, scales, zeros, storage, residual, sums, arrived, out, rows, width, hidden, span,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, TOP_K: tl.constexpr, BLOCK_R: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
    WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One slot's part of out[d] of the rows that chose it, for some d, as ``triton_small._down_some_rows``."""
    part = tl.program_id(1) % PARTS
    d_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = d_D < width
    slot, place = _slot_of(storage, tl.program_id(1) // PARTS)
    choice_R, present_R = _choice_of(slots, slot, rows, BLOCK_R, TOP_K)
    chose_R = choice_R >= 0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if tl.max(choice_R, 0) >= 0:
        row_D = tl.where(inside_D, d_D, 0)
        data_D, scale_D, zero_D = matrices_at(data, scales, zeros, place, row_D, width, hidden, KIND, GROUP, HEIGHT)
        sum_DR = packed_dot(
            data_D, scale_D, None if zeros is None else zero_D,
            h + tl.where(chose_R, choice_R, 0).to(tl.int64) * hidden, chose_R,
            part * span, tl.minimum(part * span + span, hidden), hidden, KIND, GROUP, BLOCK_D, BLOCK_R,
            BLOCK_K, ASM, WHOLE,
        )  # fmt: skip
        places_DR = sums + (choice_R * PARTS + part)[None, :] * width + d_D[:, None]
        tl.store(places_DR, sum_DR, inside_D[:, None] & chose_R[None, :])
    _add_parts(sums, residual, arrived, out, present_R, rows, width, d_D, inside_D, PARTS, BLOCK_D, TOP_K, BLOCK_R)


@triton.jit
def _slot_of(storage, program):
    """The slot of a program, and its place; past L1, which may hold what lay there when an earlier kernel read it."""
    slot = program.to(tl.int64)
    if storage is None:
        return slot, slot
    else:
        return slot, tl.load(storage + slot, cache_modifier=".cg")


@triton.jit
def _product_packed(
    x_PI, data, scales, zeros, out_PO, slot_B, rows_B, blocks, inner, outer, tiles,
    SWIGLU: tl.constexpr, TURNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, HEIGHT: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every sorted row times the weights of its slot: blocks of rows × blocks of weight rows, tile after tile.

    Of a block's rows as many quarters are multiplied as there are. ``TURNED`` stores outputs in the order in
    which weights of eight bits are multiplied.
    """
    QUARTER: tl.constexpr = max(BLOCK_R // 4, 16)
    HALF: tl.constexpr = max(BLOCK_R // 2, 16)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for tile in tl.range(tl.program_id(0), tl.load(blocks) * tiles, tl.num_programs(0)):
        block, o = tile // tiles, tile % tiles * BLOCK_O
        rows, slot = tl.load(rows_B + block), tl.load(slot_B + block).to(tl.int64)
        first = block.to(tl.int64) * BLOCK_R
        if rows <= QUARTER:
            _packed_tile(
                x_PI, data, scales, zeros, out_PO, slot, first, rows, o, inner, outer,
                SWIGLU, TURNED, QUARTER, BLOCK_O, KIND, GROUP, HEIGHT, BLOCK_K, ASM, WHOLE,
            )  # fmt: skip
        elif rows <= HALF:
            _packed_tile(
                x_PI, data, scales, zeros, out_PO, slot, first, rows, o, inner, outer,
                SWIGLU, TURNED, HALF, BLOCK_O, KIND, GROUP, HEIGHT, BLOCK_K, ASM, WHOLE,
            )  # fmt: skip
        else:
            _packed_tile(
                x_PI, data, scales, zeros, out_PO, slot, first, rows, o, inner, outer,
                SWIGLU, TURNED, BLOCK_R, BLOCK_O, KIND, GROUP, HEIGHT, BLOCK_K, ASM, WHOLE,
            )  # fmt: skip


@triton.jit
def _packed_tile(
    x_PI, data, scales, zeros, out_PO, slot, first, rows, o, inner, outer,
    SWIGLU: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, HEIGHT: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out[first : first + rows, o : o + BLOCK_O], the weights on the M side, w1 above w3 in one tile."""
    HIGH: tl.constexpr = 2 * BLOCK_O if SWIGLU else BLOCK_O
    g_G, r_R = tl.arange(0, HIGH), tl.arange(0, ROWS)
    row_G = o + g_G % BLOCK_O
    row_G = tl.where(row_G < outer, row_G, 0)
    matrix_G = (slot * 2 + g_G // BLOCK_O) if SWIGLU else slot + g_G * 0
    data_G, scale_G, zero_G = matrices_at(data, scales, zeros, matrix_G, row_G, outer, inner, KIND, GROUP, HEIGHT)
    sum_GR = packed_dot(
        data_G, scale_G, None if zeros is None else zero_G, x_PI + (first + r_R) * inner, r_R < rows, 0, inner, inner,
        KIND, GROUP, HIGH, ROWS, BLOCK_K, ASM, WHOLE,
    )  # fmt: skip
    if SWIGLU:
        gate_OR, up_OR = tl.split(tl.permute(tl.reshape(sum_GR, (2, BLOCK_O, ROWS)), (1, 2, 0)))
        sum_GR = gate_OR * tl.sigmoid(gate_OR) * up_OR
    o_O = o + tl.arange(0, BLOCK_O)
    stored_O = place_of(o_O, TURNED)
    places_RO = out_PO + (first + r_R)[:, None] * outer + stored_O[None, :]
    tl.store(places_RO, sum_GR.T.to(out_PO.dtype.element_ty), (r_R < rows)[:, None] & (o_O < outer)[None, :])


@triton.jit
def _unpack(
    data, scales, zeros, storage, out_SOK, outer, columns,
    STACKED: tl.constexpr, BLOCK_O: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    HEIGHT: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Some rows of one matrix as plain numbers."""
    WORD: tl.constexpr = 4 if KIND == 0 else 2
    GROUPS: tl.constexpr = BLOCK_K // GROUP if GROUP else 1
    slot, matrix = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside_O1 = (row_O < outer)[:, None]
    read_O = tl.where(row_O < outer, row_O, 0)
    place = slot
    if storage is not None:
        place = tl.load(storage + slot)
    matrix_O = place * STACKED + matrix + read_O * 0
    data_O, scale_O, zero_O = matrices_at(data, scales, zeros, matrix_O, read_O, outer, columns, KIND, GROUP, HEIGHT)
    out_O1 = (out_SOK + ((slot * STACKED + matrix) * outer + read_O) * columns)[:, None]
    DTYPE: tl.constexpr = out_SOK.dtype.element_ty
    words_OW1 = data_O[:, None] + tl.arange(0, BLOCK_K // WORD)[None, :]
    next_OW, group_G = tl.load(words_OW1, inside_O1, 0), tl.arange(0, GROUPS)  # a step before they are needed
    next_OG = tl.load(scale_O[:, None] + group_G[None, :])
    for k in range(0, columns, BLOCK_K):
        words_OW, at = next_OW, tl.minimum(k + BLOCK_K, columns - BLOCK_K)
        next_OW = tl.load(words_OW1 + tl.multiple_of(at // WORD, 16), inside_O1, 0)
        scale_OG = next_OG.to(tl.float32)
        next_OG = tl.load(scale_O[:, None] + group_G[None, :] + (at // GROUP if GROUP else 0))
        weights = weights_of(words_OW, KIND, DTYPE, ASM)
        w_OK = (in_order4(*weights) if KIND == 0 else tl.interleave(*weights)).to(tl.float32)
        w_OGK = tl.reshape(w_OK, (BLOCK_O, GROUPS, BLOCK_K // GROUPS))
        if zeros is not None:
            zero_OG = tl.load(zero_O[:, None] + group_G[None, :] + k // GROUP).to(tl.float32)
            w_OGK -= (zero_OG[:, :, None] - 8.0) / 128
        w_OGK *= (scale_OG * 128 if KIND == 0 else scale_OG)[:, :, None]
        w_OK = tl.reshape(w_OGK, (BLOCK_O, BLOCK_K)).to(DTYPE)
        tl.store(out_O1 + (k + tl.arange(0, BLOCK_K))[None, :], w_OK, inside_O1)
