"""The cut in Triton: every choice counts who stands before it in its expert's line.

A choice keeps its place if fewer choices of its expert are worth more, or as much and come earlier, than the expert
takes. So a program compares a block of choices with all others: T·K choices make (T·K)² comparisons, which for the rows
of a step (some thousand choices) is less than one launch takes, and for 16,384 rows of two choices 1% of what their
experts take.

``reroute`` goes round after round, one launch each: all rows with an open choice are offered their next-best expert;
the same comparison says who finds room. What a round needs of other rows (the offer, what the open choice is worth, the
room of each expert) was written by the launch before, in the other of two turns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.capacity.types import Cut
from mixtralkit.planning.capacity import CapacityRule

BLOCK, STEP = 64, 128  # choices or rows of a program, and how many it compares them with at a time


def cut_rows(
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    local_E: torch.Tensor,
    rule: CapacityRule,
    valid_T: torch.Tensor | None = None,
) -> Cut:
    """``cut_to_capacity`` on a GPU: one launch and one that clears two counters, 1 + E - K more where it reroutes."""
    (rows, top_k), num_experts, device = experts_TK.shape, len(local_E), experts_TK.device
    experts_TK, weights_TK, logits_TE = experts_TK.contiguous(), weights_TK.contiguous(), logits_TE.contiguous()
    cut_TK, kept_TK = torch.empty_like(experts_TK), torch.empty_like(weights_TK)
    counts_2 = torch.zeros(2, dtype=torch.int64, device=device)
    shared = (experts_TK, weights_TK, valid_T, local_E.view(torch.uint8), cut_TK, kept_TK, counts_2)
    sizes = {"TOP_K": top_k, "EXPERTS": num_experts, "BLOCK": BLOCK, "STEP": STEP, "BY_WEIGHT": rule.by_weight}
    limits = {"FACTOR": rule.factor, "PERCENT": rule.percent}
    programs = triton.cdiv(rows * top_k, BLOCK)
    _cut[(programs,)](*shared, rows * top_k, **sizes, **limits)
    if rule.reroutes:
        state = (2 * num_experts, 2 * rows, rows, 2 * rows)  # room and offers in two turns, each row's offer, worth
        *numbers, worth_2T = torch.empty(sum(state), dtype=torch.int32, device=device).split(state)
        programs = triton.cdiv(rows, BLOCK)
        pads = {"E_PAD": triton.next_power_of_2(num_experts), "K_PAD": triton.next_power_of_2(top_k)}
        for place in range(top_k - 1, num_experts):
            last = place + 1 == num_experts
            _round[(programs + (0 if last else num_experts),)](
                *shared, logits_TE, *numbers, worth_2T.view(torch.float32), rows, place % 2,
                FIRST=place < top_k, LAST=last, **sizes, **limits, **pads,
            )  # fmt: skip
    return Cut(cut_TK, kept_TK, *counts_2.unbind())


@triton.jit
def _valid(valid_T, row, inside):
    """Of rows ``row``, which are inside and carry a sequence."""
    if valid_T is not None:
        inside = inside & (tl.load(valid_T + row, inside, -1) >= 0)
    return inside


@triton.jit
def _capacity(choices, FACTOR: tl.constexpr, PERCENT: tl.constexpr, EXPERTS: tl.constexpr):
    """``CapacityRule.capacity`` in float64, so that it is the same number."""
    share = choices.to(tl.float64) * tl.full((), FACTOR, tl.float64) / tl.full((), EXPERTS, tl.float64)
    return (tl.ceil(share) * tl.full((), PERCENT, tl.float64)).to(tl.int32)


@triton.jit
def _ahead(key, worth, number, keys, worths, numbers):
    """How many of a step stand before each of a block: of the same key, and worth more or as much and earlier."""
    same = keys[None, :] == key[:, None]
    more = worths[None, :] > worth[:, None]
    earlier = (worths[None, :] == worth[:, None]) & (numbers[None, :] < number[:, None])
    return tl.sum((same & (more | earlier)).to(tl.int32), 1)


@triton.jit(do_not_specialize=["choices"])
def _cut(
    experts_N, weights_N, valid_T, local_E, cut_N, kept_N, counts_2, choices,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BY_WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr, PERCENT: tl.constexpr,
):  # fmt: skip
    """A block of choices a program: those over the capacity become -1, of weight zero."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < choices
    valid = _valid(valid_T, n // TOP_K, inside)
    expert, weight = tl.load(experts_N + n, valid, -1), tl.load(weights_N + n, valid, 0.0)
    worth = weight
    if not BY_WEIGHT:
        worth = tl.zeros([BLOCK], tl.float32)
    before, real = tl.zeros([BLOCK], tl.int32), tl.zeros([STEP], tl.int32)
    for start in range(0, choices, STEP):
        m = start + tl.arange(0, STEP)
        others = _valid(valid_T, m // TOP_K, m < choices)
        worths = tl.zeros([STEP], tl.float32)
        if BY_WEIGHT:
            worths = tl.load(weights_N + m, others, 0.0)
        before += _ahead(expert, worth, n, tl.load(experts_N + m, others, -2), worths, m)
        real += others.to(tl.int32)
    cold = valid & (tl.load(local_E + expert, valid, 1) == 0)
    over = cold & (before >= _capacity(tl.sum(real, 0), FACTOR, PERCENT, EXPERTS))
    keeps = valid & (over == 0)
    tl.store(cut_N + n, tl.where(keeps, expert, -1), inside)
    tl.store(kept_N + n, tl.where(keeps, weight, 0.0), inside)
    tl.atomic_add(counts_2, tl.sum(over.to(tl.int64), 0))


@triton.jit(do_not_specialize=["rows", "turn"])
def _round(
    experts_TK, weights_TK, valid_T, local_E, cut_TK, kept_TK, counts_2, logits_TE,
    room_2E, offer_2T, next_T, worth_2T, rows, turn,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BY_WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr, PERCENT: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Takes the offers of the launch before and makes the next; a block of rows a program, then one for each expert's
    room. The first takes none, the last makes none and gives rows that lost a choice their new weights. Turn ``turn``
    is read, the other written.
    """
    program, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK)
    offers, worths, rooms = offer_2T + turn * rows, worth_2T + turn * rows, room_2E + turn * EXPERTS
    to = 1 - turn
    if program >= blocks:
        expert = program - blocks
        if FIRST:
            left = _room_left(experts_TK, valid_T, expert, rows * TOP_K, FACTOR, PERCENT, EXPERTS, TOP_K, STEP)
        else:
            room = tl.load(rooms + expert)
            left = room - tl.minimum(_count(offers, None, expert, rows, 1, STEP)[0], room)
        tl.store(room_2E + to * EXPERTS + expert, left)
    else:
        row = program * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        at = row.to(tl.int64) * TOP_K
        valid = _valid(valid_T, row, inside)
        k_K = tl.arange(0, K_PAD)[None, :]
        real_BK = valid[:, None] & (k_K < TOP_K)
        chosen_BK = tl.load(cut_TK + at[:, None] + k_K, real_BK, 0)
        if not FIRST:
            offer = tl.load(offers + row, inside, -1)
            worth = tl.load(worths + row, inside, 0.0)
            before = tl.zeros([BLOCK], tl.int32)
            for start in range(0, rows, STEP):
                m = start + tl.arange(0, STEP)
                others = tl.load(worths + m, m < rows, 0.0)
                before += _ahead(offer, worth, row, tl.load(offers + m, m < rows, -2), others, m)
            wants = offer >= 0
            asked = tl.where(wants, offer, 0)
            takes = wants & ((before < tl.load(rooms + asked)) | (tl.load(local_E + asked) != 0))
            first_BK = k_K == _first_open(chosen_BK, real_BK, k_K, K_PAD)[:, None]
            chosen_BK = tl.where(takes[:, None] & first_BK, offer[:, None].to(tl.int64), chosen_BK)
            tl.store(cut_TK + at[:, None] + k_K, chosen_BK, real_BK)
            found = tl.sum(takes.to(tl.int64), 0)
            tl.atomic_add(counts_2, -found)
            tl.atomic_add(counts_2 + 1, found)
        wanted_BK = tl.load(experts_TK + at[:, None] + k_K, real_BK, 0)
        if LAST:
            logit_BK = tl.load(
                logits_TE + row.to(tl.int64)[:, None] * EXPERTS + chosen_BK, real_BK & (chosen_BK >= 0), -float("inf")
            )
            moved = tl.max((real_BK & (chosen_BK != wanted_BK)).to(tl.int32), 1) > 0
            top = tl.max(logit_BK, 1)
            share_BK = tl.exp(logit_BK - tl.where(top > -float("inf"), top, 0.0)[:, None])
            total = tl.sum(share_BK, 1)
            share_BK /= tl.where(total > 0, total, 1.0)[:, None]
            tl.store(kept_TK + at[:, None] + k_K, share_BK, real_BK & moved[:, None])
        else:
            # every row goes to its next-best expert, whether it wants one or not
            logits_B1 = logits_TE + row.to(tl.int64)[:, None] * EXPERTS
            e_E = tl.arange(0, E_PAD)[None, :]
            left_BE = inside[:, None] & (e_E < EXPERTS)
            logit_BE = tl.load(logits_B1 + e_E, left_BE, 0.0)
            for k in tl.static_range(TOP_K):
                left_BE &= e_E != tl.load(experts_TK + at + k, inside, -1)[:, None]
            if not FIRST:
                had_B1 = tl.load(next_T + row, inside, 0)[:, None]
                had_logit_B1 = tl.load(logits_B1 + had_B1, inside[:, None], 0.0)
                left_BE &= (logit_BE < had_logit_B1) | ((logit_BE == had_logit_B1) & (e_E > had_B1))
            best = tl.max(tl.where(left_BE, logit_BE, -float("inf")), 1)
            best = tl.min(tl.where(left_BE & (logit_BE == best[:, None]), e_E, E_PAD), 1)
            hole = _first_open(chosen_BK, real_BK, k_K, K_PAD)
            wants = valid & (hole < K_PAD)
            worth = tl.zeros([BLOCK], tl.float32)
            if BY_WEIGHT:
                worth = tl.load(weights_TK + at + hole, wants, 0.0)
            tl.store(next_T + row, best, inside)
            tl.store(offer_2T + to * rows + row, tl.where(wants, best, -1), inside)
            tl.store(worth_2T + to * rows + row, worth, inside)


@triton.jit
def _count(experts_N, valid_T, expert, choices, TOP_K: tl.constexpr, STEP: tl.constexpr):
    """(choices of one expert, valid choices)."""
    found, real = tl.zeros([STEP], tl.int32), tl.zeros([STEP], tl.int32)
    for start in range(0, choices, STEP):
        m = start + tl.arange(0, STEP)
        valid = _valid(valid_T, m // TOP_K, m < choices)
        found += (tl.load(experts_N + m, valid, -1) == expert).to(tl.int32)
        real += valid.to(tl.int32)
    return tl.sum(found, 0), tl.sum(real, 0)


@triton.jit
def _room_left(
    experts_TK, valid_T, expert, choices, FACTOR: tl.constexpr, PERCENT: tl.constexpr, EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of a cold expert after the cut."""
    found, real = _count(experts_TK, valid_T, expert, choices, TOP_K, STEP)
    room = _capacity(real, FACTOR, PERCENT, EXPERTS)
    return room - tl.minimum(found, room)


@triton.jit
def _first_open(chosen_BK, real_BK, k_K, K_PAD: tl.constexpr):
    """Of each row the first choice that was cut, K_PAD where none is."""
    return tl.min(tl.where(real_BK & (chosen_BK < 0), k_K, K_PAD), 1)
