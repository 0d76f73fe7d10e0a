"""Compiled kernels on weights of 8 and 4 bits, against the reference's weights in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtralkit.moe.weights import FORMATS as ALL
from mixtralkit.moe.weights import Int4, PackedWeight
from mixtralkit.ops.cpu.build import kernels
from mixtralkit.ops.cpu.products import expert_sum_cpu, linear_cpu
from mixtralkit.ops.experts.reference import expert_sum_reference
from tests.ops.test_cpu_products import experts_float64, random_tensor

needs_compiler = pytest.mark.skipif(kernels() is None, reason="needs a C++ compiler")
FORMATS = [one for name, one in ALL.items() if one.cpu_type is not None and name == one.name]
names = [one.name for one in FORMATS]


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=names)
@pytest.mark.parametrize("width", [1, 48, 160, 1037, 2176])
def test_linear_is_the_product_with_the_rounded_weights(fmt, width) -> None:
    for rows, outputs in [(1, 1), (2, 37), (3, 5), (4, 33), (7, 31), (9, 3), (53, 38)]:
        x_TI = random_tensor(rows, width, dtype=torch.float32, seed=rows)
        w = fmt.quantize(random_tensor(outputs, width, dtype=torch.float32, seed=width))
        expected = x_TI.double() @ w.float().double().t()
        residual_TO = random_tensor(rows, outputs, dtype=torch.bfloat16, seed=5)
        found = linear_cpu(x_TI, w, residual_TO)
        assert (found - (expected + residual_TO)).abs().max() < 2e-4 * width**0.5


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=names)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 48, 160, 1037, 4224])
def test_half_precision_is_rounded_to_8_bits_at_most(fmt, dtype, width) -> None:
    """Sizes of groups and outputs differ by a thousand; 8 bits lose 0.6% of random numbers, as squares add up."""
    for rows, outputs in [(1, 1), (2, 37), (3, 5), (4, 33), (7, 31)]:
        x_TI = random_tensor(rows, width, dtype=dtype, seed=rows)
        x_TI[:, 64:96] *= 30
        x_TI[2:3] = 0
        w_OI = random_tensor(outputs, width, dtype=torch.float32, seed=width)
        w_OI[:, 32:96] *= torch.tensor([0.03, 30]).repeat_interleave(32)[: max(0, width - 32)]
        w = fmt.quantize(w_OI * torch.logspace(-1, 1, outputs)[:, None])
        w_OI = w.float().double()
        squares = x_TI.double().square() @ w_OI.square().t()
        found = linear_cpu(x_TI, w, out_dtype=torch.float32)
        assert (found - x_TI.double() @ w_OI.t()).norm() <= 0.015 * squares.sum().sqrt()
        assert not found[2:3].any()


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=names)
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_expert_sum_is_the_sum_of_the_choices(fmt, rows) -> None:
    generator = torch.Generator().manual_seed(rows)
    slots_RK = torch.rand(rows, 5, generator=generator).argsort(-1)[:, :2] - 1
    slots_RK[slots_RK == 2] = 1  # an expert without rows
    weights_RK = torch.rand(rows, 2, generator=generator)
    w13 = fmt.quantize(random_tensor(4, 2 * 70, 130, dtype=torch.float32, seed=1, scale=0.1))
    w13 = PackedWeight(fmt, 130, w13.tensors, stacked=2)
    w2 = fmt.quantize(random_tensor(4, 130, 70, dtype=torch.float32, seed=2, scale=0.1))
    x_RD, residual_RD = (random_tensor(rows, 130, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    expected = experts_float64(x_RD, slots_RK, weights_RK, w13.float(), w2.float(), residual_RD)
    whole = expert_sum_cpu(x_RD.float(), slots_RK, weights_RK, w13, w2, residual_RD.float())
    torch.testing.assert_close(whole.double(), expected, rtol=1e-3, atol=1e-3)
    found = expert_sum_cpu(x_RD, slots_RK, weights_RK, w13, w2, residual_RD)
    if not isinstance(fmt, Int4):  # beside which x has 8 bits
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
    assert (found - expected).norm() <= 0.015 * (expected - residual_RD).norm() + 0.004 * expected.norm()
    storage_S = torch.tensor([5, 0, 3, 2])
    larger13, larger2 = (
        replace(w, tensors=tuple(t.new_zeros(6, *t.shape[1:]).index_copy_(0, storage_S, t) for t in w.tensors))
        for w in (w13, w2)
    )
    assert expert_sum_cpu(x_RD, slots_RK, weights_RK, larger13, larger2, residual_RD, storage_S=storage_S).equal(found)
    exact = expert_sum_reference(
        x_RD.float(), slots_RK, weights_RK, larger13, larger2, residual_RD.float(), None, storage_S
    )
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("fmt", FORMATS, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_other_row_and_no_thread(fmt, dtype) -> None:
    w = fmt.quantize(random_tensor(35, 2500, dtype=torch.float32, seed=0))
    x_TI = random_tensor(150, 2500, dtype=dtype, seed=1)
    whole = linear_cpu(x_TI, w)
    for first, rows in [(0, 1), (3, 2), (4, 3), (1, 7), (60, 9), (7, 65)]:
        assert linear_cpu(x_TI[first : first + rows], w).equal(whole[first : first + rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert linear_cpu(x_TI, w).equal(whole)
    finally:
        torch.set_num_threads(threads)
