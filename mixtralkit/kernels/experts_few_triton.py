"""The experts of a few rows at the speed of reading their weights once.

Two launches: ``h = weight · silu(w1 · x) * (w3 · x)`` for every choice, then ``Σ w2 · h`` with every choice of a row in
one accumulator, so that the weighted sum needs no third launch and no atomic addition. Only experts that a row chose
are read. One row goes through the ordinary cores, a program holding some rows of the weights; up to sixteen are one
side of the matrix units' product, whose other side is the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.kernels.runtime import overlaps_launches, tuned

BLOCK_R = 16  # rows of one product


def expert_sum_few(
    x_RD: torch.Tensor,
    slots_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    w13_SGD: torch.Tensor,
    w2_SDF: torch.Tensor,
    residual_RD: torch.Tensor | None = None,
    out_RD: torch.Tensor | None = None,
    settings: dict[str, int] | None = None,
) -> torch.Tensor:
    """``experts.expert_sum`` on a GPU for 1 to 16 rows.

    Args:
        settings: ``up_…`` of the first launch and ``down_…`` of the second (see ``default_settings``); None takes what
            was tuned for this GPU, else what is sane on any.
    """
    (rows, width), top_k, (slots, _, hidden) = x_RD.shape, slots_RK.shape[1], w2_SDF.shape
    assert 0 < rows <= BLOCK_R
    shape = {"slots": slots, "top_k": top_k, "width": width, "hidden": hidden}
    if settings is None:
        settings = tuned("experts_few", x_RD.device, rows, **shape)
    if settings is None or ("up_d" in settings) != (rows > 1):  # measured for the other way of multiplying
        settings = default_settings(rows, **shape)
    x_RD, slots_RK, weights_RK = x_RD.contiguous(), slots_RK.contiguous(), weights_RK.contiguous()
    assert w13_SGD.is_contiguous()
    assert w2_SDF.is_contiguous()
    assert residual_RD is None or residual_RD.is_contiguous()
    if out_RD is None:
        out_RD = torch.empty_like(x_RD)
    assert out_RD.is_contiguous()
    h_NF = x_RD.new_empty(rows * top_k, hidden)
    launch = _one_row if rows == 1 else _some_rows
    launch(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD, out_RD, h_NF, settings)
    return out_RD


def default_settings(rows: int, slots: int, top_k: int, width: int, hidden: int) -> dict[str, int]:
    """Settings that are sane on any GPU.

    ``f``, ``d``: rows or columns of weights in a tile by their dimension.
    """
    if rows == 1:
        return {
            "up_f": max(1, 8192 // triton.next_power_of_2(width)), "up_warps": 4,
            "down_d": 4, "down_f": min(2048, triton.next_power_of_2(hidden)), "down_warps": 4,
        }  # fmt: skip
    return {
        "up_f": 64, "up_d": 64, "up_warps": 4, "up_stages": 4,
        "down_d": 16, "down_f": 256, "down_warps": 2, "down_stages": 5,
    }  # fmt: skip


def candidates(rows: int, slots: int, top_k: int, width: int, hidden: int) -> list[dict[str, int]]:
    """Settings worth trying; each launch is varied around the other's default."""
    base = default_settings(rows, slots, top_k, width, hidden)
    if rows == 1:
        elements = triton.next_power_of_2(width)
        ups = [(f, warps) for f in (1, 2, 4, 8) for warps in (2, 4, 8) if 32 <= f * elements // (16 * warps) <= 256]
        found = [{**base, "up_f": f, "up_warps": warps} for f, warps in ups]
        downs = [(d, f, warps) for d in (2, 4, 8, 16) for f in (1024, 2048, 4096) for warps in (2, 4, 8)]
        found += [
            {**base, "down_d": d, "down_f": f, "down_warps": warps}
            for d, f, warps in downs
            if 32 <= d * f // (32 * warps) <= 128
        ]
        return found
    ups = [(32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 8, 4),
           (128, 64, 8, 4), (64, 64, 8, 6)]  # fmt: skip
    downs = [(16, 256, 2, 4), (16, 256, 4, 6), (16, 512, 4, 4), (32, 128, 2, 6), (32, 256, 4, 4), (32, 256, 4, 6),
             (32, 512, 4, 3), (16, 512, 2, 3)]  # fmt: skip
    found = [{**base, "up_f": f, "up_d": d, "up_warps": w, "up_stages": s} for f, d, w, s in ups]
    return found + [{**base, "down_d": d, "down_f": f, "down_warps": w, "down_stages": s} for d, f, w, s in downs]


def _one_row(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD, out_RD, h_NF, s: dict[str, int]) -> None:
    width, hidden, top_k = x_RD.shape[1], h_NF.shape[1], slots_RK.shape[1]
    overlaps = overlaps_launches(x_RD.device)
    more = {"TOP_K": top_k, "PDL": overlaps}
    launch = {"launch_pdl": True} if overlaps else {}
    _up_one_row[(triton.cdiv(hidden, s["up_f"]), top_k)](
        x_RD, slots_RK, weights_RK, w13_SGD, h_NF, width, hidden,
        BLOCK_F=s["up_f"], BLOCK_D=triton.next_power_of_2(width), **more, num_warps=s["up_warps"], **launch,
    )  # fmt: skip
    _down_one_row[(triton.cdiv(width, s["down_d"]),)](
        h_NF, slots_RK, w2_SDF, residual_RD, out_RD, width, hidden,
        BLOCK_D=s["down_d"], BLOCK_F=s["down_f"], WHOLE=hidden % s["down_f"] == 0,
        **more,
        num_warps=s["down_warps"], **launch,
    )  # fmt: skip


def _some_rows(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD, out_RD, h_NF, s: dict[str, int]) -> None:
    (rows, width), hidden, (slots, top_k) = x_RD.shape, h_NF.shape[1], (w13_SGD.shape[0], slots_RK.shape[1])
    overlaps = overlaps_launches(x_RD.device)
    more = {"TOP_K": top_k, "BLOCK_R": BLOCK_R, "PDL": overlaps}
    launch = {"launch_pdl": True} if overlaps else {}
    _up_some_rows[(triton.cdiv(hidden, s["up_f"]), slots)](
        x_RD, slots_RK, weights_RK, w13_SGD, h_NF, rows, width, hidden,
        BLOCK_F=s["up_f"], BLOCK_D=s["up_d"], WHOLE=width % s["up_d"] == 0 and hidden % s["up_f"] == 0, **more,
        num_warps=s["up_warps"], num_stages=s["up_stages"], **launch,
    )  # fmt: skip
    _down_some_rows[(triton.cdiv(width, s["down_d"]),)](
        h_NF, slots_RK, w2_SDF, residual_RD, out_RD, rows, width, hidden, slots,
        BLOCK_D=s["down_d"], BLOCK_F=s["down_f"], WHOLE=width % s["down_d"] == 0 and hidden % s["down_f"] == 0,
        **more, num_warps=s["down_warps"], num_stages=s["down_stages"], **launch,
    )  # fmt: skip


@triton.jit
def _up_one_row(
    x,
    slots,
    weights,
    w13,
    h,
    width,
    hidden,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[k, f] of one choice and some f; a program holds its rows of w1 and w3 whole."""
    k = tl.program_id(1)
    f_F, d_D = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    inside_F, inside_D = f_F < hidden, d_D < width
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots + k)
    if slot >= 0:
        x_D = tl.load(x + d_D, inside_D, 0.0).to(tl.float32)
        inside_FD = inside_F[:, None] & inside_D[None, :]
        w1 = w13 + slot * 2 * hidden * width + f_F.to(tl.int64)[:, None] * width + d_D[None, :]
        w1_FD = tl.load(w1, inside_FD, 0.0, eviction_policy="evict_first")
        w3_FD = tl.load(w1 + hidden.to(tl.int64) * width, inside_FD, 0.0, eviction_policy="evict_first")
        gate_F = tl.sum(w1_FD.to(tl.float32) * x_D[None, :], 1)
        up_F = tl.sum(w3_FD.to(tl.float32) * x_D[None, :], 1)
        h_F = tl.load(weights + k) * (gate_F * tl.sigmoid(gate_F) * up_F)
        tl.store(h + k * hidden + f_F, h_F.to(h.dtype.element_ty), inside_F)


@triton.jit
def _down_one_row(
    h,
    slots,
    w2,
    residual,
    out,
    width,
    hidden,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    WHOLE: tl.constexpr,
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[d] for some d: every choice and the whole hidden width in one accumulator."""
    d_D, f_F = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    inside_D = d_D < width
    row_D = tl.where(inside_D, d_D, 0).to(tl.int64) * hidden
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sum_DF = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slots + k)
        if slot >= 0:
            w2_D = w2 + slot * width * hidden + row_D
            for start in range(0, hidden, BLOCK_F):
                if WHOLE:
                    h_F = tl.load(h + k * hidden + start + f_F)
                    w2_DF = tl.load(w2_D[:, None] + (start + f_F)[None, :], eviction_policy="evict_first")
                else:
                    inside_F = start + f_F < hidden
                    h_F = tl.load(h + k * hidden + start + f_F, inside_F, 0.0)
                    w2_DF = tl.load(w2_D[:, None] + (start + f_F)[None, :], inside_F[None, :], 0.0)
                sum_DF += w2_DF.to(tl.float32) * h_F.to(tl.float32)[None, :]
    sum_D = tl.sum(sum_DF, 1)
    if residual is not None:
        sum_D += tl.load(residual + d_D, inside_D, 0.0).to(tl.float32)
    tl.store(out + d_D, sum_D.to(out.dtype.element_ty), inside_D)


@triton.jit
def _choice_of(slots, slot, rows, BLOCK_R: tl.constexpr, TOP_K: tl.constexpr):
    """Number r·K + k of each row's choice of ``slot``, -1 where it has none."""
    row_R = tl.arange(0, BLOCK_R)
    choice_R = tl.full([BLOCK_R], -1, tl.int32)
    for k in tl.static_range(TOP_K):
        chosen_R = tl.load(slots + row_R * TOP_K + k, row_R < rows, -1)
        choice_R = tl.where(chosen_R == slot, row_R * TOP_K + k, choice_R)
    return choice_R


@triton.jit
def _up_some_rows(
    x,
    slots,
    weights,
    w13,
    h,
    rows,
    width,
    hidden,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """h of every row that chose one slot, for some f; programs of slots that nobody chose end at once."""
    slot = tl.program_id(1).to(tl.int64)
    f_F, d_D, row_R = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    inside_F = f_F < hidden
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    choice_R = _choice_of(slots, slot, rows, BLOCK_R, TOP_K)
    if tl.max(choice_R, 0) >= 0:
        w1_F = w13 + slot * 2 * hidden * width + tl.where(inside_F, f_F, 0).to(tl.int64) * width
        w3_F = w1_F + hidden.to(tl.int64) * width
        x_R = x + tl.where(choice_R >= 0, row_R, 0) * width
        gate_FR = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
        up_FR = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)
        for start in range(0, width, BLOCK_D):
            if WHOLE:
                w1_FD = tl.load(w1_F[:, None] + (start + d_D)[None, :], eviction_policy="evict_first")
                w3_FD = tl.load(w3_F[:, None] + (start + d_D)[None, :], eviction_policy="evict_first")
                x_DR = tl.load(x_R[None, :] + (start + d_D)[:, None])
            else:
                inside_D = start + d_D < width
                w1_FD = tl.load(w1_F[:, None] + (start + d_D)[None, :], inside_D[None, :], 0.0)
                w3_FD = tl.load(w3_F[:, None] + (start + d_D)[None, :], inside_D[None, :], 0.0)
                x_DR = tl.load(x_R[None, :] + (start + d_D)[:, None], inside_D[:, None], 0.0)
            gate_FR = tl.dot(w1_FD, x_DR, gate_FR, input_precision="ieee")
            up_FR = tl.dot(w3_FD, x_DR, up_FR, input_precision="ieee")
        weight_R = tl.load(weights + choice_R, choice_R >= 0, 0.0)
        h_FR = gate_FR * tl.sigmoid(gate_FR) * up_FR * weight_R[None, :]
        places_FR = h + choice_R.to(tl.int64)[None, :] * hidden + f_F[:, None]
        tl.store(places_FR, h_FR.to(h.dtype.element_ty), inside_F[:, None] & (choice_R >= 0)[None, :])


@triton.jit
def _down_some_rows(
    h,
    slots,
    w2,
    residual,
    out,
    rows,
    width,
    hidden,
    num_slots,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    WHOLE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """out of all rows for some d: one slot after the other, each with its rows' h, into one accumulator."""
    d_D, f_F, row_R = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_R)
    inside_D = d_D < width
    row_D = tl.where(inside_D, d_D, 0).to(tl.int64) * hidden
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sum_DR = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    for slot in range(0, num_slots):
        choice_R = _choice_of(slots, slot, rows, BLOCK_R, TOP_K)
        if tl.max(choice_R, 0) >= 0:
            w2_D = w2 + slot * (width.to(tl.int64) * hidden) + row_D
            h_R = h + tl.where(choice_R >= 0, choice_R, 0) * hidden
            chose_R = choice_R >= 0
            for start in range(0, hidden, BLOCK_F):
                if WHOLE:
                    w2_DF = tl.load(w2_D[:, None] + (start + f_F)[None, :], eviction_policy="evict_first")
                    h_FR = tl.load(h_R[None, :] + (start + f_F)[:, None], chose_R[None, :], 0.0)
                else:
                    inside_F = start + f_F < hidden
                    w2_DF = tl.load(w2_D[:, None] + (start + f_F)[None, :], inside_F[None, :], 0.0)
                    h_FR = tl.load(h_R[None, :] + (start + f_F)[:, None], chose_R[None, :] & inside_F[:, None], 0.0)
                sum_DR = tl.dot(w2_DF, h_FR, sum_DR, input_precision="ieee")
    inside_DR = inside_D[:, None] & (row_R < rows)[None, :]
    places_DR = row_R[None, :] * width + d_D[:, None]
    if residual is not None:
        sum_DR += tl.load(residual + places_DR, inside_DR, 0.0).to(tl.float32)
    tl.store(out + places_DR, sum_DR.to(out.dtype.element_ty), inside_DR)
