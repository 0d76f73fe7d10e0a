"""A layer of a running step tells the host what it needs, and where something is missing waits for the answer.

::

    choices ─► table ─► all there ──────────────────────────────────────► slots, places, residual ─► the product
                     └► choices, x to the host, its flag ┄ its answer ──┘

The kernels write to memory of the host; the bus brings its answer into the device's, where they load it past all
caches (volatile). Who tells first makes visible to the whole system what it and, on the device, those before it have
written, by an atomic addition of nothing that is ordered both ways, then stores the flag. Who waits loads the answer's
flag until it is there, and then adds nothing in the same way. Where nothing is missing no flag is stored and nothing is
waited for: the host reads such choices behind the next flag. An answer's flag is taken back by the next layer, which
runs behind all that have read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mixtralkit.ops.runtime import overlaps_launches

MISSING = tl.constexpr(1 << 16)  # what a row that misses something counts beside itself


@dataclass(frozen=True)
class DeskMemory:
    """What steps of T rows, width D, K choices each, and the host hand each other; L layers have S slots at most.

    Attributes:
        asked_LTK: the host's, int64: the slots that were chosen, -1 for none.
        x_TD, weights_TK, guesses_TK: the host's: rows of a layer that waits, their choices' weights in float32, and
            what the next layer is expected to choose.
        told_1: the host's, int32: 0, or of the layer that tells its number plus one, twice, and 1 where it waits.
        said_LS: the answer, on the device, int64 [L + 1, S]: the table, and last where the waiting layer finds its
            slots, -1 for those that it does not compute.
        cpu_TD: the answer, on the device, float32: sums of the rows' choices that the CPU has computed.
        answers_L: on the device, int32: 0, and behind the answer 1, or 2 where there is something in ``cpu_TD``.
        table_LS: on the device, int64: the place of every slot, -1 where it is not there.
        slots_TK, places_S, residual_TD: on the device, what the layer's product takes: the last in float32.
        notes_3: int32 on the device, zero.
    """

    asked_LTK: torch.Tensor
    x_TD: torch.Tensor
    weights_TK: torch.Tensor
    guesses_TK: torch.Tensor
    told_1: torch.Tensor
    said_LS: torch.Tensor
    cpu_TD: torch.Tensor
    answers_L: torch.Tensor
    table_LS: torch.Tensor
    slots_TK: torch.Tensor
    places_S: torch.Tensor
    residual_TD: torch.Tensor
    notes_3: torch.Tensor


@triton.jit(do_not_specialize=["layer", "before", "rows"])
def _ask(
    slots_TK, weights_TK, x_TD, residual_TD, guessed_TK, asked_LTK, x_out_TD, weights_out_TK, guesses_TK, told,
    said_LS, cpu_TD, answers_L, table_LS, slots_out_TK, places_S, residual_out_TD, notes_3, layer, before, rows,
    TABLE: tl.constexpr, SLOTS: tl.constexpr, TOP_K: tl.constexpr, DIM: tl.constexpr, TABLE_LANES: tl.constexpr,
    SLOT_LANES: tl.constexpr, LANES: tl.constexpr, DIM_LANES: tl.constexpr, ALWAYS: tl.constexpr, LAST: tl.constexpr,
    ASKS: tl.constexpr, TAKES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row a program, which asks and takes the answer; of several rows none can wait before all of them have asked."""
    row = tl.program_id(0)
    k, s, d = tl.arange(0, LANES), tl.arange(0, SLOT_LANES), tl.arange(0, DIM_LANES)
    choice_K, at_D, waits = row * TOP_K + k, row * DIM + d, 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot_K = tl.load(slots_TK + choice_K, k < TOP_K, -1)
    place_K = tl.load(table_LS + layer * SLOTS + slot_K, slot_K >= 0, 0, volatile=True)
    if ASKS:
        if row == 0:
            tl.store(answers_L + before, 0)
        tl.store(asked_LTK + layer * rows * TOP_K + choice_K, slot_K, k < TOP_K)
        if ALWAYS:
            waits = tl.max((slot_K >= 0).to(tl.int32))
        else:
            waits = tl.max((place_K < 0).to(tl.int32))
        if waits != 0:
            tl.store(weights_out_TK + choice_K, tl.load(weights_TK + choice_K, k < TOP_K, 0.0), k < TOP_K)
            tl.store(x_out_TD + at_D, tl.load(x_TD + at_D, d < DIM, 0.0), d < DIM)
            if guessed_TK is not None:
                tl.store(guesses_TK + choice_K, tl.load(guessed_TK + choice_K, k < TOP_K, -1), k < TOP_K)
        if TAKES:
            _tell(told, notes_3 + 2, layer, waits, LAST)
        else:
            tl.debug_barrier()  # all threads' parts, before this program counts as one that has come
            came = tl.atomic_add(notes_3, 1 + waits * MISSING, sem="acq_rel", scope="sys") + 1 + waits * MISSING
            if came % MISSING == rows:
                waits = (came >= MISSING).to(tl.int32)
                tl.store(notes_3, 0)
                tl.store(notes_3 + 1, waits)
                _tell(told, notes_3 + 2, layer, waits, LAST)
    if TAKES:
        if not ASKS:
            waits = tl.load(notes_3 + 1, volatile=True)
        place_S = tl.load(table_LS + layer * SLOTS + s, s < SLOTS, 0, volatile=True)
        cpu_end = 0
        if waits != 0:
            answer = tl.load(answers_L + layer, volatile=True)
            while answer == 0:
                answer = tl.load(answers_L + layer, volatile=True)
            tl.atomic_add(notes_3 + 2, 0, sem="acq_rel", scope="sys")
            place_S = tl.load(said_LS + TABLE + s, s < SLOTS, 0, volatile=True)
            place_K = tl.load(said_LS + TABLE + slot_K, slot_K >= 0, -1, volatile=True)
            cpu_end = tl.where(answer == 2, DIM, 0)
            if row == 0:
                t = tl.arange(0, TABLE_LANES)
                tl.store(table_LS + t, tl.load(said_LS + t, t < TABLE, 0, volatile=True), t < TABLE)
        if PDL:  # not before: programs that wait for this one would hold what clearing a place for the answer needs
            tl.extra.cuda.gdc_launch_dependents()
        if row == 0:
            tl.store(places_S + s, tl.maximum(place_S, 0), s < SLOTS)
        tl.store(slots_out_TK + choice_K, tl.where(place_K >= 0, slot_K, -1), k < TOP_K)
        sum_D = tl.load(cpu_TD + at_D, d < cpu_end, 0.0, volatile=True)
        if residual_TD is not None:
            sum_D += tl.load(residual_TD + at_D, d < DIM, 0.0).to(tl.float32)
        tl.store(residual_out_TD + at_D, sum_D, d < DIM)


