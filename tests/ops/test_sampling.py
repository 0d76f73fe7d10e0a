"""The likeliest token: the Triton kernels in the interpreter and the reference, against loops and whole rows."""

from __future__ import annotations

import math

import pytest
import torch

from mixtralkit.ops.sampling import best_token, best_token_reference, merge_best, merge_best_reference


def draw(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows + vocab)) * 5).to(dtype)


def by_triton(logits_NV: torch.Tensor, first_token: int = 0, piece: int = 64):
    from mixtralkit.ops.sampling.triton import best_of_rows

    return best_of_rows(logits_NV, first_token, piece)


def merged_by_triton(values_WN, tokens_WN, logsumexp_WN):
    from mixtralkit.ops.sampling.triton import merge_parts

    best = merge_parts(values_WN, tokens_WN, logsumexp_WN, relative=True)
    return best.tokens_N, best.values_N


@pytest.mark.parametrize("find", [best_token, by_triton])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 64), (2, 200), (35, 130)])
def test_best_token(find, dtype, rows, vocab):
    logits_NV = draw(rows, vocab, dtype)
    best = find(logits_NV, 1000)
    assert (best.tokens_N.dtype, best.values_N.dtype, best.logsumexp_N.dtype) == (torch.int64, *[torch.float32] * 2)
    for n, row in enumerate(logits_NV.double().tolist()):
        assert best.tokens_N[n] == 1000 + row.index(max(row))
        assert best.values_N[n] == max(row)
        assert best.logsumexp_N[n] == pytest.approx(math.log(sum(math.exp(v) for v in row)), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("find", [best_token, by_triton])
def test_of_equal_logits_the_lowest_token(find):
    logits_NV = torch.zeros(3, 300)
    logits_NV[1, [70, 71, 200]] = 2.0
    logits_NV[2, [299, 130]] = 2.0
    assert find(logits_NV).tokens_N.tolist() == [0, 70, 130]


def test_kernel_takes_strided_rows():
    wide_NV = draw(4, 300)
    for logits_NV in (wide_NV[::2, 10:210], wide_NV.T[:, :3]):
        for actual, expected in zip(by_triton(logits_NV), best_token_reference(logits_NV), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("find", [best_token, by_triton])
def test_rows_that_are_not_finite(find):
    """A NaN or an infinity anywhere shows in the log-probability; tokens stay inside the vocabulary."""
    logits_NV = draw(4, 200)
    logits_NV[0, 150] = torch.nan
    logits_NV[1] = torch.nan
    logits_NV[2, 3] = torch.inf
    logits_NV[3, :180] = -torch.inf
    best = find(logits_NV)
    assert ((best.tokens_N >= 0) & (best.tokens_N < 200)).all()
    assert (best.values_N - best.logsumexp_N).isfinite().tolist() == [False, False, False, True]
    torch.testing.assert_close(best.logsumexp_N[3], logits_NV[3].logsumexp(-1))


@pytest.mark.parametrize("merge", [merge_best, merge_best_reference, merged_by_triton])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_merging_parts_is_the_whole(merge, ranks):
    logits_NV = draw(35, 96)
    logits_NV[4, [5, 40, 90]] = 30.0  # equal ones in several parts
    parts, first = [], 0
    for part_NV in logits_NV.tensor_split(ranks, dim=1):
        parts.append(best_token(part_NV, first))
        first += part_NV.shape[1]
    tokens_WN, values_WN, logsumexp_WN = (torch.stack(column) for column in zip(*parts, strict=True))
    tokens_N, logprobs_N = merge(values_WN, tokens_WN, logsumexp_WN)
    assert tokens_N.dtype == torch.int64
    assert torch.equal(tokens_N, logits_NV.argmax(-1))
    assert tokens_N[4] == 5
    torch.testing.assert_close(logprobs_N, logits_NV.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("merge", [merge_best_reference, merged_by_triton])
def test_merging_keeps_nan_and_stays_in_the_vocabulary(merge):
    values_WN = torch.tensor([[1.0, torch.nan], [2.0, torch.nan]])
    tokens_WN, logsumexp_WN = torch.tensor([[3, 4], [103, 104]]), torch.tensor([[2.0, torch.nan], [3.0, torch.nan]])
    tokens_N, logprobs_N = merge(values_WN, tokens_WN, logsumexp_WN)
    assert tokens_N[0] == 103
    assert tokens_N[1] in (4, 104)
    assert logprobs_N.isnan().tolist() == [False, True]


def test_no_rows():
    best = best_token(torch.empty(0, 8))
    assert best.tokens_N.shape == best.values_N.shape == best.logsumexp_N.shape == (0,)
