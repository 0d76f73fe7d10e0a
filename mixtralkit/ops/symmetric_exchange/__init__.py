"""Rows to the ranks that compute them and their sums back, by kernels that reach into each other's memory.

For attention ``dp`` with experts ``ep`` on one host, up to ``max_rows`` rows a rank: no collective, nothing that waits
for the host, shapes fixed beforehand, so that CUDA graphs can hold it. ``triton.py`` has the protocol and why it is
safe. Where GPUs cannot reach each other, and on CPUs, the reference does the same through the group.

With W ranks and ``rows`` rows of each, row t of rank s is number t·W + s of the ``R = rows·W`` at every rank, whatever
``rows`` is: ``(t0,s0)(t0,s1)(t1,s0)(t1,s1)``.
"""

from __future__ import annotations

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.ops.runtime import has_triton, tuned
from mixtralkit.ops.symmetric_exchange.reference import (
    combine_at_owner_reference,
    combine_reference,
    dispatch_reference,
)
from mixtralkit.ops.symmetric_exchange.types import EMPTY, ArrivedRows, ExchangeMemory, Norm

__all__ = ["MOST_RANKS", "ArrivedRows", "ExchangeMemory", "SymmetricExchange"]

MOST_RANKS = 8


class SymmetricExchange:
    """The exchange of one model on one rank; all layers take turns with its memory.

    Every rank must make the same calls, ``dispatch`` and ``combine`` by turns, with the same ``rows``, one after the
    other in stream order. They may be captured in CUDA graphs, which may be replayed in any order that is the same on
    all ranks. A rank that dies leaves the others' kernels waiting: under ``torchrun`` they are ended with it.
    """

    def __init__(
        self,
        context: RankContext,
        memory: ExchangeMemory | None,
        max_rows: int,
        dim: int,
        top_k: int,
        dtype: torch.dtype,
    ) -> None:
        self.context, self.memory, self.max_rows = context, memory, max_rows
        self.dim, self.top_k, self.dtype = dim, top_k, dtype

    @classmethod
    def create(cls, context: RankContext, max_rows: int, dim: int, top_k: int, dtype: torch.dtype) -> SymmetricExchange:
        """Takes the memory for up to ``max_rows`` rows [D] of each rank; collective.

        On every rank that is ``2 · W · max_rows`` rows of D numbers (rows that arrive, sums), ``16 · W · K · max_rows``
        bytes of words and ``8 · W`` of numbers: 67 MB for 1,024 rows of 8 KB on 4 ranks.
        """
        memory, ranks = None, context.world_size
        if 1 < ranks <= MOST_RANKS and has_triton(context.device):
            rows = context.symmetric_memory((2 * max_rows * ranks, dim), dtype, 0)
            words = context.symmetric_memory((ExchangeMemory.words_of(ranks, max_rows, top_k),), torch.int64, EMPTY)
            if rows is not None and words is not None:
                calls = torch.zeros(2, dtype=torch.int64, device=context.device)
                memory = ExchangeMemory(rows, words, calls, max_rows)
        return cls(context, memory, max_rows, dim, top_k, dtype)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        places_EC: torch.Tensor,
        rows: int,
        valid_T: torch.Tensor | None = None,
        stays: bool = False,
    ) -> ArrivedRows:
        """Sends each row once to each rank that computes any of its choices; returns what came here. Collective.

        Args:
            experts_TK: int64, -1 for a choice that is dropped.
            weights_TK: float32.
            places_EC: int32 rank · 2^16 + slot that computes expert e for rows t with t mod C = c:
                ``planning.replicas.ReplicaTable.places_EC``. Read when the kernels run.
            rows: what every rank gives at most, at least 1; each has room for so many.
            valid_T: int64, negative for a row without a sequence, which goes nowhere; None where there is none.
            stays: rows stay where they are computed: ``combine_at_owner`` follows, not ``combine``. Then row t is the
                same row on every rank, and valid on one of them.
        """
        if not max(1, len(x_TD)) <= rows <= self.max_rows:
            raise ValueError(f"rows ({rows}) must be at least 1 and this rank's {len(x_TD)}, at most {self.max_rows}")
        if self.memory is None:
            return dispatch_reference(self.context, x_TD, experts_TK, weights_TK, places_EC, rows, valid_T, stays)
        from mixtralkit.ops.symmetric_exchange.triton import send_rows

        settings = self._settings(rows)
        return send_rows(x_TD, experts_TK, weights_TK, places_EC, rows, self.memory, settings, valid_T, stays)

    def sum_buffer(self, rows: int) -> torch.Tensor:
        """Memory [R, D] for the sums of a call; ``combine`` copies sums that lie elsewhere into it."""
        count = rows * self.context.world_size
        if self.memory is None:
            return torch.empty(count, self.dim, dtype=self.dtype, device=self.context.device)
        return self.memory.rows.own[self.max_rows * self.context.world_size :][:count]

    def combine(
        self,
        y_RD: torch.Tensor,
        members_T: torch.Tensor,
        residual_TD: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x_TD = Σ over the ranks that computed a part [+ residual], and its RMSNorm with ``norm``. Collective.

        Parts are added in float32, in rank order, and rounded once; then x is normalised as rounded.

        Args:
            y_RD: one sum for each row that ``dispatch`` returned; rows without a choice here may hold anything.
            members_T: as ``dispatch`` returned it.
        """
        if self.memory is None:
            return combine_reference(self.context, y_RD, members_T, residual_TD, norm)
        from mixtralkit.ops.symmetric_exchange.triton import fetch_sums

        self._publish(y_RD)
        settings = self._settings(len(members_T))
        return fetch_sums(members_T, self.memory, residual_TD, norm, settings)

    def combine_at_owner(
        self, y_RD: torch.Tensor, arrived: ArrivedRows, norm: Norm | None = None, residual: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Finished rows at the rank of their first choice that was kept, where they live from now on. Collective.

        A row that lost all its choices stays where it was. Parts are added as in ``combine``. What travelled is the
        stream itself, which the experts' side normalises again, so that one row crosses and serves as the residual too.

        Args:
            y_RD: one sum for each row of ``arrived``, which ``dispatch`` returned with ``stays``.
            residual: whether the rows that travelled are added to the sums.

        Returns:
            x_TD and, with ``norm``, its RMSNorm [rows, D], undefined where another rank owns the row; valid_T, int64
            [rows], 0 for the rows that this rank owns, else -1: the ``valid_T`` of the next layer's ``dispatch``.
        """
        if self.memory is None:
            return combine_at_owner_reference(self.context, y_RD, arrived, norm, residual)
        from mixtralkit.ops.symmetric_exchange.triton import fetch_owned

        self._publish(y_RD)
        settings = self._settings(len(y_RD) // self.context.world_size)
        return fetch_owned(arrived, self.memory, norm, residual, settings)

    def _publish(self, y_RD: torch.Tensor) -> None:
        sums_RD = self.sum_buffer(len(y_RD) // self.context.world_size)
        if y_RD.data_ptr() != sums_RD.data_ptr():
            sums_RD.copy_(y_RD)

    def _settings(self, rows: int) -> dict[str, int] | None:
        return tuned("symmetric_exchange", self.context.device, rows, dim=self.dim, ranks=self.context.world_size)
