"""Largest logits in Triton: a program takes a piece of a row, a second kernel brings a row's pieces together; and the
rules in front of that, a piece of a row a program as well."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.runtime import overlaps_launches
from mixtralkit.ops.sampling.types import Best, Rules

PIECE = 2048  # logits of one program, in its registers: 16 programs share a row of 32,000, so one row is read quickly


def best_of_rows(logits_NV: torch.Tensor, first_token: int = 0, piece: int = PIECE) -> Best:
    """``sampling.best_token`` on a GPU."""
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    rows, vocab = logits_NV.shape
    pieces = triton.cdiv(vocab, piece)
    values_WN = torch.empty((pieces, rows), dtype=torch.float32, device=logits_NV.device)
    tokens_WN = torch.empty((pieces, rows), dtype=torch.int64, device=logits_NV.device)
    logsumexp_WN = torch.empty_like(values_WN)
    overlaps = overlaps_launches(logits_NV.device)
    _piece_kernel[(rows, pieces)](
        logits_NV,
        values_WN,
        tokens_WN,
        logsumexp_WN,
        rows,
        vocab,
        logits_NV.stride(0),
        first_token,
        PIECE=piece,
        PDL=overlaps,
        num_warps=4,
        **({"launch_pdl": True} if overlaps else {}),
    )
    if pieces == 1:
        return Best(tokens_WN[0], values_WN[0], logsumexp_WN[0])
    return merge_parts(values_WN, tokens_WN, logsumexp_WN, relative=False)


def merge_parts(values_WN: torch.Tensor, tokens_WN: torch.Tensor, logsumexp_WN: torch.Tensor, relative: bool) -> Best:
    """``sampling.merge_best`` on a GPU; ``relative`` subtracts the log Σ exp from the values."""
    parts, rows = values_WN.shape
    values_N = torch.empty(rows, dtype=torch.float32, device=values_WN.device)
    tokens_N = torch.empty(rows, dtype=torch.int64, device=values_WN.device)
    logsumexp_N = torch.empty_like(values_N)
    overlaps = overlaps_launches(values_WN.device)
    block_n = 32
    _merge_kernel[(triton.cdiv(rows, block_n),)](
        *(x.contiguous() for x in (values_WN, tokens_WN, logsumexp_WN)),
        values_N,
        tokens_N,
        logsumexp_N,
        rows,
        parts,
        RELATIVE=relative,
        BLOCK_W=triton.next_power_of_2(parts),
        BLOCK_N=block_n,
        PDL=overlaps,
        num_warps=1,
        **({"launch_pdl": True} if overlaps else {}),
    )
    return Best(tokens_N, values_N, logsumexp_N)


def adjust_rows(
    logits_NV: torch.Tensor, rules: Rules, slots_N: torch.Tensor, positions_N: torch.Tensor, piece: int = PIECE
) -> torch.Tensor:
    """``sampling.adjust_logits`` on a GPU."""
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    rows, vocab = logits_NV.shape
    out_NV = torch.empty((rows, vocab), dtype=torch.float32, device=logits_NV.device)
    overlaps = overlaps_launches(logits_NV.device)
    _adjust_kernel[(rows, triton.cdiv(vocab, piece))](
        logits_NV,
        out_NV,
        *rules,
        slots_N,
        positions_N,
        vocab,
        logits_NV.stride(0),
        rules.bias_SV.shape[0],
        rules.allowed_SW.shape[1],
        PIECE=piece,
        PDL=overlaps,
        num_warps=4,
        **({"launch_pdl": True} if overlaps else {}),
    )
    return out_NV


@triton.jit
def _adjust_kernel(
    logits, out, asks, penalties, biases, counts, in_prompt, allowed, ends, free_from, slots, positions,
    vocab, stride, all_slots, words, PIECE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, v_V = tl.program_id(0).to(tl.int64), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside_V = v_V < vocab
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_V = tl.load(logits + row * stride + v_V, inside_V, 0.0)
    slot = tl.load(slots + row)
    slot = tl.where(slot < 0, all_slots - 1, slot)
    if tl.load(asks + slot):
        place_V = slot * vocab + v_V
        count_V = tl.load(counts + place_V, inside_V, 0)
        is_seen_V = (count_V > 0) | (tl.load(in_prompt + place_V, inside_V, 0) != 0)
        presence, frequency, repetition = (
            tl.load(penalties + slot * 3), tl.load(penalties + slot * 3 + 1), tl.load(penalties + slot * 3 + 2)
        )  # fmt: skip
        x_V += tl.load(biases + place_V, inside_V, 0.0)
        x_V = tl.where(is_seen_V, tl.where(x_V > 0, x_V / repetition, x_V * repetition), x_V)
        x_V = x_V - frequency * count_V.to(tl.float32) - tl.where(count_V > 0, presence, 0.0)
        word_V = tl.load(allowed + slot * words + v_V // 32, inside_V, 0)
        if tl.load(positions + row) + 1 < tl.load(free_from + slot):
            word_V = word_V & ~tl.load(ends + slot * words + v_V // 32, inside_V, 0)
        x_V = tl.where((word_V >> (v_V % 32)) & 1 == 1, x_V, -float("inf"))
    tl.store(out + row * vocab + v_V, x_V, inside_V)


@triton.jit(do_not_specialize=["rows", "first_token"])
def _piece_kernel(
    logits, values, tokens, logsumexps, rows, vocab, stride, first_token,
    PIECE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0), tl.program_id(1)
    v_V = piece * PIECE + tl.arange(0, PIECE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_V = tl.load(logits + row.to(tl.int64) * stride + v_V, v_V < vocab, -float("inf")).to(tl.float32)
    best = tl.max(x_V, 0)
    token = tl.min(tl.where((x_V == best) & (v_V < vocab), v_V, vocab - 1), 0)
    # A row of -inf has the sum 0 and the logarithm -inf; without this its differences would be NaN.
    base = tl.where(best == -float("inf"), 0.0, best)
    place = piece * rows + row
    tl.store(values + place, best)
    tl.store(tokens + place, token.to(tl.int64) + first_token)
    tl.store(logsumexps + place, base + tl.log(tl.sum(tl.exp(x_V - base), 0)))


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    values, tokens, logsumexps, out_values, out_tokens, out_logsumexps, rows, parts,
    RELATIVE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_W = tl.arange(0, BLOCK_W)
    place_WN = w_W[:, None] * rows + n_N[None, :]
    inside_WN = (w_W < parts)[:, None] & (n_N < rows)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value_WN = tl.load(values + place_WN, inside_WN, -float("inf"))
    token_WN = tl.load(tokens + place_WN, inside_WN, 0)
    logsumexp_WN = tl.load(logsumexps + place_WN, inside_WN, -float("inf"))
    best_N = tl.max(value_WN, 0)
    last_N = tl.max(token_WN, 0)  # where a value is NaN none equals it: then any token of the vocabulary does
    equal_WN = inside_WN & (value_WN == best_N[None, :])
    token_N = tl.min(tl.where(equal_WN, token_WN, last_N[None, :]), 0)
    highest_N = tl.max(logsumexp_WN, 0)
    base_N = tl.where(highest_N == -float("inf"), 0.0, highest_N)
    logsumexp_N = base_N + tl.log(tl.sum(tl.exp(logsumexp_WN - base_N[None, :]), 0))
    inside_N = n_N < rows
    tl.store(out_values + n_N, best_N - logsumexp_N if RELATIVE else best_N, inside_N)
    tl.store(out_tokens + n_N, token_N, inside_N)
    tl.store(out_logsumexps + n_N, logsumexp_N, inside_N)
