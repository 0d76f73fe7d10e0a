"""The fused kernels' figures on a CPU, where the references run: their form, and a hardware file that can be read."""

from __future__ import annotations

from dataclasses import replace

import torch

from lab.figures import Sizes, measure_fused
from mixtralkit.distributed import RankContext
from mixtralkit.planning.hardware import FusedKernels, Hardware
from tests.planning.machines import machine
from tests.ranks import run_ranks

TINY = Sizes(
    dim=64,
    hidden=96,
    dtype=torch.float32,
    rows=(1, 8),
    expert_rows=(1, 4),
    symmetric_rows=(2, 8),
    sequences=2,
    length=8,
)


def measured(context: RankContext) -> tuple[FusedKernels, bool]:
    said: list[str] = []
    figures = measure_fused(context, 1e10, TINY, lambda what, value, unit: said.append(what))
    return figures, len(said) == len(set(said)) and torch.is_grad_enabled()


def test_one_rank_has_no_wires(tmp_path):
    figures, said_once = measured(RankContext())
    assert said_once
    assert [rows for rows, _, _ in figures.linear] == [1, 8]
    assert [rows for rows, _, _ in figures.experts] == [1, 4]
    assert (figures.members, figures.sums, figures.exchange) == (None, None, None)
    hardware = replace(machine(), fused=figures)
    hardware.save(tmp_path / "it.json")
    assert Hardware.load(tmp_path / "it.json") == hardware


def test_ranks_measure_sums_and_rows_that_travel():
    (figures, _), (other, _) = run_ranks(measured, 2)
    assert figures == other, "the slowest rank's figures, on all"
    assert figures.members == 2
    assert [size for size, _ in figures.sums] == [64 * 4, 8 * 64 * 4]
    sizes = [size for size, _ in figures.exchange]
    assert sizes[0] < sizes[1] <= 8 * 64 * 4
