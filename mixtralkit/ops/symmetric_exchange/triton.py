"""The exchange of ``SymmetricExchange``: rows are pushed to who computes them, sums are fetched by who owns the row.

**Dispatch.** The program of a row writes it into the memory of every rank that computes any of its choices, then sends
every rank one 64-bit word a choice: its place (rank and slot, -1 for none) above the weight's bits. The words are
released at system scope: who has the words has the row, in place, and nothing is copied or emptied but words. Programs
after those take the words that arrive: they wait for them, exchange each for ``EMPTY`` (which acquires the row), and
write slots and weights for the experts.

**Combine.** The sums lie in memory that others can read. The first program tells every rank the number of this call
once the kernels before it have ended; each row's program waits for the numbers of the ranks that computed a part,
fetches the parts, adds them in rank order, adds the residual and normalises. **Combine at the owner** is the same, but
a row's program runs on the rank that the words name as its owner, and the residual is the row that came with them.

**Why memory may be used again**, calls numbered k, and every kernel starting its work after the one before it on its
rank has ended (stream order, or ``gdc_wait`` where launches overlap):

- *Words.* Two turns, by the parity of k. Rank p writes into r's place of call k again in call k+2. Then p's dispatch of
  call k+1 has ended, for which it took words from every rank, r's too; r sent them after its dispatch of call k had
  ended, emptying included.
- *Rows.* Rank s writes row t into d's memory again in call k+1 at the earliest, after its combine of call k. If d
  computed a part of the row in call k, that combine waited for d's number k, which d sent after its experts had ended.
  If not, no expert of d reads the place. Row t of rank s has the same place whatever ``rows`` is.
- *Rows that stay.* s writes t again in call k+1 only if it owns t after call k. Then its combine waited for every rank
  that computed a part, and the residual was read by that combine itself. In call k+2 or later s has taken words of call
  k+1 from every rank, sent after their combine of call k. So where rows change their rank in another way (a new step
  deals them anew), a collective that every rank enters after its last combine comes between.
- *Sums.* Rank d's experts write sums of call k+1 after d's dispatch of call k+1, which took words from every rank; each
  rank sent them after its combine of call k had ended, fetching included.
- *Numbers* only grow. When d sends k+1, its dispatch of call k+1 has taken words from all ranks, which have ended call
  k by then.

**Why words and numbers.** Places that are all one value between calls, as in ``all_reduce/triton.py``, would need no
release, but every row would be read, written and emptied once more before the experts read it. With nothing released
or acquired at all (unsafe), dispatch and combine took 9.2 instead of 10.4 us (4 H200s, 16 rows a rank, 8 KB each), and
as long as before from 1024 rows on, where the links are busy.

**Why no rank waits for ever.** Programs start in the order of their numbers, and what others wait for comes first:
programs that send rows wait for nothing, nor does the first of combine before it has sent its number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.norm.triton import normalised
from mixtralkit.ops.runtime import overlaps_launches
from mixtralkit.ops.symmetric_exchange.types import EMPTY, SLOT_BITS, ArrivedRows, ExchangeMemory, Norm

WORDS = 256  # that one program takes


@triton.jit
def _words_of(words_W, other, LANES: tl.constexpr, RANKS: tl.constexpr):
    """For each lane the words of rank ``other``."""
    address = tl.zeros([LANES], tl.int64)
    for rank in tl.static_range(RANKS):
        address = tl.where(other == rank, words_W[rank], address)
    return address.to(tl.pointer_type(tl.int64))


@triton.jit(do_not_specialize=["own", "rows", "max_rows", "turns"])
def _dispatch(
    x_TD, experts_TK, weights_TK, places_EC, valid_T, slots_RK, weights_RK, places_RK, members_T, rows_W, words_W,
    calls, own, rows, max_rows, turns,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, EMPTY: tl.constexpr, SLOT_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program for each of the ``rows`` rows of this rank, of which the first ``own`` are real; then those that take
    words. ``rows_W``, ``words_W``: the address of every rank's memory as seen here.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)  # of the words that a row sends: rank by rank, choice by choice
    other, choice = lane // TOP_K, lane % TOP_K
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # takes effect once every program of this launch has its place
    call = tl.load(calls)
    turn = (call % 2) * max_rows * RANKS * TOP_K
    if program < rows:
        row = program.to(tl.int64)
        kept = row < own
        if valid_T is not None:
            kept = kept & (tl.load(valid_T + row, mask=kept, other=-1) >= 0)
        real = lane < tl.where(kept, RANKS * TOP_K, 0)
        expert = tl.load(experts_TK + row * TOP_K + choice, mask=real, other=-1)
        place = tl.load(places_EC + expert * turns + row % turns, mask=expert >= 0, other=-1)
        weight = tl.load(weights_TK + row * TOP_K + choice, mask=real, other=0.0)
        bits = tl.where(place >= 0, weight, 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        if row < own:
            column = tl.arange(0, BLOCK)
            inside = column < DIM
            x = tl.load(x_TD + row * DIM + column, mask=inside, other=0.0)
            members = 0
            for k in tl.static_range(TOP_K):
                chosen = tl.load(experts_TK + row * TOP_K + k, mask=kept, other=-1)
                to = tl.load(places_EC + chosen * turns + row % turns, mask=chosen >= 0, other=0) >> SLOT_BITS
                members |= tl.where(chosen >= 0, 1 << to, 0)
            if places_RK is not None:  # a row without a choice left stays here
                members = tl.where(kept & (members == 0), 1 << RANK, members)
            for step in tl.static_range(1, RANKS + 1):  # from the next rank on, so that links take turns
                if (members >> (RANK + step) % RANKS) & 1 != 0:
                    theirs = tl.multiple_of(rows_W[(RANK + step) % RANKS].to(tl.pointer_type(x.dtype)), 16)
                    tl.store(theirs + (row * RANKS + RANK) * DIM + column, x, mask=inside)
            tl.store(members_T + row, members)
        tl.debug_barrier()  # all threads' parts of the row, before the words that tell of it
        theirs = _words_of(words_W, other, LANES, RANKS) + turn + (row * RANKS + RANK) * TOP_K + choice
        tl.atomic_xchg(theirs, (place.to(tl.int64) << 32) | bits, mask=lane < RANKS * TOP_K, sem="release", scope="sys")
    else:
        number = (program - rows) * WORDS + tl.arange(0, WORDS)
        expected = number < rows * RANKS * TOP_K
        mine = words_W[RANK].to(tl.pointer_type(tl.int64)) + turn + number
        missing = 1
        while missing != 0:
            word = tl.load(mine, mask=expected, other=0, volatile=True)
            missing = tl.max((word == EMPTY).to(tl.int32))
        word = tl.atomic_xchg(mine, tl.full([WORDS], EMPTY, tl.int64), mask=expected, sem="acquire", scope="sys")
        at = word >> 32
        here = (at >> SLOT_BITS) == RANK
        own_weight = tl.where(here, word.to(tl.int32).to(tl.float32, bitcast=True), 0.0)
        tl.store(slots_RK + number, tl.where(here, at & ((1 << SLOT_BITS) - 1), -1), mask=expected)
        tl.store(weights_RK + number, own_weight, mask=expected)
        if places_RK is not None:
            tl.store(places_RK + number, at.to(tl.int32), mask=expected)
    if program == 0:
        tl.store(calls + 1, call + 1)


@triton.jit
def _owned(
    places_RK, members_T, row, given, TOP_K: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
):  # fmt: skip
    """(who sent row ``row`` if this rank owns it from now on, else -1; bits of the ranks that computed a part)."""
    sender, members = -1, 0
    for source in tl.static_range(RANKS):
        owner, found = -1, 0
        for k in tl.static_range(TOP_K):
            to = tl.load(places_RK + (row * RANKS + source) * TOP_K + k) >> SLOT_BITS
            owner = tl.where(owner < 0, to, owner)
            found |= tl.where(to >= 0, 1 << tl.maximum(to, 0), 0)
        if source == RANK:
            stays = tl.load(members_T + row, mask=row < given, other=0) != 0
            owner = tl.where(stays & (found == 0), RANK, owner)
        sender = tl.where(owner == RANK, source, sender)
        members = tl.where(owner == RANK, found, members)
    return sender, members


@triton.jit(do_not_specialize=["own", "given", "sums", "numbers"])
def _combine(
    places_RK, members_T, residual_TD, weight_D, x_TD, normed_TD, valid_T, rows_W, words_W, calls, own, given, sums,
    numbers, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, SLOT_BITS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row of this rank; one at least, which tells the others that the sums here are ready.

    ``sums``: the first of the rows that are sums. ``numbers``: the first of the words that are numbers of calls. With
    ``places_RK`` a program a row of the batch: this rank adds those that it owns; it gave ``given`` of them.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    rank = tl.arange(0, LANES)
    if NORM:
        weight = tl.load(weight_D + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    call = tl.load(calls + 1)
    if row == 0:
        theirs = _words_of(words_W, rank, LANES, RANKS) + numbers + RANK
        tl.atomic_xchg(theirs, tl.zeros([LANES], tl.int64) + call, mask=rank < RANKS, sem="release", scope="sys")
        tl.store(calls, call)
    if PDL:  # what follows may take its places and load weights while sums travel
        tl.extra.cuda.gdc_launch_dependents()
    mine = row < own
    if places_RK is not None:
        source, held = _owned(places_RK, members_T, row, given, TOP_K, RANK, RANKS, SLOT_BITS)
        mine = source >= 0
        tl.store(valid_T + row, tl.where(mine, 0, -1).to(tl.int64))
    if mine:
        at = row * DIM + column
        residual = tl.zeros([BLOCK], x_TD.dtype.element_ty)
        if places_RK is not None:
            number, members = row * RANKS + source, held
            if RESIDUAL:
                stream = tl.multiple_of(rows_W[RANK].to(tl.pointer_type(x_TD.dtype.element_ty)), 16)
                residual = tl.load(stream + number * DIM + column, mask=inside, other=0.0)
        else:
            number, members = row * RANKS + RANK, tl.load(members_T + row)
            if RESIDUAL:
                residual = tl.load(residual_TD + at, mask=inside, other=0.0)
        awaited = (rank < RANKS) & (((members >> rank) & 1) != 0)
        told = words_W[RANK].to(tl.pointer_type(tl.int64)) + numbers + rank
        missing = 1
        while missing != 0:
            ended = tl.load(told, mask=awaited, other=0, volatile=True)
            missing = tl.max((awaited & (ended < call)).to(tl.int32))
        tl.atomic_add(told, tl.zeros([LANES], tl.int64), mask=awaited, sem="acquire", scope="sys")
        tl.debug_barrier()  # no thread fetches before the sums are known to be there
        total, anywhere = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        place = (sums + number) * DIM + column
        for other in tl.static_range(RANKS):
            theirs = tl.multiple_of(rows_W[other].to(tl.pointer_type(x_TD.dtype.element_ty)), 16)
            fetched = inside & ((((anywhere + members) >> other) & 1) != 0)  # all are under way at once
            total += tl.load(theirs + place, mask=fetched, other=0.0, cache_modifier=".cg").to(tl.float32)
        x = (total + residual.to(tl.float32)).to(x_TD.dtype.element_ty)
        tl.store(x_TD + at, x, mask=inside)
        if NORM:
            tl.store(normed_TD + at, normalised(x, weight, DIM, eps), mask=inside)


def send_rows(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    places_EC: torch.Tensor,
    rows: int,
    memory: ExchangeMemory,
    settings: dict[str, int] | None = None,
    valid_T: torch.Tensor | None = None,
    stays: bool = False,
) -> ArrivedRows:
    """``SymmetricExchange.dispatch`` through ``memory``."""
    assert all(t.is_contiguous() for t in (x_TD, experts_TK, weights_TK, places_EC))
    assert valid_T is None or valid_T.is_contiguous()
    (own, dim), top_k, ranks, rank = x_TD.shape, experts_TK.shape[1], *_ranks(memory)
    settings = settings or default_settings(dim, x_TD.element_size())
    count, device = rows * ranks, x_TD.device
    slots_RK = torch.empty(count, top_k, dtype=torch.int64, device=device)
    weights_RK = torch.empty(count, top_k, dtype=torch.float32, device=device)
    members_T = torch.empty(own, dtype=torch.int32, device=device)
    places_RK = torch.empty(count, top_k, dtype=torch.int32, device=device) if stays else None
    overlap = overlaps_launches(device)
    _dispatch[(rows + triton.cdiv(count * top_k, WORDS),)](
        x_TD, experts_TK, weights_TK, places_EC, valid_T, slots_RK, weights_RK, places_RK, members_T,
        memory.rows.addresses_W, memory.words.addresses_W, memory.calls,
        own, rows, memory.max_rows, places_EC.shape[1],
        DIM=dim, BLOCK=triton.next_power_of_2(dim), TOP_K=top_k, LANES=triton.next_power_of_2(ranks * top_k),
        WORDS=WORDS, RANK=rank, RANKS=ranks, EMPTY=EMPTY, SLOT_BITS=SLOT_BITS, PDL=overlap,
        num_warps=settings["send_warps"], **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return ArrivedRows(memory.rows.own[:count], slots_RK, weights_RK, members_T, places_RK)


def fetch_sums(
    members_T: torch.Tensor,
    memory: ExchangeMemory,
    residual_TD: torch.Tensor | None = None,
    norm: Norm | None = None,
    settings: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``SymmetricExchange.combine`` of the sums in the memory."""
    assert residual_TD is None or residual_TD.is_contiguous()
    x_TD = memory.rows.own.new_empty(len(members_T), memory.rows.own.shape[1])
    return x_TD, _launch_combine(None, members_T, residual_TD, x_TD, None, memory, norm, settings)


