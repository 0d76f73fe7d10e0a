"""The experts of a small batch at the speed of reading their weights once.

Two launches: ``h = weight · silu(w1 · x) * (w3 · x)`` for every choice, then the sum over ``w2 · h``. A program of the
second takes some outputs and one expert, or a part of its columns, and leaves its part of the sum; the one that is last
to come for its outputs adds the parts, always in the same order, so that results do not vary from run to run. Only
experts that a row chose are read.

One row goes through the ordinary cores, a program holding its weights in registers; up to sixteen are one side of the
matrix units' product, whose other side is the weights.

The second launch starts while the first still runs. Before it waits it reads only weights, the slots and their places,
which were there before the first launch let it start: the first waits for what is in front of it before it does so.
Slots and places past L1 (.cg), which may hold what lay there when an earlier kernel read them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.runtime import overlaps_launches, tuned

BLOCK_R = 16  # rows of one product


def expert_sum_small(
    x_RD: torch.Tensor,
    slots_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    w13_SGD: torch.Tensor,
    w2_SDF: torch.Tensor,
    residual_RD: torch.Tensor | None = None,
    out_RD: torch.Tensor | None = None,
    storage_S: torch.Tensor | None = None,
    settings: dict[str, int] | None = None,
    likely_slots: int | None = None,
) -> torch.Tensor:
    """``experts.expert_sum`` on a GPU for 1 to 16 rows, each of which has no slot twice.

    Args:
        settings: ``up_…`` of the first launch and ``down_…`` of the second (see ``default_settings``); None takes what
            was tuned for this GPU, else what is sane on any.
    """
    (rows, width), top_k, hidden = x_RD.shape, slots_RK.shape[1], w2_SDF.shape[2]
    slots = len(w2_SDF if storage_S is None else storage_S)
    assert 0 < rows <= BLOCK_R
    if settings is None:
        shape = {"slots": likely_slots or slots, "top_k": top_k, "width": width, "hidden": hidden}
        settings = default_settings(rows, **shape, element_size=x_RD.element_size())
        found = tuned("experts_small", x_RD.device, rows, **shape)
        if found is not None and found.keys() == settings.keys():  # else measured for the other way of multiplying
            settings = found
    x_RD, slots_RK, weights_RK = x_RD.contiguous(), slots_RK.contiguous(), weights_RK.contiguous()
    assert w13_SGD.is_contiguous()
    assert w2_SDF.is_contiguous()
    assert residual_RD is None or residual_RD.is_contiguous()
    if out_RD is None:
        out_RD = torch.empty_like(x_RD)
    assert out_RD.is_contiguous()
    h_NF = x_RD.new_empty(rows * top_k, hidden)
    arrived_B = torch.empty(triton.cdiv(width, settings["down_d"]), dtype=torch.int32, device=x_RD.device)
    _launch_up(x_RD, slots_RK, weights_RK, w13_SGD, storage_S, h_NF, arrived_B, slots, settings)
    _launch_down(h_NF, slots_RK, w2_SDF, storage_S, residual_RD, arrived_B, out_RD, slots, settings)
    return out_RD


def default_settings(
    rows: int, slots: int, top_k: int, width: int, hidden: int, element_size: int = 2
) -> dict[str, int]:
    """Settings that are sane on any GPU.

    ``f``, ``d``: rows or columns of weights in a tile by their dimension. ``down_parts``: programs that share the
    columns of an expert.
    """
    if rows == 1:
        columns = min(1024 // element_size, max(triton.next_power_of_2(hidden), 8))
        return {
            "up_f": max(1, 4096 // triton.next_power_of_2(width)), "up_warps": 4,
            "down_d": 8, "down_f": columns, "down_parts": 1, "down_warps": 4,
        }  # fmt: skip
    columns = 256 // element_size
    return {
        "up_f": 32, "up_d": columns, "up_warps": 4, "up_stages": 4,
        "down_d": 64, "down_f": columns, "down_parts": 1, "down_warps": 4, "down_stages": 4,
    }  # fmt: skip


def candidates(rows: int, slots: int, top_k: int, width: int, hidden: int) -> list[dict[str, int]]:
    """Settings worth trying; each launch is varied around the other's default."""
    base = default_settings(rows, slots, top_k, width, hidden)
    if rows == 1:
        held = triton.next_power_of_2(width)
        ups = [(f, w) for f in (1, 2, 4) for w in (1, 2, 4, 8) if 32 <= f * held // (16 * w) <= 128]
        downs = [(8, 2048, 1, 4), (16, 1024, 1, 8), (4, 1024, 1, 4), (8, 1024, 1, 4), (8, 1024, 2, 4), (4, 2048, 1, 4),
                 (8, 512, 1, 2), (4, 1024, 1, 2), (8, 512, 1, 4), (4, 512, 1, 2)]  # fmt: skip
        found = [{**base, "up_f": f, "up_warps": w} for f, w in ups]
        return found + [{**base, "down_d": d, "down_f": f, "down_parts": p, "down_warps": w} for d, f, p, w in downs]
    ups = [(32, 128, 4, 4), (32, 128, 4, 5), (32, 128, 4, 3), (32, 64, 4, 8), (64, 128, 4, 3), (64, 128, 4, 6),
           (64, 128, 8, 3), (16, 128, 2, 5), (16, 256, 2, 4), (32, 64, 4, 6)]  # fmt: skip
    downs = [(64, 128, 1, 4, 5), (64, 128, 2, 4, 5), (64, 128, 1, 4, 3), (64, 128, 4, 4, 5), (64, 256, 1, 4, 3),
             (64, 256, 2, 4, 3), (64, 64, 1, 4, 8), (64, 64, 2, 4, 8), (32, 128, 1, 2, 5),
             (128, 64, 1, 4, 5)]  # fmt: skip
    found = [{**base, "up_f": f, "up_d": d, "up_warps": w, "up_stages": s} for f, d, w, s in ups]
    return found + [
        {**base, "down_d": d, "down_f": f, "down_parts": p, "down_warps": w, "down_stages": s}
        for d, f, p, w, s in downs
    ]


def _launch_up(x_RD, slots_RK, weights_RK, w13_SGD, storage_S, h_NF, arrived_B, slots: int, s: dict[str, int]) -> None:
    """h for every choice that has a slot; zeros in ``arrived_B``."""
    (rows, width), hidden, top_k = x_RD.shape, h_NF.shape[1], slots_RK.shape[1]
    tensors = (x_RD, slots_RK, weights_RK, w13_SGD, storage_S, h_NF, arrived_B, len(arrived_B))
    overlaps, blocks = overlaps_launches(x_RD.device), triton.cdiv(hidden, s["up_f"])
    more = {"COUNTERS": triton.next_power_of_2(width), "TOP_K": top_k, "PDL": overlaps, "num_warps": s["up_warps"]}
    more |= {"launch_pdl": True} if overlaps else {}
    if rows == 1:
        _up_one_row[(blocks, top_k)](
            *tensors, width, hidden, BLOCK_F=s["up_f"], BLOCK_D=triton.next_power_of_2(width), **more
        )
        return
    _up_some_rows[(blocks, slots)](
        *tensors, rows, width, hidden,
        BLOCK_F=s["up_f"], BLOCK_D=s["up_d"], WHOLE=width % s["up_d"] == 0 and hidden % s["up_f"] == 0,
        BLOCK_R=BLOCK_R, **more, num_stages=s["up_stages"],
    )  # fmt: skip


def _launch_down(
    h_NF, slots_RK, w2_SDF, storage_S, residual_RD, arrived_B, out_RD, slots: int, s: dict[str, int]
) -> None:
    (rows, width), hidden, top_k = out_RD.shape, h_NF.shape[1], slots_RK.shape[1]
    parts, steps = s["down_parts"], triton.cdiv(hidden, s["down_f"] * s["down_parts"])
    sums_NPD = torch.empty((rows * top_k, parts, width), dtype=torch.float32, device=h_NF.device)
    tensors = (h_NF, slots_RK, w2_SDF, storage_S, residual_RD, sums_NPD, arrived_B, out_RD)
    whole = width % s["down_d"] == 0 and hidden % (steps * parts * s["down_f"]) == 0
    blocks = {"PARTS": parts, "STEPS": steps, "BLOCK_D": s["down_d"], "BLOCK_F": s["down_f"], "WHOLE": whole}
    overlaps = overlaps_launches(h_NF.device)
    more = {**blocks, "TOP_K": top_k, "PDL": overlaps, "num_warps": s["down_warps"]}
    more |= {"launch_pdl": True} if overlaps else {}
    if rows == 1:
        _down_one_row[(len(arrived_B), top_k * parts)](*tensors, width, hidden, **more)
        return
    _down_some_rows[(len(arrived_B), slots * parts)](
        *tensors, rows, width, hidden, BLOCK_R=BLOCK_R, **more, num_stages=s["down_stages"]
    )


@triton.jit
def _up_one_row(
    x, slots, weights, w13, storage, h, arrived, counters, width, hidden,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, COUNTERS: tl.constexpr, TOP_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[k, f] of one choice and some f; a program holds its rows of w1 and w3 whole."""
    k = tl.program_id(1)
    f_F, d_D = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    inside_D = d_D < width
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + k)
    x_D = tl.load(x + d_D, inside_D, 0.0)
    weight = tl.load(weights + k)
    _start_counting(arrived, counters, COUNTERS)
    inside_F = f_F < tl.where(slot >= 0, hidden, 0)
    inside_FD = inside_F[:, None] & inside_D[None, :]
    if storage is not None:
        slot = tl.load(storage + slot, slot >= 0, 0)
    w1 = w13 + slot * 2 * hidden * width + f_F.to(tl.int64)[:, None] * width + d_D[None, :]
    w1_FD = tl.load(w1, inside_FD, 0.0, eviction_policy="evict_first")
    w3_FD = tl.load(w1 + hidden.to(tl.int64) * width, inside_FD, 0.0, eviction_policy="evict_first")
    x_D = x_D.to(tl.float32)
    gate_F = tl.sum(w1_FD.to(tl.float32) * x_D[None, :], 1)
    up_F = tl.sum(w3_FD.to(tl.float32) * x_D[None, :], 1)
    h_F = weight * (gate_F * tl.sigmoid(gate_F) * up_F)
    tl.store(h + k * hidden + f_F, h_F.to(h.dtype.element_ty), inside_F)


@triton.jit(do_not_specialize=["rows"])
def _up_some_rows(
    x, slots, weights, w13, storage, h, arrived, counters, rows, width, hidden,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, COUNTERS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h of every row that chose one slot, for some f; programs of slots that nobody chose end at once."""
    slot = tl.program_id(1).to(tl.int64)
    d_D, row_R = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    # the rows of w1 above those of w3 in one tile, for one product; rows past the end are the first, and not stored
    g_G = tl.arange(0, 2 * BLOCK_F)
    row_G = tl.program_id(0) * BLOCK_F + g_G % BLOCK_F
    row_G = tl.where(row_G < hidden, row_G, 0) + tl.where(g_G < BLOCK_F, 0, hidden)
    w13_G = w13 + slot * 2 * hidden * width + row_G.to(tl.int64) * width
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if storage is not None:
        w13_G += (tl.load(storage + slot) - slot) * 2 * hidden * width
    _start_counting(arrived, counters, COUNTERS)
    choice_R, _ = _choice_of(slots, slot, rows, BLOCK_R, TOP_K)
    chose_R = choice_R >= 0
    if tl.max(choice_R, 0) >= 0:
        x_R = x + tl.where(chose_R, row_R, 0) * width
        sum_GR = tl.zeros([2 * BLOCK_F, BLOCK_R], tl.float32)
        for start in range(0, width, BLOCK_D):
            if WHOLE:
                w13_GD = tl.load(w13_G[:, None] + (start + d_D)[None, :], eviction_policy="evict_first")
                x_DR = tl.load(x_R[None, :] + (start + d_D)[:, None], chose_R[None, :], 0.0)
            else:
                inside_D = start + d_D < width
                w13_GD = tl.load(w13_G[:, None] + (start + d_D)[None, :], inside_D[None, :], 0.0)
                x_DR = tl.load(x_R[None, :] + (start + d_D)[:, None], chose_R[None, :] & inside_D[:, None], 0.0)
            sum_GR = tl.dot(w13_GD, x_DR, sum_GR, input_precision="ieee")
        gate_FR, up_FR = tl.split(tl.permute(tl.reshape(sum_GR, (2, BLOCK_F, BLOCK_R)), (1, 2, 0)))
        weight_R = tl.load(weights + choice_R, chose_R, 0.0)
        h_FR = gate_FR * tl.sigmoid(gate_FR) * up_FR * weight_R[None, :]
        f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        places_FR = h + choice_R.to(tl.int64)[None, :] * hidden + f_F[:, None]
        tl.store(places_FR, h_FR.to(h.dtype.element_ty), (f_F < hidden)[:, None] & chose_R[None, :])


@triton.jit
def _down_one_row(
    h, slots, w2, storage, residual, sums, arrived, out, width, hidden,
    PARTS: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, WHOLE: tl.constexpr,
    TOP_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One choice's part of out[d] for some d. Weights are asked for a step before they are multiplied."""
    k, first = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS * STEPS * BLOCK_F
    d_D, f_F = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), first + tl.arange(0, BLOCK_F)
    inside_D = d_D < width
    slot, present = tl.load(slots + k, cache_modifier=".cg"), 0
    for choice in tl.static_range(TOP_K):
        present += tl.where(tl.load(slots + choice, cache_modifier=".cg") >= 0, 1 << choice, 0)
    columns = tl.where(slot >= 0, hidden, 0)
    if storage is not None:
        slot = tl.load(storage + slot, slot >= 0, 0, cache_modifier=".cg")
    places_DF = w2 + (slot * width + tl.where(inside_D, d_D, 0))[:, None] * hidden + f_F[None, :]
    inside_DF = inside_D[:, None] & (f_F < columns)[None, :]
    w2_DF = tl.load(places_DF, inside_DF, 0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sum_DX = tl.zeros([BLOCK_D, BLOCK_F // 8], tl.float32)  # a number for the eight that a thread loads at once
    for step in range(STEPS):
        h_F = tl.load(h + k * hidden + f_F, f_F < columns, 0.0).to(tl.float32)
        f_F += BLOCK_F
        places_DF += BLOCK_F
        if WHOLE:
            more_DF = inside_DF & (step + 1 < STEPS)
        else:
            more_DF = inside_D[:, None] & (f_F < tl.where(step + 1 < STEPS, columns, 0))[None, :]
        next_DF = tl.load(places_DF, more_DF, 0.0, eviction_policy="evict_first")
        sum_DX += tl.sum(tl.reshape(w2_DF.to(tl.float32) * h_F[None, :], [BLOCK_D, BLOCK_F // 8, 8]), 2)
        w2_DF = next_DF
    tl.store(sums + tl.program_id(1) * width + d_D, tl.sum(sum_DX, 1), inside_D)
    if residual is not None:
        residual_D = tl.load(residual + d_D, inside_D, 0.0)  # while this program's part is still on its way
    if _is_last(arrived + tl.program_id(0), TOP_K * PARTS):
        sum_D = tl.zeros([BLOCK_D], tl.float32)
        for choice in tl.static_range(TOP_K):
            here_D = d_D < tl.where((present >> choice) & 1 == 1, width, 0)
            for part in tl.static_range(PARTS):
                sum_D += tl.load(sums + (choice * PARTS + part) * width + d_D, here_D, 0.0, cache_modifier=".cg")
        if residual is not None:
            sum_D += residual_D.to(tl.float32)
        tl.store(out + d_D, sum_D.to(out.dtype.element_ty), inside_D)


@triton.jit(do_not_specialize=["rows"])
def _down_some_rows(
    h, slots, w2, storage, residual, sums, arrived, out, rows, width, hidden,
    PARTS: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, WHOLE: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One slot's part of out[d] of the rows that chose it, for some d."""
    slot, part = (tl.program_id(1) // PARTS).to(tl.int64), tl.program_id(1) % PARTS
    d_D, f_F = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    inside_D, first = d_D < width, part * STEPS * BLOCK_F
    w2_D = w2 + (slot * width + tl.where(inside_D, d_D, 0)) * hidden
    if storage is not None:
        w2_D += (tl.load(storage + slot, cache_modifier=".cg") - slot) * width * hidden
    choice_R, present_R = _choice_of(slots, slot, rows, BLOCK_R, TOP_K)
    chose_R = choice_R >= 0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if tl.max(choice_R, 0) >= 0:
        h_R = h + tl.where(chose_R, choice_R, 0).to(tl.int64) * hidden
        sum_DR = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
        for start in range(first, first + STEPS * BLOCK_F, BLOCK_F):
            if WHOLE:
                w2_DF = tl.load(w2_D[:, None] + (start + f_F)[None, :], eviction_policy="evict_first")
                h_FR = tl.load(h_R[None, :] + (start + f_F)[:, None], chose_R[None, :], 0.0)
            else:
                inside_F = start + f_F < hidden
                w2_DF = tl.load(w2_D[:, None] + (start + f_F)[None, :], inside_F[None, :], 0.0)
                h_FR = tl.load(h_R[None, :] + (start + f_F)[:, None], chose_R[None, :] & inside_F[:, None], 0.0)
            sum_DR = tl.dot(w2_DF, h_FR, sum_DR, input_precision="ieee")
        places_DR = sums + (choice_R * PARTS + part)[None, :] * width + d_D[:, None]
        tl.store(places_DR, sum_DR, inside_D[:, None] & chose_R[None, :])
    _add_parts(sums, residual, arrived, out, present_R, rows, width, d_D, inside_D, PARTS, BLOCK_D, TOP_K, BLOCK_R)


@triton.jit
def _add_parts(
    sums, residual, arrived, out, present_R, rows, width, d_D, inside_D,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, TOP_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The program that is last to come for some outputs adds the parts of them, and the residual."""
    row_R = tl.arange(0, BLOCK_R)
    inside_RD, outputs_RD = (row_R < rows)[:, None] & inside_D[None, :], row_R[:, None] * width + d_D[None, :]
    if residual is not None:
        residual_RD = tl.load(residual + outputs_RD, inside_RD, 0.0)  # while this program's part is still on its way
    if _is_last(arrived + tl.program_id(0), tl.num_programs(1)):
        sum_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for k in tl.static_range(TOP_K):
            here_R = (present_R >> k) & 1 == 1
            for p in tl.static_range(PARTS):
                places_RD = sums + ((row_R * TOP_K + k) * PARTS + p)[:, None] * width + d_D[None, :]
                sum_RD += tl.load(places_RD, here_R[:, None] & inside_D[None, :], 0.0, cache_modifier=".cg")
        if residual is not None:
            sum_RD += residual_RD.to(tl.float32)
        tl.store(out + outputs_RD, sum_RD.to(out.dtype.element_ty), inside_RD)


@triton.jit
def _choice_of(slots, slot, rows, BLOCK_R: tl.constexpr, TOP_K: tl.constexpr):
    """Number r·K + k of each row's choice of ``slot``, -1 where it has none; bit k is set where choice k has a slot."""
    row_R = tl.arange(0, BLOCK_R)
    choice_R, present_R = tl.full([BLOCK_R], -1, tl.int32), tl.zeros([BLOCK_R], tl.int32)
    for k in tl.static_range(TOP_K):
        chosen_R = tl.load(slots + row_R * TOP_K + k, row_R < rows, -1, cache_modifier=".cg")
        choice_R = tl.where(chosen_R == slot, row_R * TOP_K + k, choice_R)
        present_R += tl.where(chosen_R >= 0, 1 << k, 0)
    return choice_R, present_R


@triton.jit
def _start_counting(arrived, counters, COUNTERS: tl.constexpr):
    """The first program of the first launch sets the counters of the second to zero."""
    if tl.program_id(0) + tl.program_id(1) == 0:
        counter = tl.arange(0, COUNTERS)
        tl.store(arrived + counter, 0, counter < counters)


@triton.jit
def _is_last(counter, programs):
    """Whether all other programs have called this before; what they had stored is then there to read, past L1."""
    tl.debug_barrier()  # one thread counts for all of the program: their stores come before
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
