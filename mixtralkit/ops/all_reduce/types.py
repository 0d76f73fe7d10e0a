"""Memory of the sums over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.distributed import SymmetricMemory

ONE_TRIP_ROWS = 128  # that every rank may add for itself, in one trip over the links
TWO_TRIP_ROWS = 4096  # that one launch exchanges in two trips; more rows take several
MOST_RANKS = 8  # each rank has places in every other's memory
EMPTY_WORDS = {2: (torch.int16, -(2**15)), 4: (torch.int32, -(2**31))}  # the bits of -0.0, by bytes of an element


@dataclass(frozen=True)
class ReducerMemory:
    """Where the ranks leave rows for each other: ``rows.own`` is [places, D], all bits of ``-0.0`` between calls.

    In this order, each for two turns: one trip's parts [2, W, one_trip], two trips' parts [2, W, ⌈two_trips / W⌉] of
    the rows that this rank adds, and finished rows [2, two_trips]. ``turns_R`` (int32, this rank's alone,
    [one_trip + two_trips]) is the turn of every row in one trip and of every row in two.
    """

    rows: SymmetricMemory
    one_trip: int
    two_trips: int
    turns_R: torch.Tensor

    @staticmethod
    def places(ranks: int, one_trip: int, two_trips: int) -> int:
        """Rows of ``rows`` on each rank for up to so many rows in one trip and in two."""
        return 2 * ranks * (one_trip + -(-two_trips // ranks)) + 2 * two_trips