@triton.jit
def _tell(told, fence, layer, waits, LAST: tl.constexpr):
    """To the host if it is to answer, or if it hears nothing more of this step."""
    if LAST:
        is_due = 1
    else:
        is_due = waits
    if is_due != 0:
        tl.debug_barrier()  # all threads' parts, before the word that tells of them
        tl.atomic_add(fence, 0, sem="acq_rel", scope="sys")
        tl.store(told, 2 * (layer + 1) + waits)


def ask_host(
    slots_TK: torch.Tensor, weights_TK: torch.Tensor, x_TD: torch.Tensor, residual_TD: torch.Tensor | None,
    guessed_TK: torch.Tensor | None, memory: DeskMemory, layer: int, before: int, last: bool, always: bool,
) -> None:  # fmt: skip
    """What a layer's product takes into ``memory``, if need be of the host.

    Args:
        slots_TK: int64 slot of each choice, -1 for none. All tensors are contiguous.
        residual_TD: what the layer's sums are added to; None for zeros.
        guessed_TK: what the next layer is expected to choose.
        before: the layer that ran before, in this step or the last.
        last: the host is told in any case.
        always: wait for the host wherever something is chosen.
    """
    (layers, slots), (rows, dim), top_k = memory.table_LS.shape, x_TD.shape, slots_TK.shape[1]
    assert memory.asked_LTK.shape == (layers, rows, top_k)
    assert all(t is None or t.is_contiguous() for t in (slots_TK, weights_TK, x_TD, residual_TD, guessed_TK))
    overlaps = overlaps_launches(x_TD.device)
    of, power = memory, triton.next_power_of_2
    for asks, takes in ((True, True),) if rows == 1 else ((True, False), (False, True)):
        _ask[(rows,)](
            slots_TK, weights_TK, x_TD, residual_TD, guessed_TK, of.asked_LTK, of.x_TD, of.weights_TK, of.guesses_TK,
            of.told_1, of.said_LS, of.cpu_TD, of.answers_L, of.table_LS, of.slots_TK, of.places_S, of.residual_TD,
            of.notes_3, layer, before, rows, TABLE=layers * slots, SLOTS=slots, TOP_K=top_k, DIM=dim,
            TABLE_LANES=power(layers * slots), SLOT_LANES=power(slots), LANES=power(top_k), DIM_LANES=power(dim),
            ALWAYS=always, LAST=last, ASKS=asks, TAKES=takes, PDL=overlaps, num_warps=4,
            **({"launch_pdl": True} if overlaps else {}),
        )  # fmt: skip
