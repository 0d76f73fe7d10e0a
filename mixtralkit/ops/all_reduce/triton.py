"""The sums of ``all_reduce``: ranks write rows into each other's memory and wait for rows, not for flags.

The memory is all ``-0.0`` between calls and no rank ever sends a ``-0.0`` (it sends ``0.0``), so an element that is
not ``-0.0`` has arrived: no flags, no fences, nothing asked for and then answered. Loads that wait are volatile, past
the first-level cache; every element is looked at by itself, so it does not matter in which order or in what pieces a
row arrives.

One trip (small batches): each rank sends its part of every row to all others, and all add the parts of all rows.
Two trips (large ones): row t belongs to rank t mod W. Ranks send their parts to the row's owner; it adds them and the
residual and sends the finished row to all others. 2·(W-1)/W of the rows cross a rank's links instead of W-1 times them.

**Why memory may be written again.** A row's places alternate between two turns, counted for each row (and number of
trips) in device memory, so that it does not matter which graphs are replayed. The program that read a place empties it
at once. Rank p writes into rank r's place of use k again in use k+2 of the row. Then p has finished use k+1, for which
it needed something that depends on r's part of use k+1: the part itself, or the sum that the owner made of all parts.
And r sent that part from a kernel that started its work after r's kernel of use k had ended, emptying included: stream
order, or ``gdc_wait`` where launches overlap. So r's place is empty before p writes.

**Why no rank waits for ever.** Programs start in the order of their numbers. In one trip a program sends before it
waits, and waits only for the same program of other ranks: every rank runs the lowest unfinished one. In two trips
programs that send parts come first and wait for nothing; programs that add wait for them alone, and programs that take
finished rows wait for programs that add, which come before them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.all_reduce.types import EMPTY_WORDS, ONE_TRIP_ROWS, ReducerMemory
from mixtralkit.ops.norm.triton import normalised
from mixtralkit.ops.runtime import overlaps_launches

TWO_TRIPS_BYTES = 2**18  # of the rows; up to here the second trip takes longer than the bytes it saves
LAG = 64  # finished rows are taken this many groups of W rows after their parts are added, when they have arrived


@triton.jit
def _sendable(values, WORD: tl.constexpr, EMPTY: tl.constexpr):
    """The values' bits, with 0.0 for -0.0, which means that nothing has arrived."""
    bits = values.to(WORD, bitcast=True)
    return tl.where(bits == EMPTY, 0, bits).to(WORD)


@triton.jit
def _receive(places, stride, own, inside, SHEETS: tl.constexpr, SKIP: tl.constexpr, EMPTY: tl.constexpr):
    """Waits until one row of each sheet is there and empties it; ``own`` stands for sheet ``SKIP``. A tuple of bits."""
    rows = ()
    for _ in tl.static_range(SHEETS):
        rows = rows + (own,)  # noqa: RUF005, the compiler knows no (*rows, own)
    missing = 1
    while missing != 0:
        arrived = ()
        absent = tl.zeros(own.shape, tl.int32)
        for sheet in tl.static_range(SHEETS):
            row = own
            if sheet != SKIP:
                row = tl.load(places + sheet * stride, mask=inside, other=0, volatile=True)
                absent |= (row == EMPTY).to(tl.int32)
            arrived = arrived + (row,)  # noqa: RUF005
        rows = arrived
        missing = tl.max(absent)
    for sheet in tl.static_range(SHEETS):
        if sheet != SKIP:
            tl.store(places + sheet * stride, tl.full(own.shape, EMPTY, own.dtype), mask=inside)
    return rows


@triton.jit
def _add_in_order(rows, residual, SHEETS: tl.constexpr):
    total = rows[0].to(residual.dtype, bitcast=True).to(tl.float32)
    for sheet in tl.static_range(1, SHEETS):
        total += rows[sheet].to(residual.dtype, bitcast=True).to(tl.float32)
    return (total + residual.to(tl.float32)).to(residual.dtype)


