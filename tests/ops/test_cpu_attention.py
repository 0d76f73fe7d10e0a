"""The compiled attention against a softmax in float64 over each row's keys."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.ops.cpu.attention import attention_cpu, ragged_attention_cpu
from mixtralkit.ops.cpu.build import kernels
from tests.configs import TOLERANCE
from tests.ops.pages import paged
from tests.ops.test_cpu_products import random_tensor

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs a C++ compiler")


def _float64(q_THC, keys_SJTC, values_SJTC, slots_T, positions_T, window=None) -> torch.Tensor:
    out_THC = torch.zeros(q_THC.shape, dtype=torch.float64)
    shared = q_THC.shape[1] // keys_SJTC.shape[1]
    for row, (slot, position) in enumerate(zip(slots_T.tolist(), positions_T.tolist(), strict=True)):
        first = 0 if window is None else max(0, position + 1 - window)
        for head in range(q_THC.shape[1] if slot >= 0 else 0):
            at = (slot, head // shared, slice(first, position + 1))
            keys_SC, values_SC = keys_SJTC[at].double(), values_SJTC[at].double()
            scores_S = keys_SC @ q_THC[row, head].double() * q_THC.shape[2] ** -0.5
            out_THC[row, head] = scores_S.softmax(0) @ values_SC
    return out_THC


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 16), (6, 2, 12), (8, 8, 5), (5, 1, 128)])
@pytest.mark.parametrize(("window", "page_size"), [(None, 16), (1, 32), (70, 64), (None, 256)])
def test_any_rows_attend_to_their_slots(dtype, heads, kv_heads, head_dim, window, page_size) -> None:
    q_THC = random_tensor(7, heads, head_dim, dtype=dtype, seed=0, scale=3.0)
    cache = random_tensor(2, 3, kv_heads, 200, head_dim, dtype=dtype, seed=1)
    keys_SJTC, values_SJTC = cache.unbind(0)
    slots_T = torch.tensor([2, 0, 1, -1, 0, 1, 2])
    positions_T = torch.tensor([0, 199, 63, 5, 64, 128, 63])
    written = torch.tensor([200, 129, 64])[:, None] > torch.arange(200)  # NaN behind that
    cache = paged(*(x.masked_fill(~written[:, None, :, None], float("nan")) for x in cache), page_size)
    found = attention_cpu(q_THC, *cache, slots_T, positions_T, window)
    expected = _float64(q_THC, keys_SJTC, values_SJTC, slots_T, positions_T, window)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype] / 4, atol=TOLERANCE[dtype] / 4)
    assert attention_cpu(q_THC[4:5], *cache, slots_T[4:5], positions_T[4:5], window).equal(found[4:5])


def test_spans_are_the_rows_at_their_positions() -> None:
    q_THC = random_tensor(9, 4, 16, dtype=torch.float32, seed=0)
    keys_SJTC, values_SJTC = random_tensor(2, 3, 2, 40, 16, dtype=torch.float32, seed=1).unbind(0)
    slots_T = torch.tensor([1, 1, 1, 0, 2, 2, 2, 2, 2])
    positions_T = torch.tensor([0, 1, 2, 30, 8, 9, 10, 11, 12])
    found = ragged_attention_cpu(q_THC, *paged(keys_SJTC, values_SJTC, 16), [(1, 0, 3), (0, 30, 1), (2, 8, 5)])
    torch.testing.assert_close(
        found.double(), _float64(q_THC, keys_SJTC, values_SJTC, slots_T, positions_T), rtol=1e-5, atol=1e-5
    )


def test_large_scores_do_not_overflow() -> None:
    q_THC = torch.full((1, 1, 8), 100.0)
    keys_SJTC = torch.linspace(-100, 100, 80).view(1, 1, 80, 1).expand(1, 1, 80, 8).contiguous()
    values_SJTC = torch.arange(80.0).view(1, 1, 80, 1).expand(1, 1, 80, 8).contiguous()
    found = attention_cpu(q_THC, *paged(keys_SJTC, values_SJTC, 16), torch.tensor([0]), torch.tensor([79]))
    assert found.eq(79).all()
