"""Rows between ranks: the exchange in Triton's interpreter, alone and between processes; the reference over gloo."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.distributed import RankContext, SymmetricMemory
from mixtralkit.ops.norm.reference import rms_norm_reference
from mixtralkit.ops.symmetric_exchange import ExchangeMemory, SymmetricExchange
from mixtralkit.ops.symmetric_exchange.types import EMPTY, SLOT_BITS
from mixtralkit.planning.replicas import ReplicaTable
from tests.ranks import run_ranks

pytest.importorskip("triton")
EPS = 1e-5
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 4e-3}}


def _slots(ranks: int, experts: int, seed: int) -> np.ndarray:
    """Slots [W, E] of a random plan: every expert somewhere, some on several ranks, some on all."""
    rng = np.random.default_rng(seed)
    holds = rng.random((ranks, experts)) < 0.3
    holds[:, rng.random(experts) < 0.2] = True
    holds[rng.integers(ranks, size=experts), np.arange(experts)] = True
    return np.where(holds, holds.cumsum(1) - 1, -1)


def _routed(rank: int, rows: int, dim: int, experts: int, top_k: int, dtype: torch.dtype, seed: int):
    """Rows, experts (some dropped) and weights of a rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    chosen_TK = torch.rand(rows, experts, generator=generator).topk(top_k).indices
    chosen_TK[torch.rand(rows, top_k, generator=generator) < 0.1] = -1
    return (
        torch.randn(rows, dim, generator=generator).to(dtype),
        chosen_TK,
        torch.rand(rows, top_k, generator=generator),
    )


def _choices(slots_WE: np.ndarray, rank: int, experts_TK: torch.Tensor) -> list[list[tuple[int, int]]]:
    """(rank, slot) of each choice by the rule itself, (-1, -1) where it was dropped."""
    found = []
    for row, experts in enumerate(experts_TK.tolist()):
        found.append([])
        for expert in experts:
            holders = [r for r in range(len(slots_WE)) if slots_WE[r, expert] >= 0]
            to = rank if rank in holders else holders[(row + rank) % len(holders)]
            found[-1].append((-1, -1) if expert < 0 else (to, int(slots_WE[to, expert])))
    return found


def _places(slots_WE: np.ndarray, rank: int) -> torch.Tensor:
    return torch.from_numpy(ReplicaTable(slots_WE).places_EC(rank, small=False))


def _exchange_memory(
    rank: int, words_W: list[torch.Tensor], rows_W: list[torch.Tensor], max_rows: int
) -> ExchangeMemory:
    rows, words = (
        SymmetricMemory(all_W[rank], rank, tuple(own.data_ptr() for own in all_W), handle=all_W)
        for all_W in (rows_W, words_W)
    )
    return ExchangeMemory(rows, words, torch.zeros(2, dtype=torch.int64), max_rows)


def _memory(ranks: int, max_rows: int, dim: int, top_k: int, dtype: torch.dtype):
    words = torch.full((ranks, ExchangeMemory.words_of(ranks, max_rows, top_k)), EMPTY)
    return list(words), list(torch.full((ranks, 2 * max_rows * ranks, dim), torch.nan, dtype=dtype))


def _word(rank: int, slot: int, weight: float) -> int:
    place = (rank << SLOT_BITS) + slot if rank >= 0 else -1
    return (place << 32) | (int(np.float32(weight).view(np.int32)) & 0xFFFFFFFF)


CASES = [(2, 1, 3, 48, 4, 1), (3, 0, 2, 40, 8, 2), (4, 2, 5, 256, 16, 6), (4, 3, 1, 32, 60, 4)]