@triton.jit
def _one_trip_kernel(
    partial_TD, residual_TD, weight_D, x_TD, normed_TD, memory_W, turns_R, few, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WORD: tl.constexpr,
    EMPTY: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row. ``memory_W``: the address of every rank's places as seen here."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    at = row * DIM + column
    if NORM:
        weight = tl.load(weight_D + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    partial = tl.load(partial_TD + at, mask=inside, other=0.0)
    residual = tl.zeros([BLOCK], partial.dtype)
    if RESIDUAL:
        residual = tl.load(residual_TD + at, mask=inside, other=0.0)
    own = _sendable(partial, WORD, EMPTY)
    if RANKS > 1:
        turn = tl.load(turns_R + row, volatile=True)
        sheet = few.to(tl.int64) * DIM
        place = turn * RANKS * sheet + at
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                theirs = tl.multiple_of(memory_W[peer].to(tl.pointer_type(WORD)), 16)
                tl.store(theirs + place + RANK * sheet, own, mask=inside)
    if PDL:  # what follows may take its places and load weights while rows travel
        tl.extra.cuda.gdc_launch_dependents()
    parts = (own,)
    if RANKS > 1:
        mine = tl.multiple_of(memory_W[RANK].to(tl.pointer_type(WORD)), 16)
        parts = _receive(mine + place, sheet, own, inside, RANKS, RANK, EMPTY)
        tl.store(turns_R + row, 1 - turn)
    x = _add_in_order(parts, residual, RANKS)
    tl.store(x_TD + at, x, mask=inside)
    if NORM:
        tl.store(normed_TD + at, normalised(x, weight, DIM, eps), mask=inside)


@triton.jit
def _two_trips_kernel(
    partial_TD, residual_TD, weight_D, x_TD, normed_TD, memory_W, turns_R, few, many, rows, lag, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WORD: tl.constexpr,
    EMPTY: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Groups of W rows, one of every rank's: W - 1 programs that send parts for each group, then, group by group, one
    that adds this rank's row and W - 1 that take finished rows, of the group ``lag`` before.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    groups = tl.cdiv(rows, RANKS)
    sheet = tl.cdiv(many, RANKS).to(tl.int64) * DIM
    first_part = 2 * RANKS * few.to(tl.int64) * DIM
    first_done = first_part + 2 * RANKS * sheet
    mine = tl.multiple_of(memory_W[RANK].to(tl.pointer_type(WORD)), 16) + column
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # takes effect once every program of this launch has its place

    senders = groups * (RANKS - 1)
    if program < senders:
        group = (program // (RANKS - 1)).to(tl.int64)
        owner = (RANK + 1 + program % (RANKS - 1)) % RANKS  # links take turns
        row = group * RANKS + owner
        if row < rows:
            turn = tl.load(turns_R + few + row, volatile=True)
            own = _sendable(tl.load(partial_TD + row * DIM + column, mask=inside, other=0.0), WORD, EMPTY)
            for peer in tl.static_range(RANKS):
                if owner == peer:  # never this rank, so the compiler need not know
                    theirs = tl.multiple_of(memory_W[peer].to(tl.pointer_type(WORD)), 16) + column
                    tl.store(theirs + first_part + (turn * RANKS + RANK) * sheet + group * DIM, own, mask=inside)
    else:
        step = (program - senders) // RANKS
        after = (program - senders) % RANKS
        group = tl.where(after == 0, step, step - lag).to(tl.int64)
        row = group * RANKS + (RANK + after) % RANKS
        if (group >= 0) & (row < rows):
            at = row * DIM + column
            if NORM:
                weight = tl.load(weight_D + column, mask=inside, other=0.0)
            turn = tl.load(turns_R + few + row, volatile=True)
            done_at = first_done + (turn * many.to(tl.int64) + row) * DIM
            if after == 0:
                own = _sendable(tl.load(partial_TD + at, mask=inside, other=0.0), WORD, EMPTY)
                residual = tl.zeros([BLOCK], x_TD.dtype.element_ty)
                if RESIDUAL:
                    residual = tl.load(residual_TD + at, mask=inside, other=0.0)
                places = mine + first_part + turn * RANKS * sheet + group * DIM
                parts = _receive(places, sheet, own, inside, RANKS, RANK, EMPTY)
                done = _sendable(_add_in_order(parts, residual, RANKS), WORD, EMPTY)
                for peer in tl.static_range(RANKS):
                    if peer != RANK:
                        theirs = tl.multiple_of(memory_W[peer].to(tl.pointer_type(WORD)), 16) + column
                        tl.store(theirs + done_at, done, mask=inside)
            else:
                done = _receive(mine + done_at, 0, tl.zeros([BLOCK], WORD), inside, 1, -1, EMPTY)[0]
            tl.store(turns_R + few + row, 1 - turn)
            x = done.to(x_TD.dtype.element_ty, bitcast=True)
            tl.store(x_TD + at, x, mask=inside)
            if NORM:
                tl.store(normed_TD + at, normalised(x, weight, DIM, eps), mask=inside)


def sum_rows(
    partial_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None,
    memory: ReducerMemory | None = None,
    settings: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Σ over ranks of ``partial_TD`` [+ residual_TD], and its RMSNorm with ``norm`` (weight_D, eps).

    At least one row; without ``memory`` this rank's rows are the sum.
    """
    rows, dim = partial_TD.shape
    assert rows > 0, "nothing to sum"
    assert all(t is None or t.is_contiguous() for t in (partial_TD, residual_TD))
    ranks, rank = (1, 0) if memory is None else (len(memory.rows.addresses_W), memory.rows.rank)
    if settings is None:
        settings = default_settings(rows, dim, ranks, partial_TD.element_size())
    x_TD = torch.empty_like(partial_TD)
    normed_TD = None if norm is None else torch.empty_like(partial_TD)
    weight_D, eps = (None, 0.0) if norm is None else norm
    word, empty = EMPTY_WORDS[partial_TD.element_size()]
    overlap = overlaps_launches(partial_TD.device)
    common = dict(
        DIM=dim, BLOCK=triton.next_power_of_2(dim), RANK=rank, RANKS=ranks,
        WORD=tl.int16 if word == torch.int16 else tl.int32, EMPTY=empty,
        RESIDUAL=residual_TD is not None, NORM=norm is not None, PDL=overlap,
        num_warps=settings["num_warps"], **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    if ranks == 1:
        _one_trip_kernel[(rows,)](partial_TD, residual_TD, weight_D, x_TD, normed_TD, None, None, 0, eps, **common)
        return x_TD, normed_TD
    exchange = (memory.rows.addresses_W, memory.turns_R, memory.one_trip)
    if rows <= memory.one_trip and not settings["two_trips"]:
        _one_trip_kernel[(rows,)](partial_TD, residual_TD, weight_D, x_TD, normed_TD, *exchange, eps, **common)
        return x_TD, normed_TD
    for start in range(0, rows, memory.two_trips):
        part_TD, rest_TD, x, normed = (
            t if t is None else t[start : start + memory.two_trips] for t in (partial_TD, residual_TD, x_TD, normed_TD)
        )
        groups = triton.cdiv(len(part_TD), ranks)
        lag = min(LAG, groups)
        grid = (groups * (ranks - 1) + (groups + lag) * ranks,)
        _two_trips_kernel[grid](
            part_TD, rest_TD, weight_D, x, normed, *exchange, memory.two_trips, len(part_TD), lag, eps, **common
        )
    return x_TD, normed_TD


def default_settings(rows: int, dim: int, ranks: int, itemsize: int = 2) -> dict[str, int]:
    """A thread loads 16 bytes of a row at a time; the second trip where it saves bytes enough."""
    warps = triton.next_power_of_2(dim) * itemsize // (16 * 32)
    two_trips = ranks > 2 and rows * dim * itemsize > TWO_TRIPS_BYTES
    return {"two_trips": int(two_trips), "num_warps": max(1, min(16, warps))}


def candidates(rows: int, dim: int, ranks: int) -> list[dict[str, int]]:
    """Settings worth trying for ``rows`` rows [dim] over ``ranks`` ranks."""
    ways = [
        two
        for two in (0, 1)
        if (two == 0 and rows <= ONE_TRIP_ROWS) or (two == 1 and (ranks > 2 or rows > ONE_TRIP_ROWS))
    ]
    return [{"two_trips": two, "num_warps": warps} for two in ways for warps in (4, 8, 16)]
