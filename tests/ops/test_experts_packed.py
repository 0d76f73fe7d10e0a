"""Experts in fewer bits, in Triton's interpreter, against the reference on the numbers that the bits mean."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.moe.weights import FORMATS, PackedWeight
from mixtralkit.ops.experts import expert_sum_reference, triton_packed
from mixtralkit.ops.experts.triton_packed import default_settings, expert_sum_packed
from mixtralkit.ops.experts.triton_words import Operand

LARGE = {"up_block_o": 128, "down_block_o": 128}  # tiles that the interpreter is soon through
ROW = {"up_f": 128, "up_warps": 4, "down_d": 128, "down_words": 64, "down_warps": 2}
ALL_WAYS = ("int8", "int4:32", "int4:128:zeros", "fp8:block")  # of scales in a product
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
SLOTS, TOP_K, WIDTH, HIDDEN = 4, 2, 256, 384


def packed(name: str, dtype: torch.dtype, hidden: int = HIDDEN) -> tuple[PackedWeight, PackedWeight]:
    """w13 and w2 of all slots; some outputs are all zero."""
    generator = torch.Generator().manual_seed(len(name) + hidden)
    w13 = torch.randn(SLOTS, 2, hidden, WIDTH, generator=generator) * WIDTH**-0.5
    w2 = torch.randn(SLOTS, WIDTH, hidden, generator=generator) * hidden**-0.5 + 0.01
    w13[:, :, 5], w2[:, 7] = 0.0, 0.0
    up, down = FORMATS[name].quantize(w13), FORMATS[name].quantize(w2)
    return PackedWeight(up.weights, WIDTH, tuple(t.flatten(1, 2) for t in up.tensors), stacked=2), down


def rows_of(count: int, dtype: torch.dtype, absent: float = 0.0, heavy: bool = False):
    generator = torch.Generator().manual_seed(count)
    x_RD = torch.randn(count, WIDTH, generator=generator).to(dtype)
    slots_RK = torch.stack([torch.randperm(SLOTS, generator=generator)[:TOP_K] for _ in range(count)])
    if heavy:
        slots_RK[:, 0], slots_RK[:, 1] = 2, 3
    slots_RK[torch.rand(count, TOP_K, generator=generator) < absent] = -1
    return x_RD, slots_RK, torch.rand(count, TOP_K, generator=generator), torch.randn_like(x_RD)


def check(name: str, count: int, dtype: torch.dtype, storage: bool = False, settings=None, **kinds) -> None:
    x_RD, slots_RK, weights_RK, residual_RD = rows_of(count, dtype, **kinds)
    matrices = packed(name, dtype)
    storage_S = torch.tensor([3, 1, 0, 2]) if storage else None
    wanted = expert_sum_reference(
        x_RD.float(), slots_RK, weights_RK, *(m.float() for m in matrices), residual_RD.float(), storage_S=storage_S
    )
    out_RD = torch.full_like(x_RD, torch.nan)
    mean = count * TOP_K / SLOTS
    settings = settings or default_settings(count, mean, "int4" in name) | LARGE
    got = expert_sum_packed(
        x_RD, slots_RK, weights_RK, *matrices, residual_RD, out_RD, storage_S=storage_S, settings=settings
    )
    assert got is out_RD
    torch.testing.assert_close(got.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_few_rows(name):
    check(name, 9, torch.float32, absent=0.3, storage=True)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_one_row(name):
    check(name, 1, torch.float16, storage=True, settings=ROW | {"down_words": 64 if "int4" in name else 128})


@pytest.mark.parametrize("name", ["fp8:tensor", "int4:64"])
def test_one_row_of_float32(name):
    check(name, 1, torch.float32)


def test_one_row_whose_numbers_differ_in_size():
    """Each chunk of columns is scaled by itself: sums are those of float32 however large or small a row is."""
    matrices = packed("int4:128", torch.float16)
    for scale in (2.0**-4, 1.0, 2.0**3):
        x_1D, slots_1K, weights_1K, _ = rows_of(1, torch.float32)
        x_1D = (x_1D * torch.logspace(-4, 0, WIDTH, 2) * scale).half()
        wanted = expert_sum_reference(x_1D.float(), slots_1K, weights_1K, *(m.float() for m in matrices))
        got = expert_sum_packed(x_1D, slots_1K, weights_1K, *matrices, settings=ROW)
        assert (got.float() - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize("name", ALL_WAYS)
def test_rows_whose_weights_are_read_once(name):
    check(name, 40, torch.float32, absent=0.2, storage=True)


@pytest.mark.parametrize("name", ALL_WAYS)
def test_many_rows_an_expert(name):
    check(name, 220, torch.float32, heavy=True, absent=0.1, storage=True)


@pytest.mark.parametrize("name", ALL_WAYS)
def test_products_of_warp_groups(name, monkeypatch):
    monkeypatch.setattr(triton_packed, "_has_warp_groups", lambda device: True)
    check(name, 40, torch.float32, absent=0.2)


@pytest.mark.parametrize("name", ["int8", "int4:128", "fp8:block"])
def test_half_precision(name):
    for count in (3, 30):
        check(name, count, torch.float16)


def test_every_fp8_number_by_its_bits():
    bytes_OK = torch.arange(256, dtype=torch.uint8).where(torch.arange(256) % 128 != 127, 0).view(1, 4, 64)
    data = bytes_OK.view(torch.float8_e4m3fn)
    weights = PackedWeight(FORMATS["fp8:channel"], 64, (data, torch.ones(1, 4)))
    got = triton_packed._unpacked(Operand.of(weights), 1, None, torch.float32, 1)
    assert got.equal(data.float())


@pytest.mark.parametrize("name", ["int8", "int4:64"])
def test_columns_are_shared_by_programs(name):
    check(name, 5, torch.float32, settings=default_settings(5, 2.5, True) | {"parts": 3})


@pytest.mark.parametrize("count", [1, 9, 40])
def test_a_format_that_no_row_chooses_adds_nothing(count):
    """In a layer of several formats the kernels of each run, whether or not any row has a choice there."""
    check("int4:32", count, torch.float32, absent=2.0)
    if count == 1:
        check("int4:32", count, torch.float16, absent=2.0, settings=ROW)
