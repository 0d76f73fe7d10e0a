"""What a layer asks of the host and takes of a ready answer: the kernel by Triton's interpreter, and a slow one."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.ops.desk.triton import DeskMemory, ask_host

LAYERS, SLOTS, TOP_K, WIDTH = 3, 5, 2, 40
OLD = -7  # what nobody has written


def memory_of(rows: int, dtype: torch.dtype, generator: torch.Generator) -> DeskMemory:
    table_LS = torch.randint(20, (LAYERS, SLOTS), generator=generator)
    said_LS = 20 + torch.randint(20, (LAYERS + 1, SLOTS), generator=generator)
    said_LS[-1, 3] = -1  # on the CPU
    old_TK = torch.full((rows, TOP_K), OLD)
    return DeskMemory(
        torch.full((LAYERS, rows, TOP_K), OLD), torch.full((rows, WIDTH), OLD, dtype=dtype), old_TK.float(),
        old_TK.clone(), torch.zeros(1, dtype=torch.int32), said_LS, torch.randn(rows, WIDTH, generator=generator),
        torch.ones(LAYERS, dtype=torch.int32), table_LS, old_TK.clone(), torch.full((SLOTS,), OLD),
        torch.full((rows, WIDTH), float(OLD)), torch.zeros(3, dtype=torch.int32),
    )  # fmt: skip


def ask_slowly(slots_TK, weights_TK, x_TD, residual_TD, guessed_TK, of: DeskMemory, layer, before, last, always):
    """Row by row; the answer is there."""
    of.asked_LTK[layer], of.answers_L[before] = slots_TK, 0
    line_S, waits = of.table_LS[layer].clone(), False
    for row, slots in enumerate(slots_TK.tolist()):
        if any(slot >= 0 and (always or line_S[slot] < 0) for slot in slots):
            waits = True
            of.x_TD[row], of.weights_TK[row] = x_TD[row], weights_TK[row]
            if guessed_TK is not None:
                of.guesses_TK[row] = guessed_TK[row]
    if waits or last:
        of.told_1[0] = 2 * (layer + 1) + waits
    sum_TD = torch.zeros_like(of.residual_TD) if residual_TD is None else residual_TD.float()
    if waits:
        line_S = of.said_LS[-1]
        of.table_LS[:] = of.said_LS[:-1]
        if of.answers_L[layer] == 2:
            sum_TD = sum_TD + of.cpu_TD
    of.residual_TD[:], of.places_S[:] = sum_TD, line_S.clamp(min=0)
    for at, slot in enumerate(slots_TK.flatten().tolist()):
        of.slots_TK.view(-1)[at] = slot if slot >= 0 and line_S[slot] >= 0 else -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("case", ["all there", "one missing", "told in any case", "always", "nobody"])
def test_a_layer_asks_and_takes_the_answer(dtype: torch.dtype, rows: int, case: str) -> None:
    for answer in (1, 2):
        found = []
        for ask in (ask_host, ask_slowly):
            generator = torch.Generator().manual_seed(rows + answer)
            of = memory_of(rows, dtype, generator)
            slots_TK = torch.rand(rows, SLOTS, generator=generator).topk(TOP_K).indices
            if case == "nobody":
                slots_TK.fill_(-1)
            elif rows > 1:
                slots_TK[1] = torch.tensor([-1, 2])  # a choice that is dropped
            if case == "one missing":
                of.table_LS[1, slots_TK[-1, 0]] = -1
            of.answers_L[1] = answer
            weights_TK = torch.rand(rows, TOP_K, generator=generator)
            x_TD = torch.randn(rows, WIDTH, generator=generator).to(dtype)
            residual_TD = None if case == "always" else torch.randn(rows, WIDTH, generator=generator).to(dtype)
            guessed_TK = slots_TK + 1 if case == "always" else None
            told_anyway, always = case == "told in any case", case == "always"
            ask(slots_TK, weights_TK, x_TD, residual_TD, guessed_TK, of, 1, 0, told_anyway, always)
            found.append(of)
        mine, wanted = (vars(of) for of in found)
        for name in mine.keys() - {"notes_3"}:
            assert torch.equal(mine[name], wanted[name]), name
        assert mine["notes_3"][0] == 0, "the next layer counts anew"
        waits = {"all there": 0, "one missing": 1, "told in any case": 0, "always": 1, "nobody": 0}[case]
        told = 4 + waits if waits or case == "told in any case" else 0
        assert mine["told_1"].item() == told
