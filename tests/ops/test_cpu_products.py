"""The compiled CPU kernels against float64 products: odd sizes, every dtype, empty experts, any number of threads."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.ops.cpu.build import kernels
from mixtralkit.ops.cpu.products import expert_sum_cpu, linear_cpu, read_cpu
from mixtralkit.ops.runtime import runs_cpu
from tests.configs import TOLERANCE

needs_compiler = pytest.mark.skipif(kernels() is None, reason="needs a C++ compiler")
DTYPES = list(TOLERANCE)


def random_tensor(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def experts_float64(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD=None) -> torch.Tensor:
    """One choice after the other."""
    y_RD = torch.zeros(x_RD.shape, dtype=torch.float64) if residual_RD is None else residual_RD.double()
    for row, (slots, weights) in enumerate(zip(slots_RK.tolist(), weights_RK.double(), strict=True)):
        for slot, weight in zip(slots, weights, strict=True):
            if slot >= 0:
                gate, up = (w13_SGD[slot].double() @ x_RD[row].double()).chunk(2)
                y_RD[row] += weight * (w2_SDF[slot].double() @ (torch.nn.functional.silu(gate) * up))
    return y_RD


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 64, 1040, 2085])
def test_linear_is_the_product_of_any_size(dtype, width) -> None:
    for rows, outputs in [(1, 1), (2, 37), (3, 5), (4, 64), (5, 33), (7, 31), (25, 3), (53, 38)]:
        x_TI = random_tensor(rows, width, dtype=dtype, seed=rows)
        w_OI = random_tensor(outputs, width, dtype=dtype, seed=width)
        expected = x_TI.double() @ w_OI.double().t()
        found = linear_cpu(x_TI, w_OI)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype] / 4, atol=1e-3)
        assert linear_cpu(x_TI, w_OI, out_dtype=torch.float32).sub(expected).abs().max() < 1e-3


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_strides_and_rounds_once_after_the_residual(dtype) -> None:
    x_TI, w_OI = random_tensor(9, 90, dtype=dtype, seed=0)[:, 7:80], random_tensor(20, 100, dtype=dtype, seed=1)[:, :73]
    residual_TO, out = random_tensor(9, 20, dtype=torch.float32, seed=2), torch.zeros(9, 50, dtype=dtype)[:, 10:30]
    assert linear_cpu(x_TI, w_OI, residual_TO, out) is out
    exact = linear_cpu(x_TI, w_OI, out_dtype=torch.float32) + residual_TO
    assert out.equal(exact.to(dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other_row_and_no_thread(dtype) -> None:
    x_TI, w_OI = random_tensor(61, 1500, dtype=dtype, seed=0), random_tensor(75, 1500, dtype=dtype, seed=1)
    whole = linear_cpu(x_TI, w_OI)
    for first, rows in [(0, 1), (3, 2), (8, 3), (20, 4), (0, 13), (30, 26)]:
        assert linear_cpu(x_TI[first : first + rows], w_OI).equal(whole[first : first + rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert linear_cpu(x_TI, w_OI).equal(whole)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "hidden"), [(1, 48, 56), (5, 33, 17), (40, 1030, 9), (70, 24, 41)])
def test_expert_sum_is_the_sum_of_the_choices(dtype, rows, dim, hidden) -> None:
    generator = torch.Generator().manual_seed(rows)
    slots_RK = torch.rand(rows, 5, generator=generator).argsort(-1)[:, :2] - 1  # -1 elsewhere, slots 0 to 3
    slots_RK[slots_RK == 2] = 1  # an expert without rows, and rows that choose one twice
    weights_RK = torch.rand(rows, 2, generator=generator)
    w13_SGD = random_tensor(4, 2 * hidden, dim, dtype=dtype, seed=1, scale=dim**-0.5)
    w2_SDF = random_tensor(4, dim, hidden, dtype=dtype, seed=2, scale=hidden**-0.5)
    x_RD, residual_RD = random_tensor(rows, dim, dtype=dtype, seed=3), random_tensor(rows, dim, dtype=dtype, seed=4)
    for residual in (None, residual_RD):
        expected = experts_float64(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual)
        found = expert_sum_cpu(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual)
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype] / 4, atol=TOLERANCE[dtype] / 4)
    one = expert_sum_cpu(x_RD[-1:], slots_RK[-1:], weights_RK[-1:], w13_SGD, w2_SDF, residual_RD[-1:])
    assert one.equal(found[-1:])
    storage_S = torch.tensor([5, 0, 3, 2])
    larger13_SGD, larger2_SDF = (w.new_zeros(6, *w.shape[1:]).index_copy_(0, storage_S, w) for w in (w13_SGD, w2_SDF))
    scattered = expert_sum_cpu(x_RD, slots_RK, weights_RK, larger13_SGD, larger2_SDF, residual_RD, storage_S=storage_S)
    assert scattered.equal(found)


@needs_compiler
def test_rows_that_choose_nothing_here_are_their_residual() -> None:
    x_RD, slots_RK = torch.ones(3, 8), torch.full((3, 2), -1)
    w13_SGD, w2_SDF = torch.ones(2, 6, 8), torch.ones(2, 8, 3)
    assert expert_sum_cpu(x_RD, slots_RK, torch.ones(3, 2), w13_SGD, w2_SDF).equal(torch.zeros(3, 8))
    assert expert_sum_cpu(x_RD, slots_RK, torch.ones(3, 2), w13_SGD, w2_SDF, x_RD).equal(x_RD)


@needs_compiler
def test_every_half_precision_number_is_read_and_written_as_torch_does() -> None:
    """Subnormal numbers, infinities and ties to even, by a product with the identity."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = bits.view(dtype)
        numbers = numbers[numbers.isfinite()]
        x_TI = numbers.view(-1, 1)
        one = torch.ones(1, 1)
        assert linear_cpu(x_TI, one, out_dtype=torch.float32).equal(x_TI.float())
        between = (x_TI.float() * (1 + torch.linspace(-0.01, 0.01, len(x_TI))[:, None])).contiguous()
        assert linear_cpu(between, one, out_dtype=dtype).equal(between.to(dtype))
        assert linear_cpu(one, x_TI, out_dtype=torch.float32).equal(x_TI.float().t())
        infinite = torch.tensor([[torch.inf], [-torch.inf], [1e38]])
        assert linear_cpu(infinite, one, out_dtype=dtype).equal(infinite.to(dtype))


@needs_compiler
def test_reading_sums_all() -> None:
    assert read_cpu(torch.ones(200_000)) == 200_000


def test_guard_leaves_gradients_autocast_and_empty_tensors_to_the_reference() -> None:
    x_TI, w_OI = torch.ones(2, 8), torch.ones(4, 8)
    assert runs_cpu(x_TI, w_OI) == (kernels() is not None)
    assert not runs_cpu(x_TI, w_OI.requires_grad_())
    with torch.no_grad():
        assert runs_cpu(x_TI, w_OI) == (kernels() is not None)
        assert not runs_cpu(x_TI[:0], w_OI)
        assert not runs_cpu(x_TI.double(), w_OI)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not runs_cpu(x_TI, w_OI)
