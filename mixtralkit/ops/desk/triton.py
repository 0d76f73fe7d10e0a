"""A running step asks the host, waits for its answer, and adds what came of it.

The kernels themselves read and write memory of the host, past all caches (volatile). Who tells first makes visible to
the whole system what it has written, by an atomic addition of nothing that is ordered both ways, then stores the flag;
who waits loads the flag until it is there, and then does the same. A flag is taken back by who has read it, so a step
begins with all of them zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # columns that a program adds


@triton.jit(do_not_specialize=["layer", "rows", "choices"])
def _ask(
    slots_N, weights_N, x_TD, guessed_N, places_LS, here_N, places_S, waits_2, asked_LN, guesses_N, weights_out_N,
    x_out_TD, told_L, fence, layer, rows, choices,
    SLOTS: tl.constexpr, SLOT_LANES: tl.constexpr, LANES: tl.constexpr, DIM: tl.constexpr, DIM_LANES: tl.constexpr,
    ALWAYS: tl.constexpr,
):  # fmt: skip
    """One program, a layer's choices and rows; ``places_LS`` and all from ``asked_LN`` to ``told_L`` are the host's."""
    lane, s, d = tl.arange(0, LANES), tl.arange(0, SLOT_LANES), tl.arange(0, DIM_LANES)
    inside = lane < choices
    slot = tl.load(slots_N + lane, mask=inside, other=-1)
    places = places_LS + layer * SLOTS
    place_of_slot = tl.load(places + s, mask=s < SLOTS, other=-1, volatile=True)
    tl.store(places_S + s, tl.maximum(place_of_slot, 0), mask=s < SLOTS)
    place = tl.load(places + slot, mask=slot >= 0, other=-1, volatile=True)
    tl.store(here_N + lane, tl.where(place >= 0, slot, -1), mask=inside)
    if ALWAYS:
        waits = tl.max((slot >= 0).to(tl.int32))
    else:
        waits = tl.max(((slot >= 0) & (place < 0)).to(tl.int32))
    tl.store(waits_2, waits)
    tl.store(asked_LN + layer * choices + lane, slot, mask=inside)
    if waits != 0:
        tl.store(weights_out_N + lane, tl.load(weights_N + lane, mask=inside, other=0.0), mask=inside)
        if guessed_N is not None:
            tl.store(guesses_N + lane, tl.load(guessed_N + lane, mask=inside, other=-1), mask=inside)
        for row in range(rows):
            x = tl.load(x_TD + row * DIM + d, mask=d < DIM, other=0.0)
            tl.store(x_out_TD + row * DIM + d, x, mask=d < DIM)
    tl.debug_barrier()  # all threads' parts, before the word that tells of them
    tl.atomic_add(fence, 0, sem="acq_rel", scope="sys")
    tl.store(told_L + layer, waits + 1)


@triton.jit(do_not_specialize=["layer", "choices"])
def _wait(
    waits_2, answers_L, late_N, late_places_P, late_out_N, places_out_P, fence, layer, choices,
    LANES: tl.constexpr, PLACES: tl.constexpr, PLACE_LANES: tl.constexpr,
):  # fmt: skip
    """One program; ``answers_L`` and what is late are the host's."""
    lane, p = tl.arange(0, LANES), tl.arange(0, PLACE_LANES)
    inside = lane < choices
    late = tl.full([LANES], -1, tl.int64)
    place = tl.zeros([PLACE_LANES], tl.int64)
    answer = 1
    if tl.load(waits_2) != 0:
        answer = tl.load(answers_L + layer, volatile=True)
        while answer == 0:
            answer = tl.load(answers_L + layer, volatile=True)
        tl.atomic_add(fence, 0, sem="acq_rel", scope="sys")
        late = tl.load(late_N + lane, mask=inside, other=-1, volatile=True)
        place = tl.load(late_places_P + p, mask=p < PLACES, other=0, volatile=True)
        tl.store(answers_L + layer, 0)
    tl.store(late_out_N + lane, late, mask=inside)
    tl.store(places_out_P + p, place, mask=p < PLACES)
    tl.store(waits_2 + 1, answer - 1)


