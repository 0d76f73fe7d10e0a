"""Choices brought together by expert slot, in blocks of rows that each belong to one slot, without the host knowing.

A kernel over blocks of rows needs, for every block, its slot and how many of its rows are real, and, for every choice,
the place of its row. Slots take whole blocks; the rows a slot leaves over in its last block are padding. With blocks
of 2 rows: ``(r0,s1)(r0,s0)(r1,s1)(r2,s1) → (r0,s0)(pad) (r0,s1)(r1,s1) (r2,s1)(pad)``. Rows of a slot keep their order,
so the result of a step never varies from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

ONE_HOT = 8192  # choices of a program × slots: what its registers hold without spilling


class SortedRows(NamedTuple):
    """Where each choice's row lies among the blocks, and whose each block is; all int32, on the device.

    ``place_N`` is -1 for a choice that no slot here computes. ``rows_B`` is how many rows of a block are real, 0 after
    the first ``blocks[0]`` blocks, for which alone ``slot_B`` and ``span_B2`` (the first block of the slot, and how
    many it has) are defined.
    """

    place_N: torch.Tensor
    slot_B: torch.Tensor
    rows_B: torch.Tensor
    span_B2: torch.Tensor
    blocks: torch.Tensor
    block_r: int

    @property
    def places(self) -> int:
        """Rows of all blocks, P."""
        return len(self.slot_B) * self.block_r


def most_blocks(choices: int, slots: int, block_r: int) -> int:
    """The most blocks that ``choices`` rows can fill: every slot with rows may leave all but one row of one block."""
    return (choices + min(slots, choices) * (block_r - 1)) // block_r


def sort_rows(
    slots_RK: torch.Tensor, slots: int, block_r: int, overlap: bool = False, storage_S: torch.Tensor | None = None
) -> SortedRows:
    """Sorts the choices ``slots_RK`` (any integer dtype, -1 for none) into blocks of ``block_r`` rows.

    One launch while one program holds all choices, else two: each program counts its choices, then places them after
    those of its slot in the programs before it. ``overlap`` launches them while the kernel in front still runs.
    ``storage_S`` (int64) is what ``slot_B`` has for each slot; None the slot itself.
    """
    slots_N = slots_RK.reshape(-1)
    choices, device = slots_N.numel(), slots_N.device
    slots_pad = max(triton.next_power_of_2(slots), 2)
    chunk = min(triton.next_power_of_2(choices), ONE_HOT // slots_pad)
    chunks = triton.cdiv(choices, chunk)
    blocks = most_blocks(choices, slots, block_r)
    sizes = [choices, blocks, blocks, 2 * blocks, 1]
    aligned = [triton.cdiv(size, 4) * 4 for size in sizes]  # to 16 bytes: Triton compiles anew for other alignments
    memory = torch.empty(sum(aligned), dtype=torch.int32, device=device)
    parts = [part[:size] for part, size in zip(memory.split(aligned), sizes, strict=True)]
    launch = {"S_PAD": slots_pad, "CHUNK": chunk, "PDL": overlap, "num_warps": 8}
    if overlap:
        launch["launch_pdl"] = True
    counts_CS = torch.empty(chunks, slots_pad, dtype=torch.int32, device=device)
    if chunks > 1:
        _count[chunks,](slots_N, counts_CS, choices, **launch)
    _place[chunks,](
        slots_N, counts_CS, *parts, storage_S, choices, chunks, blocks,
        BLOCK_R=block_r, CHUNKS_PAD=triton.next_power_of_2(chunks),
        BLOCKS_STEP=min(triton.next_power_of_2(blocks), ONE_HOT // slots_pad), **launch,
    )  # fmt: skip
    return SortedRows(*parts, block_r)


@triton.jit
def _one_hot(slots_N, first, choices, CHUNK: tl.constexpr, S_PAD: tl.constexpr):
    """Which slot each of a chunk's choices takes: int32 [CHUNK, S_PAD], a row of zeros for none."""
    slot_N = tl.load(slots_N + first + tl.arange(0, CHUNK), first + tl.arange(0, CHUNK) < choices, other=-1)
    return (slot_N.to(tl.int32)[:, None] == tl.arange(0, S_PAD)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["choices"])
def _count(slots_N, counts_CS, choices, CHUNK: tl.constexpr, S_PAD: tl.constexpr, PDL: tl.constexpr):
    """One chunk's choices of every slot."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    hot_NS = _one_hot(slots_N, chunk * CHUNK, choices, CHUNK, S_PAD)
    tl.store(counts_CS + chunk * S_PAD + tl.arange(0, S_PAD), tl.sum(hot_NS, 0))


@triton.jit(do_not_specialize=["choices", "chunks", "blocks"])
def _place(
    slots_N, counts_CS, place_N, slot_B, rows_B, span_B2, count, storage, choices, chunks, blocks,
    BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, CHUNKS_PAD: tl.constexpr, S_PAD: tl.constexpr,
    BLOCKS_STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Places one chunk's choices; the programs share the list of blocks between them."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    hot_NS = _one_hot(slots_N, chunk * CHUNK, choices, CHUNK, S_PAD)
    if CHUNKS_PAD == 1:
        total_S = tl.sum(hot_NS, 0)
        before_S = total_S * 0
    else:
        chunk_C = tl.arange(0, CHUNKS_PAD)[:, None]
        counts_CS = tl.load(counts_CS + chunk_C * S_PAD + tl.arange(0, S_PAD)[None, :], chunk_C < chunks, other=0)
        total_S = tl.sum(counts_CS, 0)
        before_S = tl.sum(tl.where(chunk_C < chunk, counts_CS, 0), 0)
    blocks_S = (total_S + BLOCK_R - 1) // BLOCK_R
    end_S = tl.cumsum(blocks_S, 0)
    start_S = end_S - blocks_S

    place_NS = tl.cumsum(hot_NS, 0) - 1 + (start_S * BLOCK_R + before_S)[None, :]
    place = tl.where(tl.sum(hot_NS, 1) > 0, tl.sum(hot_NS * place_NS, 1), -1)
    choice = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(place_N + choice, place, choice < choices)

    slot_S = tl.arange(0, S_PAD)[None, :]
    for first in range(chunk * BLOCKS_STEP, blocks, chunks * BLOCKS_STEP):
        block = first + tl.arange(0, BLOCKS_STEP)
        slot = tl.sum((block[:, None] >= end_S[None, :]).to(tl.int32), 1)  # S_PAD past the last block
        hot_BS = (slot[:, None] == slot_S).to(tl.int32)
        start = tl.sum(hot_BS * start_S[None, :], 1)
        rows = tl.sum(hot_BS * total_S[None, :], 1) - (block - start) * BLOCK_R
        if storage is not None:
            slot = tl.load(storage + slot, slot < S_PAD, 0).to(tl.int32)
        tl.store(slot_B + block, slot, block < blocks)
        tl.store(rows_B + block, tl.maximum(tl.minimum(rows, BLOCK_R), 0), block < blocks)
        tl.store(span_B2 + 2 * block, start, block < blocks)
        tl.store(span_B2 + 2 * block + 1, tl.sum(hot_BS * blocks_S[None, :], 1), block < blocks)
    tl.store(count, tl.sum(blocks_S, 0), chunk == 0)