@pytest.mark.parametrize(("dtype", "drops"), [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize(("ranks", "rank", "rows", "dim", "experts", "top_k"), CASES)
def test_rows_and_words_go_where_choices_are_computed(ranks, rank, rows, dim, experts, top_k, dtype, drops):
    from mixtralkit.ops.symmetric_exchange.triton import send_rows

    max_rows, slots_WE = rows + 2, _slots(ranks, experts, rows)
    words_W, rows_W = _memory(ranks, max_rows, dim, top_k, dtype)
    memory = _exchange_memory(rank, words_W, rows_W, max_rows)
    memory.calls.fill_(5)  # an odd call: the second turn
    turns_W = [words[:-ranks].view(2, max_rows, ranks, top_k) for words in words_W]
    for source in set(range(ranks)) - {rank}:  # has sent its words
        for row in range(rows):
            for k in range(top_k):
                to = rank if k % 2 else (rank + 1) % ranks
                turns_W[rank][1, row, source, k] = _word(to, row + source, 0.25 * k)
    x_TD, experts_TK, weights_TK = _routed(rank, rows - 1, dim, experts, top_k, dtype, 3)
    places_EC = _places(slots_WE, rank)
    valid_T = torch.arange(rows - 1) - 1 if drops else None
    arrived = send_rows(x_TD, experts_TK, weights_TK, places_EC, rows, memory, valid_T=valid_T, stays=drops)
    assert memory.calls.tolist() == [5, 6]
    choices = [*_choices(slots_WE, rank, experts_TK), [(-1, -1)] * top_k]
    if drops:
        choices[0] = [(-1, -1)] * top_k
    slots_RWK, weights_RWK = (t.view(rows, ranks, top_k) for t in (arrived.slots_RK, arrived.weights_RK))
    for row in range(rows):
        members = {to for to, _ in choices[row]} - {-1}
        if drops and not members and 0 < row < rows - 1:
            members = {rank}  # without a choice left it stays
        if row < rows - 1:
            assert int(arrived.members_T[row]) == sum(2**to for to in members)
        for peer in range(ranks):
            place_D = rows_W[peer][row * ranks + rank]
            assert torch.equal(place_D, x_TD[row]) if peer in members else place_D.isnan().all()
            weights = [float(weights_TK[row, k]) if to >= 0 else 0.0 for k, (to, _) in enumerate(choices[row])]
            words = [_word(*place, weight) for place, weight in zip(choices[row], weights, strict=True)]
            if peer == rank:
                here = [to == rank for to, _ in choices[row]]
                slots = [slot if mine else -1 for (_, slot), mine in zip(choices[row], here, strict=True)]
                assert slots_RWK[row, rank].tolist() == slots
                assert weights_RWK[row, rank].tolist() == [w * mine for w, mine in zip(weights, here, strict=True)]
            else:
                assert turns_W[peer][1, row, rank].tolist() == words
                turns_W[peer][1, row, rank] = EMPTY
                assert slots_RWK[row, peer].tolist() == [row + peer if k % 2 else -1 for k in range(top_k)]
                assert weights_RWK[row, peer].tolist() == [0.25 * k if k % 2 else 0.0 for k in range(top_k)]
            if drops:
                arrived_K = arrived.places_RK.view(rows, ranks, top_k)[row, peer]
                if peer != rank:
                    words = [_word(rank if k % 2 else (rank + 1) % ranks, row + peer, 0.0) for k in range(top_k)]
                assert arrived_K.tolist() == [word >> 32 for word in words]
    assert all((words == EMPTY).all() for words in words_W)
    written = sum(int((~rows_PD.isnan()).any(1).sum()) for rows_PD in rows_W)
    lost = sum(all(to < 0 for to, _ in row) for row in choices[1:-1]) if drops else 0
    assert written == sum(len({to for to, _ in row} - {-1}) for row in choices) + lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("plain", [True, False])
def test_sums_of_the_ranks_that_computed_a_part_are_fetched_and_added(dtype, plain):
    from mixtralkit.ops.symmetric_exchange.triton import fetch_sums

    ranks, rank, own, dim, max_rows = 3, 1, 4, 48, 6
    words_W, rows_W = _memory(ranks, max_rows, dim, 2, dtype)
    memory = _exchange_memory(rank, words_W, rows_W, max_rows)
    memory.calls[:] = torch.tensor([6, 7])
    members = [0b001, 0b110, 0b000, 0b111]
    wanted_TD = torch.zeros(own, dim, dtype=torch.float64)
    for row, member in enumerate(members):
        for peer in range(ranks):
            if member >> peer & 1:
                part_D = torch.randn(dim, generator=torch.Generator().manual_seed(9 * row + peer)).to(dtype)
                rows_W[peer][(max_rows + row) * ranks + rank] = part_D
                wanted_TD[row] += part_D.double()
    words_W[rank][-ranks:] = torch.tensor([7, EMPTY, 8])  # the first has ended this call, the last is one ahead
    residual_TD, weight_D = (
        torch.linspace(-1, 1, own * dim).view(own, dim).to(dtype),
        torch.linspace(1, 2, dim).to(dtype),
    )
    extra = (None, None) if plain else (residual_TD, (weight_D, EPS))
    x_TD, normed_TD = fetch_sums(torch.tensor(members, dtype=torch.int32), memory, *extra)
    assert memory.calls.tolist() == [7, 7]
    assert [int(words[-ranks + rank]) for words in words_W] == [7, 7, 7]
    if plain:
        assert normed_TD is None
        torch.testing.assert_close(x_TD.double(), wanted_TD, **TOLERANCE[dtype])
        return
    torch.testing.assert_close(x_TD.double(), wanted_TD + residual_TD.double(), **TOLERANCE[dtype])
    root_T = (x_TD.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(normed_TD.double(), x_TD.double() / root_T * weight_D.double(), **TOLERANCE[dtype])


def _experts(arrived, slots_of_rank: np.ndarray) -> torch.Tensor:
    """Stands for experts: expert e multiplies the row by e + 1. NaN where no choice is here."""
    expert_S = torch.tensor(np.argsort(np.where(slots_of_rank < 0, 10**6, slots_of_rank)))
    here_RK = arrived.slots_RK >= 0
    factor_RK = (expert_S[arrived.slots_RK.clamp(min=0)] + 1) * arrived.weights_RK * here_RK
    return torch.where(here_RK.any(1, keepdim=True), arrived.x_RD * factor_RK.sum(1, keepdim=True), torch.nan)


def _layers(
    context: RankContext, exchange: SymmetricExchange, dim: int, top_k: int, experts: int
) -> list[torch.Tensor]:
    """Calls of changing size and plan, some ranks without rows; compared with one rank that has every expert."""
    found = []
    for call, rows in enumerate([1, 3, 2, 2, 5, 1, 4]):
        own = max(0, rows - (context.rank + call) % 3)
        slots_WE = _slots(context.world_size, experts, call)
        x_TD, experts_TK, weights_TK = _routed(context.rank, own, dim, experts, top_k, torch.float32, call)
        places_EC = _places(slots_WE, context.rank)
        valid_T = torch.arange(own) - 1 if call % 2 else None  # without the first row
        arrived = exchange.dispatch(x_TD, experts_TK, weights_TK, places_EC, rows, valid_T)
        y_RD = _experts(arrived, slots_WE[context.rank])
        weight_D = torch.linspace(1, 2, dim)
        x, normed = exchange.combine(y_RD, arrived.members_T, x_TD, (weight_D, EPS))
        factor_T = ((experts_TK + 1) * weights_TK).sum(1, keepdim=True)
        if valid_T is not None:
            factor_T[valid_T < 0] = 0
        torch.testing.assert_close(x, x_TD + x_TD * factor_T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(normed, x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight_D)
        found.append(x)
    _stays(context, exchange, dim, top_k, experts)
    return found


def _stays(context: RankContext, exchange: SymmetricExchange, dim: int, top_k: int, experts: int) -> None:
    """Rows that go from layer to layer to the rank of their first choice, against all rows on one rank."""
    rows, weight_D = 5, torch.linspace(1, 2, dim)
    everywhere_TD = torch.randn(rows, dim, generator=torch.Generator().manual_seed(7))
    owner_T = torch.arange(rows) % context.world_size
    x_TD, valid_T = everywhere_TD.clone(), torch.where(owner_T == context.rank, 0, -1)
    x_TD[valid_T < 0] = torch.nan
    for layer in range(4):
        slots_WE = _slots(context.world_size, experts, 20 + layer)
        _, experts_TK, weights_TK = _routed(0, rows, 1, experts, top_k, torch.float32, 30 + layer)
        experts_TK[layer] = -1  # a row that lost all its choices
        given = rows - (layer == 3 and context.rank != int(owner_T[-1]))  # the last row need not be there at all
        args = (x_TD[:given].contiguous(), experts_TK[:given], weights_TK[:given], _places(slots_WE, context.rank))
        arrived = exchange.dispatch(*args, rows, valid_T[:given], stays=True)
        normed_RD = rms_norm_reference(arrived.x_RD, weight_D, EPS)
        y_RD = _experts(replace(arrived, x_RD=normed_RD), slots_WE[context.rank])
        residual = layer != 2
        x_TD, normed_TD, valid_T = exchange.combine_at_owner(y_RD, arrived, (weight_D, EPS), residual)
        factor_T1 = ((experts_TK + 1) * weights_TK).sum(1, keepdim=True)
        sums_TD = rms_norm_reference(everywhere_TD, weight_D, EPS) * factor_T1
        everywhere_TD = sums_TD + everywhere_TD if residual else sums_TD
        for row in range(rows):
            places = _choices(slots_WE, int(owner_T[row]), experts_TK)[row]
            owner_T[row] = next((to for to, _ in places if to >= 0), int(owner_T[row]))
        assert valid_T.tolist() == torch.where(owner_T == context.rank, 0, -1).tolist()
        mine_T = valid_T == 0
        torch.testing.assert_close(x_TD[mine_T], everywhere_TD[mine_T], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(normed_TD[mine_T], rms_norm_reference(x_TD, weight_D, EPS)[mine_T])
    context.barrier()


def memory_of_files(context: RankContext, folder: str | Path, max_rows: int, dim: int, top_k: int) -> ExchangeMemory:
    """One for float32 that processes share, in the files rows0, words0, rows1, … of ``folder``; collective."""
    ranks, sizes = context.world_size, {}
    sizes["words"] = (ExchangeMemory.words_of(ranks, max_rows, top_k), torch.int64, EMPTY)
    sizes["rows"] = (2 * max_rows * ranks * dim, torch.float32, 0)
    for name in sizes:
        Path(folder, f"{name}{context.rank}").touch()
    context.barrier()
    maps = {
        name: [torch.from_file(f"{folder}/{name}{r}", shared=True, size=size, dtype=dtype) for r in range(ranks)]
        for name, (size, dtype, _) in sizes.items()
    }
    for name, (_, _, fill) in sizes.items():
        maps[name][context.rank].fill_(fill)
    context.barrier()
    return _exchange_memory(context.rank, maps["words"], [rows.view(-1, dim) for rows in maps["rows"]], max_rows)


def _through_files(context: RankContext, folder: str, top_k: int) -> list[torch.Tensor]:
    dim, max_rows = 40, 5
    memory = memory_of_files(context, folder, max_rows, dim, top_k)
    exchange = SymmetricExchange(context, memory, max_rows, dim, top_k, torch.float32)
    found = _layers(context, exchange, dim, top_k, 8)
    context.barrier()
    assert (memory.words.own[: -context.world_size] == EMPTY).all()
    return found


@pytest.mark.parametrize(("ranks", "top_k"), [(2, 2), (4, 3)])
def test_processes_that_share_memory_get_every_sum_over_many_calls(ranks, top_k):
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_through_files, ranks, folder, top_k)


def _through_the_group(context: RankContext, top_k: int) -> list[torch.Tensor]:
    exchange = SymmetricExchange.create(context, 5, 40, top_k, torch.float32)
    assert exchange.memory is None
    with pytest.raises(ValueError, match="rows"):
        exchange.dispatch(torch.zeros(3, 40), None, None, None, 2)
    assert exchange.sum_buffer(2).shape == (2 * context.world_size, 40)
    return _layers(context, exchange, 40, top_k, 8)


@pytest.mark.parametrize(("ranks", "top_k"), [(1, 2), (2, 1), (4, 6)])
def test_ranks_without_gpus_exchange_through_the_group(ranks, top_k):
    run_ranks(_through_the_group, ranks, top_k)
