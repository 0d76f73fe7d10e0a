"""Weights of 8 and 4 bits: rounding, packing, and their compiled kernels against the reference's weights in float64."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.moe.weights import Int4, Int8, parse_format
from mixtralkit.ops.cpu.build import kernels
from mixtralkit.ops.cpu.packed import pack_int4
from mixtralkit.ops.cpu.products import expert_sum_cpu, linear_cpu
from tests.ops.test_cpu_products import experts_float64, random_tensor

needs_compiler = pytest.mark.skipif(kernels() is None, reason="needs a C++ compiler")
FORMATS = [Int8(), Int4(32), Int4(128), Int4(32, zero_points=True), Int4(128, zero_points=True)]
names = [one.name for one in FORMATS]


@pytest.mark.parametrize("fmt", FORMATS, ids=names)
def test_weights_round_to_the_nearest_step_and_pack_without_loss(fmt) -> None:
    w = random_tensor(3, 5, 200, dtype=torch.float32, seed=0)
    w[0, 0] = 0.0
    w[1, 1, :128] = w[1, 1, :128].abs()  # a group without negative weights
    tensors = fmt.quantize(w)
    shapes = fmt.tensors(5, 200)
    assert {name: ((3, *shape), dtype) for name, (shape, dtype) in shapes.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    rounded = fmt.dequantize(tensors)
    assert rounded[0, 0].eq(0).all()
    step = tensors["scale"].float().abs()
    steps = step[..., None].expand(3, 5, 200) if step.dim() == 2 else step.repeat_interleave(fmt.group, -1)[..., :200]
    # without zero points the 16 steps are -8 … 7: the opposite of the largest weight may be a whole step away
    furthest = 1.0 if isinstance(fmt, Int4) else 0.5
    assert ((rounded - w).abs() <= furthest * steps * 1.01).all()
    assert ((rounded - w).abs() <= 0.5 * steps * 1.01).float().mean() > 0.95
    packed = fmt.pack(tensors)
    assert packed.shape == w.shape
    assert packed.float().equal(rounded)
    assert packed[1].float().equal(rounded[1])


def test_bytes_are_those_of_the_packed_tensors() -> None:
    for fmt in FORMATS:
        assert fmt.pack(fmt.quantize(torch.randn(7, 256))).nbytes == fmt.bytes(7, 256)


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=names)
@pytest.mark.parametrize("width", [1, 48, 160, 1037, 2176])
def test_linear_is_the_product_with_the_rounded_weights(fmt, width) -> None:
    for rows, outputs in [(1, 1), (2, 37), (3, 5), (4, 33), (7, 31), (9, 3), (53, 38)]:
        x_TI = random_tensor(rows, width, dtype=torch.float32, seed=rows)
        w = fmt.pack(fmt.quantize(random_tensor(outputs, width, dtype=torch.float32, seed=width)))
        expected = x_TI.double() @ w.float().double().t()
        residual_TO = random_tensor(rows, outputs, dtype=torch.bfloat16, seed=5)
        found = linear_cpu(x_TI, w, residual_TO)
        assert (found - (expected + residual_TO)).abs().max() < 2e-4 * width**0.5


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=names)
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_expert_sum_is_the_sum_of_the_choices(fmt, rows) -> None:
    generator = torch.Generator().manual_seed(rows)
    slots_RK = torch.rand(rows, 5, generator=generator).argsort(-1)[:, :2] - 1
    slots_RK[slots_RK == 2] = 1  # an expert without rows
    weights_RK = torch.rand(rows, 2, generator=generator)
    w13 = fmt.pack(fmt.quantize(random_tensor(4, 2 * 70, 130, dtype=torch.float32, seed=1, scale=0.1)))
    w2 = fmt.pack(fmt.quantize(random_tensor(4, 130, 70, dtype=torch.float32, seed=2, scale=0.1)))
    x_RD, residual_RD = (random_tensor(rows, 130, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    expected = experts_float64(x_RD, slots_RK, weights_RK, w13.float(), w2.float(), residual_RD)
    found = expert_sum_cpu(x_RD, slots_RK, weights_RK, w13, w2, residual_RD)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=names)
def test_a_row_of_few_depends_on_no_other(fmt) -> None:
    w = fmt.pack(fmt.quantize(random_tensor(35, 500, dtype=torch.float32, seed=0)))
    x_TI = random_tensor(8, 500, dtype=torch.float32, seed=1)
    whole = linear_cpu(x_TI, w)
    for first, rows in [(0, 1), (3, 2), (4, 3), (1, 7)]:
        assert linear_cpu(x_TI[first : first + rows], w).equal(whole[first : first + rows])


def test_names_are_read_back_and_others_refused() -> None:
    for fmt in FORMATS:
        assert parse_format(fmt.name) == fmt
    assert parse_format("int4") == Int4(32)
    for text in ("int3", "int8:32", "int4:64", "int4:32:zero", ""):
        with pytest.raises(ValueError, match="quantize"):
            parse_format(text)
    with pytest.raises(ValueError, match=r"group \(64\)"):
        pack_int4(torch.zeros(1, 64, dtype=torch.uint8), torch.zeros(1, 1), None, 64)
