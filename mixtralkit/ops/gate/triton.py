"""The gate in Triton: programs that hold its weights take row after row, norm included; where there are very many rows,
or many and too many experts to hold, blocks of rows on the matrix units."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.gate.types import Gated
from mixtralkit.ops.norm import rms_norm
from mixtralkit.ops.norm.triton import normalised
from mixtralkit.ops.runtime import multiprocessors, overlaps_launches

HELD = 32768  # elements of the gate's matrix that a program holds at a time: one program a multiprocessor
MOST_HELD = 8192  # rows up to which programs that hold all of it beat blocks of rows and a norm before them (H200)
MOST_SINGLE = 512  # the same where it has to be read again for every row


def gate_rows(
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    top_k: int,
    norm: tuple[torch.Tensor, float] | None = None,
    most_single: int | None = None,
) -> Gated:
    """``gate.gate`` on a GPU, for at least one row; in blocks where there are more than ``most_single`` rows.

    None means ``MOST_HELD`` where a program can hold the gate's matrix, else ``MOST_SINGLE``.
    """
    (rows, dim), experts = x_TD.shape, gate_ED.shape[0]
    x_TD, gate_ED = x_TD.contiguous(), gate_ED.contiguous()
    like = {"device": x_TD.device}
    gated = Gated(
        torch.empty(rows, top_k, dtype=torch.int64, **like),
        torch.empty(rows, top_k, dtype=torch.float32, **like),
        torch.empty(rows, experts, dtype=torch.float32, **like),
        x_TD if norm is None else torch.empty_like(x_TD),
    )
    overlaps = overlaps_launches(x_TD.device)
    launch = {"launch_pdl": True} if overlaps else {}
    sizes = {"TOP_K": top_k, "BLOCK_K": triton.next_power_of_2(top_k), "PDL": overlaps}
    block_d, block_e = triton.next_power_of_2(dim), triton.next_power_of_2(experts)
    held = block_d * block_e <= HELD
    if most_single is None:
        most_single = MOST_HELD if held else MOST_SINGLE
    if rows > most_single:
        if norm is not None:
            gated = gated._replace(normed_TD=rms_norm(x_TD, *norm))
        _gate_blocks[(triton.cdiv(rows, 16),)](
            gated.normed_TD, gate_ED, gated.experts_TK, gated.weights_TK, gated.logits_TE, rows, dim, experts,
            BLOCK_T=16, BLOCK_E=max(16, triton.next_power_of_2(experts)), BLOCK_D=64, **sizes,
            num_warps=4, num_stages=4, **launch,
        )  # fmt: skip
        return gated
    weight_D, eps = (None, 0.0) if norm is None else norm
    _gate_row[(min(rows, multiprocessors(x_TD.device)) if held else rows,)](
        x_TD, weight_D, gate_ED, gated.experts_TK, gated.weights_TK, gated.logits_TE, gated.normed_TD,
        rows, dim, experts, eps,
        BLOCK_D=block_d, BLOCK_E=block_e, STRIP_E=max(1, min(block_e, HELD // block_d)), **sizes,
        num_warps=8 if block_d >= 2048 else 4, **launch,
    )  # fmt: skip
    return gated


@triton.jit(do_not_specialize=["rows"])
def _gate_row(
    x, norm_weight, gate, experts_out, weights_out, logits_out, normed, rows, dim, experts, eps,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, STRIP_E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every n-th row: the whole row, the next one asked for, and a strip of experts at a time, the first strip asked
    for before the wait."""
    d_D, e_E, e_S = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, STRIP_E)
    inside_D, inside_E = d_D < dim, e_E < experts
    places_SD = gate + e_S[:, None] * dim + d_D[None, :]
    first_SD = tl.load(places_SD, (e_S < experts)[:, None] & inside_D[None, :], 0.0)
    if norm_weight is not None:
        norm_weight_D = tl.load(norm_weight + d_D, inside_D, 0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    next_D = tl.load(x + row * dim + d_D, inside_D, 0.0)
    for _ in range(tl.program_id(0), rows, tl.num_programs(0)):
        x_D, following = next_D, row + tl.num_programs(0)
        next_D = tl.load(x + following * dim + d_D, d_D < tl.where(following < rows, dim, 0), 0.0)
        if norm_weight is not None:
            x_D = normalised(x_D, norm_weight_D, dim, eps)
            tl.store(normed + row * dim + d_D, x_D, inside_D)
        logits_E = tl.full([BLOCK_E], float("-inf"), tl.float32)
        for strip in tl.static_range(BLOCK_E // STRIP_E):
            gate_SD = first_SD
            if strip > 0:
                inside_S = strip * STRIP_E + e_S < experts
                gate_SD = tl.load(places_SD + strip * STRIP_E * dim, inside_S[:, None] & inside_D[None, :], 0.0)
            logits_S = tl.sum(gate_SD.to(tl.float32) * x_D.to(tl.float32)[None, :], 1)
            if BLOCK_E == STRIP_E:
                logits_E = logits_S
            else:  # put the strip at its place
                here_ES = e_E[:, None] == strip * STRIP_E + e_S[None, :]
                logits_E = tl.maximum(logits_E, tl.max(tl.where(here_ES, logits_S[None, :], float("-inf")), 1))
        tl.store(logits_out + row * experts + e_E, logits_E, inside_E)
        left_TE = tl.where(inside_E, logits_E, float("-inf"))[None, :]
        _choose(left_TE, row + tl.arange(0, 1), row + 1, experts_out, weights_out, TOP_K, BLOCK_K, BLOCK_E)
        row = following


@triton.jit
def _gate_blocks(
    x, gate, experts_out, weights_out, logits_out, rows, dim, experts,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some rows a program, all experts' logits at once on the matrix units."""
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E, d_D = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    inside_T, inside_E = row_T < rows, e_E < experts
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    logits_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, dim, BLOCK_D):
        inside_D = start + d_D < dim
        x_TD = tl.load(x + row_T[:, None] * dim + start + d_D[None, :], inside_T[:, None] & inside_D[None, :], 0.0)
        gate_DE = tl.load(gate + e_E[None, :] * dim + start + d_D[:, None], inside_E[None, :] & inside_D[:, None], 0.0)
        logits_TE = tl.dot(x_TD, gate_DE, logits_TE, input_precision="ieee")
    tl.store(logits_out + row_T[:, None] * experts + e_E[None, :], logits_TE, inside_T[:, None] & inside_E[None, :])
    left_TE = tl.where(inside_E[None, :], logits_TE, float("-inf"))
    _choose(left_TE, row_T, rows, experts_out, weights_out, TOP_K, BLOCK_K, BLOCK_E)


@triton.jit
def _choose(
    left_TE, row_T, rows, experts_out, weights_out, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Stores the ``TOP_K`` largest, ties to the lower id, and the softmax over those. NaN counts as -inf.

    Ids always differ and exist, whatever the logits: the kernels that follow read weights by them.
    """
    e_E, k_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    score_TE = tl.where(left_TE == left_TE, left_TE, float("-inf"))
    free_TE = (e_E >= 0)[None, :] & (row_T >= 0)[:, None]
    experts_TK = row_T[:, None] * 0 + k_K[None, :] * 0
    chosen_TK = tl.zeros(experts_TK.shape, tl.float32) + float("-inf")
    for k in tl.static_range(TOP_K):
        score_T = tl.max(tl.where(free_TE, score_TE, float("-inf")), 1)
        expert_T = tl.min(tl.where(free_TE & (score_TE == score_T[:, None]), e_E[None, :], BLOCK_E), 1)
        free_TE = free_TE & (e_E[None, :] != expert_T[:, None])
        logit_T = tl.sum(tl.where(e_E[None, :] == expert_T[:, None], left_TE, 0.0), 1)
        experts_TK = tl.where(k_K[None, :] == k, expert_T[:, None].to(tl.int64), experts_TK)
        chosen_TK = tl.where(k_K[None, :] == k, logit_T[:, None], chosen_TK)
    share_TK = tl.exp(chosen_TK - tl.max(chosen_TK, 1)[:, None])
    places_TK, inside_TK = row_T[:, None] * TOP_K + k_K[None, :], (row_T < rows)[:, None] & (k_K < TOP_K)[None, :]
    tl.store(experts_out + places_TK, experts_TK, inside_TK)
    tl.store(weights_out + places_TK, share_TK / tl.sum(share_TK, 1)[:, None], inside_TK)
