"""Experts of small batches, in Triton's interpreter, against the reference; that against the loop over choices."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.moe.reference import moe_reference
from mixtralkit.ops.experts import SMALL_BATCH, expert_sum_reference
from mixtralkit.ops.experts.triton_small import BLOCK_R, candidates, expert_sum_small

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
ONE_ROW = {"up_f": 4, "up_warps": 4, "down_d": 8, "down_f": 16, "down_parts": 2, "down_warps": 4}
SOME_ROWS = {
    "up_f": 32, "up_d": 32, "up_warps": 4, "up_stages": 2,
    "down_d": 32, "down_f": 16, "down_parts": 2, "down_warps": 4, "down_stages": 2,
}  # fmt: skip


def small(rows: int, **changes: int) -> dict[str, int]:
    return {**(ONE_ROW if rows == 1 else SOME_ROWS), **changes}


def case(rows: int, width: int, hidden: int, slots: int, top_k: int, dtype: torch.dtype, absent: bool = False):
    generator = torch.Generator().manual_seed(rows + width + hidden + slots)
    x_RD = torch.randn(rows, width, generator=generator)
    w13_SGD = torch.randn(slots, 2 * hidden, width, generator=generator) * width**-0.5
    w2_SDF = torch.randn(slots, width, hidden, generator=generator) * hidden**-0.5
    residual_RD = torch.randn(rows, width, generator=generator)
    slots_RK = torch.stack([torch.randperm(slots, generator=generator)[:top_k] for _ in range(rows)])
    if absent:
        slots_RK[torch.rand(rows, top_k, generator=generator) < 0.5] = -1
    weights_RK = torch.rand(rows, top_k, generator=generator)
    x_RD, w13_SGD, w2_SDF, residual_RD = (t.to(dtype) for t in (x_RD, w13_SGD, w2_SDF, residual_RD))
    return x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD


SHAPES = [
    (1, 64, 48, 8, 2),
    (1, 40, 37, 5, 4),
    (2, 64, 40, 4, 1),
    (7, 48, 56, 16, 6),
    (16, 64, 160, 8, 2),
    (3, 33, 19, 60, 4),
]


@pytest.mark.parametrize(("dtype", "absent"), [(torch.float32, True), (torch.float16, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_the_reference(shape, absent, dtype):
    inputs = case(*shape, dtype, absent)
    residual_RD = inputs[-1] if absent else None
    out_RD = torch.full_like(inputs[0], torch.nan)
    got = expert_sum_small(*inputs[:-1], residual_RD, out_RD, settings=small(shape[0]))
    wanted = expert_sum_reference(*inputs[:-1], residual_RD)
    assert got is out_RD
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_without_a_choice_here(rows):
    inputs = list(case(rows, 32, 24, 4, 2, torch.float32))
    inputs[1][:] = -1
    got = expert_sum_small(*inputs, settings=small(rows))
    assert torch.equal(got, inputs[-1])  # the residual alone
    assert not expert_sum_small(*inputs[:-1], settings=small(rows)).any()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_columns_are_shared_by_any_number_of_programs(rows, parts):
    """Also where the last programs have no columns, and where all of an expert's fit one step."""
    inputs = case(rows, 48, 40, 4, 2, torch.float32)
    wanted = expert_sum_reference(*inputs)
    columns = 64 if parts == 1 else 16
    got = expert_sum_small(*inputs, settings=small(rows, down_parts=parts, down_f=columns))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def in_storage(w13_SGD: torch.Tensor, w2_SDF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(w13, w2, storage_S): the slots in another order in a larger storage, NaN where none lies."""
    slots = len(w13_SGD)
    storage_S = torch.randperm(2 * slots + 1, generator=torch.Generator().manual_seed(slots))[:slots]
    storages = (w.new_full((2 * slots + 1, *w.shape[1:]), torch.nan) for w in (w13_SGD, w2_SDF))
    stored = [
        storage.index_copy_(0, storage_S.to(w.device), w)
        for storage, w in zip(storages, (w13_SGD, w2_SDF), strict=True)
    ]
    return *stored, storage_S.to(w13_SGD.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 5])
def test_slots_lie_anywhere_in_a_storage(rows, dtype):
    x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD = case(rows, 48, 40, 6, 2, dtype, absent=rows > 1)
    wanted = expert_sum_small(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD, settings=small(rows))
    w13_PGD, w2_PDF, storage_S = in_storage(w13_SGD, w2_SDF)
    inputs = (x_RD, slots_RK, weights_RK, w13_PGD, w2_PDF, residual_RD)
    assert torch.equal(expert_sum_small(*inputs, storage_S=storage_S, settings=small(rows)), wanted)
    expected = expert_sum_reference(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD)
    assert torch.equal(expert_sum_reference(*inputs, storage_S=storage_S), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_default_settings(rows):
    inputs = case(rows, 48, 40, 4, 2, torch.float16)
    torch.testing.assert_close(expert_sum_small(*inputs), expert_sum_reference(*inputs), rtol=1e-2, atol=1e-2)


def test_the_reference_is_the_definition():
    x_RD, _, _, w13_SGD, w2_SDF, residual_RD = case(9, 24, 20, 6, 3, torch.float32)
    gate_ED = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    chosen_RK, slots_RK = (x_RD @ gate_ED.T).topk(3)
    got = expert_sum_reference(x_RD, slots_RK, chosen_RK.softmax(-1), w13_SGD, w2_SDF, residual_RD)
    wanted = moe_reference(x_RD, gate_ED, w13_SGD, w2_SDF, 3) + residual_RD
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_every_candidate_is_for_its_number_of_rows():
    assert BLOCK_R == SMALL_BATCH
    for rows in (1, 8):
        found = candidates(rows, slots=8, top_k=2, width=4096, hidden=14336)
        assert len(found) > 8
        assert all(("up_stages" in settings) == (rows > 1) for settings in found)
