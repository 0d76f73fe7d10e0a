"""Sums over ranks with residual and norm: the exchange in Triton's interpreter, and the reference over gloo ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from mixtralkit.distributed import RankContext, SymmetricMemory
from mixtralkit.ops.all_reduce import EMPTY_WORDS, ReducerMemory, RowReducer, add_norm_reference
from mixtralkit.ops.norm import rms_norm
from tests.ranks import run_ranks

pytest.importorskip("triton")
EPS = 1e-5
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 4e-3}}


def _parts(ranks: int, rows: int, dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[W, T, D], with zeros of both signs, which the exchange must tell from rows that have not arrived."""
    parts = torch.randn(ranks, rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    parts[:, :, ::5], parts[:, :, 1::7] = -0.0, 0.0
    return parts


def _residual_and_weight(rows: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(rows, dim, generator=generator).to(dtype), torch.rand(dim, generator=generator).to(dtype)


def _check(x, normed, parts, residual, weight) -> None:
    wanted = parts.double().sum(0) + residual.double()
    torch.testing.assert_close(x.double(), wanted, **TOLERANCE[x.dtype])
    wanted = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    torch.testing.assert_close(normed.double(), wanted, **TOLERANCE[x.dtype])


def _memory(ranks: int, rank: int, rows: int, dim: int, dtype: torch.dtype) -> tuple[ReducerMemory, torch.Tensor]:
    """A rank's memory, and every rank's memory as bits [W, places, D]."""
    word, empty = EMPTY_WORDS[dtype.itemsize]
    words = torch.full((ranks, ReducerMemory.places(ranks, rows, rows), dim), empty, dtype=word)
    memory = SymmetricMemory(words[rank], rank, tuple(own.data_ptr() for own in words))
    return ReducerMemory(memory, rows, rows, torch.zeros(2 * rows, dtype=torch.int32)), words


def _one_trip(words_PD: torch.Tensor, ranks: int, few: int) -> torch.Tensor:
    return words_PD[: 2 * ranks * few].unflatten(0, (2, ranks, few))


def _two_trips(words_PD: torch.Tensor, ranks: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts [2, W, groups, D] and finished rows [2, rows, D]."""
    words_PD = words_PD[2 * ranks * rows :]
    return words_PD[: -2 * rows].unflatten(0, (2, ranks, -1)), words_PD[-2 * rows :].unflatten(0, (2, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("ranks", "rank", "rows", "dim"), [(2, 1, 3, 48), (3, 0, 2, 40), (4, 2, 1, 256)])
def test_one_trip_sends_adds_and_leaves_the_memory_empty(ranks, rank, rows, dim, dtype):
    from mixtralkit.ops.all_reduce.triton import sum_rows

    parts, (residual, weight) = _parts(ranks, rows, dim, dtype), _residual_and_weight(rows, dim, dtype)
    memory, words_W = _memory(ranks, rank, rows + 1, dim, dtype)
    turns = [1] + [0] * (rows - 1)  # rows take turns by themselves
    memory.turns_R[0] = 1
    peers = sorted(set(range(ranks)) - {rank})
    for row, turn in enumerate(turns):
        for peer in peers:
            _one_trip(words_W[rank], ranks, rows + 1)[turn, peer, row] = (parts[peer, row] + 0.0).view(words_W.dtype)
    x, normed = sum_rows(parts[rank], residual, (weight, EPS), memory, {"two_trips": 0, "num_warps": 4})
    _check(x, normed, parts, residual, weight)
    assert memory.turns_R.tolist() == [0] + [1] * (rows - 1) + [0] * (rows + 2)
    for row, turn in enumerate(turns):
        for peer in peers:
            sent = _one_trip(words_W[peer], ranks, rows + 1)[turn, rank, row]
            assert torch.equal(sent.view(dtype), parts[rank, row])
            sent.fill_(EMPTY_WORDS[dtype.itemsize][1])
    assert (words_W == EMPTY_WORDS[dtype.itemsize][1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_trips_add_own_rows_and_take_the_others_as_they_come(dtype):
    from mixtralkit.ops.all_reduce.triton import sum_rows

    ranks, rank, rows, dim = 3, 1, 5, 40
    parts, (residual, weight) = _parts(ranks, rows, dim, dtype), _residual_and_weight(rows, dim, dtype)
    memory, words_W = _memory(ranks, rank, rows, dim, dtype)
    mine, finished = _two_trips(words_W[rank], ranks, rows)
    done = (parts.float().sum(0) + residual.float()).to(dtype) + 0.0
    for row in range(rows):
        if row % ranks == rank:
            for peer in (0, 2):
                mine[0, peer, row // ranks] = (parts[peer, row] + 0.0).view(words_W.dtype)
        else:
            finished[0, row] = done[row].view(words_W.dtype)
    x, normed = sum_rows(parts[rank], residual, (weight, EPS), memory, {"two_trips": 1, "num_warps": 4})
    _check(x, normed, parts, residual, weight)
    empty = EMPTY_WORDS[dtype.itemsize][1]
    assert (words_W[rank] == empty).all()
    for peer in (0, 2):
        theirs, finished = _two_trips(words_W[peer], ranks, rows)
        for row in range(rows):
            if row % ranks == rank:
                assert torch.equal(finished[0, row].view(dtype), x[row])
                finished[0, row] = empty
            elif row % ranks == peer:
                assert torch.equal(theirs[0, rank, row // ranks].view(dtype), parts[rank, row])
                theirs[0, rank, row // ranks] = empty
    assert (words_W == empty).all()


def _exchange_many(context: RankContext, folder: str, rows: int, dim: int) -> list[torch.Tensor]:
    """Calls of changing size and way, some in several launches, between processes that share memory."""
    from mixtralkit.ops.all_reduce.triton import sum_rows

    ranks, dtype = context.world_size, torch.float32
    word, empty = EMPTY_WORDS[dtype.itemsize]
    size = ReducerMemory.places(ranks, rows, rows) * dim
    words_W = [torch.from_file(f"{folder}/{r}", shared=True, size=size, dtype=word) for r in range(ranks)]
    words_W[context.rank].fill_(empty)
    context.barrier()
    memory = SymmetricMemory(words_W[context.rank], context.rank, tuple(words.data_ptr() for words in words_W))
    memory = ReducerMemory(memory, rows, rows, torch.zeros(2 * rows, dtype=torch.int32))
    found = []
    for call, (count, two_trips) in enumerate([(1, 0), (3, 1), (2, 0), (2, 0), (8, 1), (3, 0), (1, 1), (9, 1), (1, 0)]):
        parts = _parts(ranks, count, dim, dtype, seed=call)
        residual, weight = _residual_and_weight(count, dim, dtype)
        settings = {"two_trips": two_trips, "num_warps": 4}
        x, normed = sum_rows(parts[context.rank], residual, (weight, EPS), memory, settings)
        _check(x, normed, parts, residual, weight)
        found += [x, normed]
    assert (words_W[context.rank] == empty).all()
    context.barrier()
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_that_share_memory_agree_to_the_bit_over_many_calls(ranks):
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            Path(folder, str(rank)).touch()
        first, *others = run_ranks(_exchange_many, ranks, folder, 3, 40)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_rank_only_adds_and_normalises(dtype):
    from mixtralkit.ops.all_reduce.triton import sum_rows

    parts, (residual, weight) = _parts(1, 5, 48, dtype), _residual_and_weight(5, 48, dtype)
    x, normed = sum_rows(parts[0], residual, (weight, EPS))
    _check(x, normed, parts, residual, weight)
    x, normed = sum_rows(parts[0], None, None)
    assert normed is None and torch.equal(x, parts[0])  # noqa: PT018


def _reduce(context: RankContext, rows: int) -> tuple[torch.Tensor, ...]:
    assert context.symmetric_memory((2, 3), torch.int32, 0) is None
    reducer = RowReducer.create(context, 4, 48, torch.float32)
    parts, (residual, weight) = _parts(3, rows, 48, torch.float32), _residual_and_weight(rows, 48, torch.float32)
    summed = reducer.sum(parts[context.rank].clone())
    torch.testing.assert_close(summed, parts.sum(0), rtol=1e-5, atol=1e-5)
    partial = parts[context.rank].clone()
    return reducer.add_norm(partial, residual, weight, EPS)


@pytest.mark.parametrize("rows", [0, 2, 9])
def test_ranks_without_gpus_reduce_by_the_group(rows):
    parts, (residual, weight) = _parts(3, rows, 48, torch.float32), _residual_and_weight(rows, 48, torch.float32)
    for x, normed in run_ranks(_reduce, 3, rows):
        _check(x, normed, parts, residual, weight)


def test_the_reference_normalises_as_the_model_does():
    parts, (residual, weight) = _parts(1, 4, 48, torch.bfloat16), _residual_and_weight(4, 48, torch.bfloat16)
    x, normed = add_norm_reference(RankContext(), parts[0], residual, weight, EPS)
    assert torch.equal(normed, rms_norm(x, weight, EPS))