def fetch_owned(
    arrived: ArrivedRows,
    memory: ExchangeMemory,
    norm: Norm | None = None,
    residual: bool = True,
    settings: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """``SymmetricExchange.combine_at_owner`` of the sums in the memory."""
    x_TD = memory.rows.own.new_empty(len(arrived.places_RK) // _ranks(memory)[0], memory.rows.own.shape[1])
    valid_T = torch.empty(len(x_TD), dtype=torch.int64, device=x_TD.device)
    travelled = memory.rows.own if residual else None
    stays = (arrived.places_RK, arrived.members_T)
    return x_TD, _launch_combine(*stays, travelled, x_TD, valid_T, memory, norm, settings), valid_T


def _launch_combine(
    places_RK: torch.Tensor | None,
    members_T: torch.Tensor,
    residual_TD: torch.Tensor | None,
    x_TD: torch.Tensor,
    valid_T: torch.Tensor | None,
    memory: ExchangeMemory,
    norm: Norm | None,
    settings: dict[str, int] | None,
) -> torch.Tensor | None:
    """Into ``x_TD`` and ``valid_T``; the normed rows."""
    (own, dim), (ranks, rank) = x_TD.shape, _ranks(memory)
    normed_TD = None if norm is None else torch.empty_like(x_TD)
    weight_D, eps = (None, 0.0) if norm is None else norm
    settings = settings or default_settings(dim, x_TD.element_size())
    overlap = overlaps_launches(x_TD.device)
    _combine[(max(own, 1),)](
        places_RK, members_T, residual_TD, weight_D, x_TD, normed_TD, valid_T,
        memory.rows.addresses_W, memory.words.addresses_W, memory.calls,
        own, len(members_T), memory.max_rows * ranks, memory.words.own.numel() - ranks, eps,
        DIM=dim, BLOCK=triton.next_power_of_2(dim), TOP_K=0 if places_RK is None else places_RK.shape[1],
        LANES=triton.next_power_of_2(ranks), RANK=rank, RANKS=ranks, SLOT_BITS=SLOT_BITS,
        RESIDUAL=residual_TD is not None, NORM=norm is not None, PDL=overlap,
        num_warps=settings["fetch_warps"], **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return normed_TD


def _ranks(memory: ExchangeMemory) -> tuple[int, int]:
    return len(memory.rows.addresses_W), memory.rows.rank


def default_settings(dim: int, itemsize: int = 2) -> dict[str, int]:
    """A thread moves 16 bytes of a row at a time."""
    warps = max(1, min(16, triton.next_power_of_2(dim) * itemsize // (16 * 32)))
    return {"send_warps": warps, "fetch_warps": warps}


def candidates(rows: int, dim: int, ranks: int) -> list[dict[str, int]]:
    """Settings worth trying for ``rows`` rows [dim] of each of ``ranks`` ranks."""
    return [{"send_warps": send, "fetch_warps": fetch} for send in (4, 8, 16) for fetch in (4, 8, 16)]