@triton.jit
def _add(
    here_ND, late_ND, cpu_ND, waits_2, residual_TD, out_TD,
    DIM: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of a row, added as ``tiers.parts.add_parts`` does; ``cpu_ND`` is the host's."""
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < DIM
    late_end = tl.where(tl.load(waits_2) != 0, DIM, 0)
    cpu_end = tl.where(tl.load(waits_2 + 1) != 0, DIM, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        at = (row * TOP_K + k) * DIM + d
        part = tl.load(here_ND + at, mask=inside, other=0.0)
        part += tl.load(cpu_ND + at, mask=d < cpu_end, other=0.0, volatile=True)
        part += tl.load(late_ND + at, mask=d < late_end, other=0.0)
        total += part
    if residual_TD is not None:
        total += tl.load(residual_TD + row * DIM + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_TD + row * DIM + d, total.to(out_TD.dtype.element_ty), mask=inside)


def ask_host(
    slots_N: torch.Tensor, weights_N: torch.Tensor, x_TD: torch.Tensor, guessed_N: torch.Tensor | None,
    places_LS: torch.Tensor, here_N: torch.Tensor, places_S: torch.Tensor, waits_2: torch.Tensor,
    asked_LN: torch.Tensor, guesses_N: torch.Tensor, weights_out_N: torch.Tensor, x_out_TD: torch.Tensor,
    told_L: torch.Tensor, fence: torch.Tensor, layer: int, always: bool,
) -> None:  # fmt: skip
    """A layer's choices to the host, and what it needs to answer where one of them is not on the device.

    Args:
        slots_N: int64 slot of each choice, -1 for none.
        guessed_N: what the next layer is expected to choose.
        places_LS: the host's table, int64: the place of every slot, -1 where it is not on the device.
        here_N, places_S: take on the device the slots that are there, -1 for the others, and the layer's places.
        waits_2: int32 on the device; the first says whether ``wait_for_host`` will wait.
        asked_LN, guesses_N, weights_out_N, x_out_TD: the host's.
        told_L: the host's, int32: 1 where all is there, 2 where the step will wait.
        fence: int32 on the device, 0.
        always: wait for the host wherever something is chosen.
    """
    (layers, slots), (rows, dim), choices = places_LS.shape, x_TD.shape, len(slots_N)
    assert asked_LN.shape == (layers, choices)
    _ask[(1,)](
        slots_N, weights_N, x_TD, guessed_N, places_LS, here_N, places_S, waits_2, asked_LN, guesses_N, weights_out_N,
        x_out_TD, told_L, fence, layer, rows, choices,
        SLOTS=slots, SLOT_LANES=triton.next_power_of_2(slots), LANES=triton.next_power_of_2(choices), DIM=dim,
        DIM_LANES=triton.next_power_of_2(dim), ALWAYS=always, num_warps=8,
    )  # fmt: skip


def wait_for_host(
    waits_2: torch.Tensor, answers_L: torch.Tensor, late_N: torch.Tensor, late_places_P: torch.Tensor,
    late_out_N: torch.Tensor, places_out_P: torch.Tensor, fence: torch.Tensor, layer: int,
) -> None:  # fmt: skip
    """Waits for the answer to ``ask_host`` if the layer needs one, and takes it.

    Args:
        waits_2: the second becomes 1 where the CPU has computed something.
        answers_L: the host's, int32: 1, or 2 where the CPU has computed something.
        late_N, late_places_P: the host's, int64: what has come for the layer, by choice a number in ``late_places_P``,
            -1 for none. ``late_out_N`` and ``places_out_P`` take them on the device.
    """
    choices, places = len(late_N), len(late_places_P)
    _wait[(1,)](
        waits_2, answers_L, late_N, late_places_P, late_out_N, places_out_P, fence, layer, choices,
        LANES=triton.next_power_of_2(choices), PLACES=places, PLACE_LANES=triton.next_power_of_2(places), num_warps=1,
    )  # fmt: skip


def add_answers(
    here_ND: torch.Tensor, late_ND: torch.Tensor, cpu_ND: torch.Tensor, waits_2: torch.Tensor,
    residual_TD: torch.Tensor | None, out_TD: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Σ of each row's choices over their float32 parts [N, D], of which ``cpu_ND`` is the host's [+ residual]."""
    rows, dim = out_TD.shape
    block = min(BLOCK, triton.next_power_of_2(dim))
    _add[(rows, triton.cdiv(dim, block))](
        here_ND, late_ND, cpu_ND, waits_2, residual_TD, out_TD, DIM=dim, TOP_K=len(here_ND) // rows, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return out_TD
