"""What compiled kernels do to rows between products: norm, gate, rotation, likeliest token; the pages of weights."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from mixtralkit.model.rope import rope_table
from mixtralkit.ops.attention.reference import rotate_and_store_reference
from mixtralkit.ops.cpu.attention import rotate_and_store_cpu
from mixtralkit.ops.cpu.build import kernels
from mixtralkit.ops.cpu.memory import PAGE, ask_for_large_pages
from mixtralkit.ops.cpu.products import best_token_cpu, gate_cpu, linear_cpu
from mixtralkit.ops.gate.reference import gate_reference
from mixtralkit.ops.norm.reference import rms_norm_reference
from mixtralkit.ops.sampling.reference import best_token_reference
from tests.configs import TOLERANCE
from tests.ops.test_cpu_products import DTYPES, random_tensor

needs_compiler = pytest.mark.skipif(kernels() is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 48, 1037])
def test_a_norm_in_front_of_a_product_is_that_of_the_reference(dtype, width) -> None:
    x_TI, w_OI = random_tensor(5, width, dtype=dtype, seed=0), random_tensor(11, width, dtype=dtype, seed=1)
    norm = (random_tensor(width, dtype=dtype, seed=2), 1e-5)
    expected = rms_norm_reference(x_TI, *norm).double() @ w_OI.double().t()
    found = linear_cpu(x_TI, w_OI, out_dtype=torch.float32, norm=norm)
    error = (found - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype] / 4
    assert linear_cpu(x_TI[3:4], w_OI, out_dtype=torch.float32, norm=norm).equal(found[3:4])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
def test_the_gate_is_that_of_the_reference(dtype, rows) -> None:
    x_TD, gate_ED = random_tensor(rows, 70, dtype=dtype, seed=rows), random_tensor(8, 70, dtype=dtype, seed=1)
    norm = (random_tensor(70, dtype=dtype, seed=2), 1e-5)
    found = gate_cpu(x_TD, gate_ED, 3, norm)
    normed_TD = rms_norm_reference(x_TD, *norm)
    torch.testing.assert_close(found.normed_TD, normed_TD, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    exact = gate_reference(found.normed_TD.double(), gate_ED.double(), 3)
    assert found.experts_TK.equal(exact.experts_TK)
    torch.testing.assert_close(found.logits_TE, exact.logits_TE, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weights_TK, exact.weights_TK, rtol=1e-4, atol=1e-4)
    assert gate_cpu(x_TD, gate_ED, 3).normed_TD.equal(x_TD)


@needs_compiler
def test_of_equal_logits_the_gate_takes_the_lower_expert() -> None:
    gated = gate_cpu(torch.ones(1, 4), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])[:, None].repeat(1, 4), 4)
    assert gated.experts_TK.tolist() == [[1, 3, 4, 0]]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_cache_are_those_of_the_reference(dtype) -> None:
    heads, kv_heads, head_dim, pages = 6, 2, 12, 5
    qkv_TQ = random_tensor(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=0)
    slots_T, positions_T = torch.tensor([1, -1, 0, 1]), torch.tensor([17, 3, 0, 18])
    tables_SM = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)
    rope_SC = rope_table(32, head_dim, 1e4, torch.device("cpu"))
    caches = [[torch.zeros(pages, kv_heads, 16, head_dim, dtype=dtype) for _ in range(2)] for _ in range(2)]
    rest = (tables_SM, slots_T, positions_T, rope_SC, heads)
    found_THC = rotate_and_store_cpu(qkv_TQ, *caches[0], *rest)
    expected_THC = rotate_and_store_reference(qkv_TQ, *caches[1], *rest)
    close = {"rtol": TOLERANCE[dtype], "atol": 1e-6}
    torch.testing.assert_close(found_THC[slots_T >= 0], expected_THC[slots_T >= 0], **close)
    torch.testing.assert_close(caches[0], caches[1], **close)
    assert all(cache.count_nonzero() for cache in caches[0])


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 5, 40, 1003])
def test_the_likeliest_token_is_that_of_the_reference(tokens) -> None:
    logits_NV = torch.stack([random_tensor(tokens, dtype=torch.float32, seed=s, scale=20.0).round() for s in range(6)])
    logits_NV[1] = -math.inf
    logits_NV[2, tokens // 2] = math.inf
    found, expected = best_token_cpu(logits_NV, 7), best_token_reference(logits_NV, 7)
    assert found.values_N.equal(expected.values_N)
    lowest_N = (logits_NV == expected.values_N[:, None]).int().argmax(-1)
    assert found.tokens_N.equal(lowest_N + 7)
    torch.testing.assert_close(found.logsumexp_N, expected.logsumexp_N, rtol=1e-5, atol=1e-5)
    logits_NV[3, tokens - 1] = math.nan
    hurt = best_token_cpu(logits_NV)
    assert hurt.logsumexp_N.isnan().tolist() == [False, False, False, True, False, False]
    assert 0 <= hurt.tokens_N[3] < tokens


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not THP.is_file() or "[never]" in THP.read_text(), reason="no large pages here")
def test_large_pages_are_asked_for_where_a_large_tensor_lies() -> None:
    large, small = torch.empty(4 * PAGE, dtype=torch.uint8), torch.ones(3)
    ask_for_large_pages([large[PAGE:], small])  # a view asks for the memory it is a part of
    large.fill_(1)
    middle, inside = large.data_ptr() + 2 * PAGE, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
            inside = first <= middle < last
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            break
    else:
        pytest.fail("the tensor lies nowhere")
    assert large.sum() == 4 * PAGE
