"""What travels, and the memory it travels through."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.distributed import SymmetricMemory

EMPTY = -1  # a choice's word that has not arrived; no choice is sent so
SLOT_BITS = 16  # of a place: rank · 2^16 + slot
Norm = tuple[torch.Tensor, float]  # (weight_D, eps)


@dataclass(frozen=True)
class ArrivedRows:
    """Rows at the rank that computes them, and what the way back needs.

    Attributes:
        x_RD: rows; whatever memory held where no choice is this rank's.
        slots_RK: int64 slot of this rank's expert for each choice, -1 where another rank computes it.
        weights_RK: float32, zero where another rank computes the choice.
        members_T: int32, for each of the rows that were given: bit w says that rank w computes a part, or that the
            row stays on w, its own rank, because it has no choice left.
        places_RK: int32 place of each choice, whichever rank it is on, -1 where there is none; None unless rows stay.
    """

    x_RD: torch.Tensor
    slots_RK: torch.Tensor
    weights_RK: torch.Tensor
    members_T: torch.Tensor
    places_RK: torch.Tensor | None = None


@dataclass(frozen=True)
class ExchangeMemory:
    """Memory for the exchange on every rank.

    ``rows`` is [2 · max_rows · W, D]: rows that arrive, then sums that others fetch. ``words`` is int64: one word a
    choice for two turns [2, max_rows, W, K], all ``EMPTY`` between calls, then for each rank the number [W] of the last
    call whose sums it has ready. ``calls`` (int64 [2], this rank's alone) is the number of calls begun and ended.
    """

    rows: SymmetricMemory
    words: SymmetricMemory
    calls: torch.Tensor
    max_rows: int

    @staticmethod
    def words_of(ranks: int, max_rows: int, top_k: int) -> int:
        return 2 * max_rows * ranks * top_k + ranks
