"""Products of small batches: both Triton kernels in the interpreter and the reference, against float64."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.moe.weights import FORMATS, PackedWeight
from mixtralkit.ops import linear as module
from mixtralkit.ops.linear import linear, linear_reference
from mixtralkit.ops.norm import rms_norm_reference

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
VECTOR = {"block_o": 4, "num_warps": 4, "early": 0}
MATRIX = {"block_o": 16, "block_i": 64, "columns": 128, "num_warps": 4, "num_stages": 3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * std).to(dtype)


def expected(x_TI, w_OI, norm=None, residual_TO=None) -> torch.Tensor:
    x_TI = (x_TI if norm is None else rms_norm_reference(x_TI, *norm)).double()
    y_TO = (x_TI[:, None] * w_OI.double()).sum(-1)
    return y_TO if residual_TO is None else y_TO + residual_TO.double()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "settings"),
    [
        (1, 96, 256, VECTOR),
        (1, 37, 160, VECTOR),  # neither fills its blocks
        (1, 8, 40, {"block_o": 16, "num_warps": 4, "early": 1}),
        (1, 37, 160, MATRIX),
        (5, 96, 256, MATRIX),
        (16, 33, 40, MATRIX),
        (19, 64, 72, {**MATRIX, "block_o": 32}),
        (7, 40, 320, {**MATRIX, "columns": 64}),  # stretches of one block, several of them
        (3, 48, 96, None),
        (1, 48, 96, None),
    ],
)
@pytest.mark.parametrize("extras", [(), ("norm",), ("residual",), ("norm", "residual", "out", "float32")])
def test_kernels(rows, outputs, inputs, settings, dtype, extras):
    from mixtralkit.ops.linear.triton import linear_small

    x_TI, w_OI = draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, std=0.1)
    norm = (draw(inputs, dtype=dtype), EPS) if "norm" in extras else None
    residual_TO = draw(rows, outputs, dtype=dtype) if "residual" in extras else None
    out_dtype = torch.float32 if "float32" in extras else None
    out = torch.full((rows, outputs), torch.nan, dtype=out_dtype) if "out" in extras else None
    y_TO = linear_small(x_TI, w_OI, norm, residual_TO, out, out_dtype, settings)
    assert y_TO.dtype == (out_dtype or dtype)
    assert y_TO.shape == (rows, outputs)
    assert out is None or y_TO is out
    assert_near(y_TO, expected(x_TI, w_OI, norm, residual_TO), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "settings"),
    [
        (1, 37, 160, VECTOR),
        (5, 40, 320, {**MATRIX, "columns": 64}),  # stretches; columns that are no whole units of int8
        (300, 33, 72, {**MATRIX, "block_o": 32, "columns": 128}),  # several blocks of rows, the last one not full
        (1, 24, 72, None),
        (3, 24, 72, None),
        (40, 24, 72, None),
        (600, 24, 72, None),  # unpacked
    ],
)
def test_kernels_of_packed_weights(rows, outputs, inputs, settings, name, dtype):
    from mixtralkit.ops.linear.triton import linear_small

    x_TI, norm = draw(rows, inputs, dtype=dtype), (draw(inputs, dtype=dtype), EPS)
    packed, residual_TO = FORMATS[name].quantize(draw(outputs, inputs, std=0.1)), draw(rows, outputs, dtype=dtype)
    y_TO = linear_small(x_TI, packed, norm, residual_TO, settings=settings)
    assert y_TO.dtype == dtype
    assert_near(y_TO, expected(x_TI, packed.float(), norm, residual_TO), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_number_of_eight_bits(dtype):
    """Both zeros, the least numbers and the largest; NaN is none that rounding makes."""
    from mixtralkit.ops.linear.triton import _unpacked

    numbers = torch.arange(256, dtype=torch.uint8).where(torch.arange(256) % 128 != 127, 0).view(4, 64)
    for name, data in (("int8", numbers.view(torch.int8)), ("fp8", numbers.view(torch.float8_e4m3fn))):
        packed = PackedWeight(FORMATS[name], 64, (data, torch.ones(4, 1)))
        assert _unpacked(packed, dtype).float().equal(data.float())


def test_kernels_take_strided_rows():
    from mixtralkit.ops.linear.triton import linear_small

    wide_OI = draw(20, 90)
    for rows, settings in ((1, VECTOR), (2, MATRIX), (2, {**MATRIX, "columns": 64})):
        wide_TI, wide_TO = draw(rows, 100), torch.full((rows, 40), torch.nan)
        x_TI, w_OI = wide_TI[:, 8:72], wide_OI[:, 16:80]
        out_TO = linear_small(x_TI, w_OI, residual_TO=wide_TI[:, :20], out=wide_TO[:, 10:30], settings=settings)
        assert_near(out_TO, expected(x_TI, w_OI, residual_TO=wide_TI[:, :20]), 1e-5)
        assert wide_TO[:, :10].isnan().all()
        assert wide_TO[:, 30:].isnan().all()


def test_settings_for_fewer_rows_are_not_taken_for_more(monkeypatch):
    """The vector kernel has a row limit; settings measured at one row may be the nearest there are."""
    import mixtralkit.ops.linear.triton as linear_triton

    monkeypatch.setattr(linear_triton, "tuned", lambda *args, **shape: dict(VECTOR))
    x_TI, w_OI = draw(9, 64, dtype=torch.float16), draw(32, 64, dtype=torch.float16)
    assert_near(linear_triton.linear_small(x_TI, w_OI), expected(x_TI, w_OI), TOLERANCE[torch.float16])


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 1024), (40, 160)])
def test_candidates_are_settings_of_the_launcher(rows, outputs, inputs):
    from mixtralkit.ops.linear.triton import candidates, default_settings

    found = [settings for size in (1, 2) for settings in candidates(rows, outputs, inputs, size)]
    found += [default_settings(rows, outputs, inputs, size) for size in (1, 2)]
    assert {"library": 1} in found
    for settings in found:
        keys = settings.keys() - {"library"}
        assert not keys or {"block_o", "num_warps", "early"} == keys or {"block_i", "columns", "num_stages"} < keys
        assert settings.get("columns", 0) % settings.get("block_i", 1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reference_and_library(dtype):
    x_TI, w_OI, residual_TO = draw(5, 40, dtype=dtype), draw(24, 40, dtype=dtype), draw(5, 24, dtype=dtype)
    norm = (draw(40, dtype=dtype), EPS)
    wanted = expected(x_TI, w_OI, norm, residual_TO)
    out = torch.full((5, 24), torch.nan, dtype=dtype)
    assert linear(x_TI, w_OI, norm, residual_TO, out) is out
    assert_near(out, wanted, TOLERANCE[dtype])
    assert_near(module.linear_library(x_TI, w_OI, norm, residual_TO, None, dtype), wanted, TOLERANCE[dtype])
    assert linear(x_TI, w_OI, out_dtype=torch.float32).dtype == torch.float32
    assert linear(x_TI[:0], w_OI).shape == (0, 24)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8:tensor", "int4:32", "int4:32:zeros"])
def test_reference_of_packed_weights(name, monkeypatch):
    """More outputs than are numbers at a time, columns that are no whole units."""
    monkeypatch.setattr("mixtralkit.ops.linear.reference.TILE", 16)
    x_TI, norm, residual_TO = draw(3, 72), (draw(72), EPS), draw(3, 40)
    packed = FORMATS[name].quantize(draw(40, 72))
    assert packed.shape == (40, 72)
    found = linear_reference(x_TI, packed, norm, residual_TO)
    torch.testing.assert_close(found, linear_reference(x_TI, packed.float(), norm, residual_TO), rtol=1e-6, atol=1e-5)
    assert_near(linear(x_TI, packed, norm, residual_TO), found.double(), 1e-3)  # compiled kernels round x to 16 bits
    out = torch.empty(3, 40, dtype=torch.float16)
    assert linear(x_TI.half(), packed, None, residual_TO.half(), out) is out
    tolerance = 0.015 if name.startswith("int4") else TOLERANCE[torch.float16]  # beside 4 bits to 8
    assert_near(out, expected(x_TI.half(), packed.float(), None, residual_TO.half()), tolerance)


def test_reference_keeps_gradients():
    x_TI, w_OI = draw(3, 8).requires_grad_(), draw(4, 8).requires_grad_()
    linear_reference(x_TI, w_OI, norm=(torch.ones(8), EPS)).square().sum().backward()
    assert x_TI.grad.abs().sum() > 0
    assert w_OI.grad.abs().sum() > 0
