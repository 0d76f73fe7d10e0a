"""Sums of rows over the ranks of one host, with the residual and the norm that follow a tensor-parallel half.

NCCL's all-reduce of 8 KB takes longer than reading an attention layer's weights. Here every rank writes its rows
straight into the others' memory (torch's symmetric memory, no multicast), and the same kernel adds, adds the residual
and normalises. ``triton.py`` has the exchange and why it is safe.
"""

from __future__ import annotations

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.ops.all_reduce.reference import add_norm_reference
from mixtralkit.ops.all_reduce.types import EMPTY_WORDS, MOST_RANKS, ONE_TRIP_ROWS, TWO_TRIP_ROWS, ReducerMemory
from mixtralkit.ops.runtime import has_triton, runs_triton, tuned


class RowReducer:
    """Sums rows over the ranks; on a GPU in one kernel with what follows.

    Every rank must make the same calls, with the same numbers of rows, one after the other in stream order; calls may
    be captured in CUDA graphs, which may be replayed in any order that is the same on all ranks. A rank that dies
    leaves the others' kernels waiting: under ``torchrun`` they are ended with it.
    """

    def __init__(
        self, context: RankContext, memory: ReducerMemory | None, max_rows: int, dim: int, dtype: torch.dtype
    ) -> None:
        self.context, self.memory, self.max_rows, self.dim, self.dtype = context, memory, max_rows, dim, dtype

    @classmethod
    def create(cls, context: RankContext, max_rows: int, dim: int, dtype: torch.dtype) -> RowReducer:
        """Takes the memory for exchanges of up to ``max_rows`` rows [D]; collective.

        That is some 32 KB a row of 8 KB up to ``TWO_TRIP_ROWS``, no more for more rows. Calls of still more rows, and
        all calls where GPUs cannot write each other's memory, go through ``context.all_reduce``.
        """
        memory, ranks = None, context.world_size
        if 1 < ranks <= MOST_RANKS and has_triton(context.device):
            trips = min(max_rows, ONE_TRIP_ROWS), min(max_rows, TWO_TRIP_ROWS)
            rows = context.symmetric_memory((ReducerMemory.places(ranks, *trips), dim), *EMPTY_WORDS[dtype.itemsize])
            if rows is not None:
                turns_R = torch.zeros(sum(trips), dtype=torch.int32, device=context.device)
                memory = ReducerMemory(rows, *trips, turns_R)
        return cls(context, memory, max_rows, dim, dtype)

    def add_norm(
        self, partial_TD: torch.Tensor, residual_TD: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_TD = residual + Σ over ranks of partial, and RMSNorm(x_TD): the same bits on every rank.

        Up to ``max_rows`` rows are added in float32, in rank order, and rounded once; then x is normalised as rounded.
        ``partial_TD`` may hold something else afterwards.
        """
        if not runs_triton(partial_TD):
            return add_norm_reference(self.context, partial_TD, residual_TD, norm_weight_D, eps)
        return self._sum_rows(partial_TD, residual_TD, (norm_weight_D, eps))

    def sum(self, partial_TD: torch.Tensor) -> torch.Tensor:
        """Σ over ranks of ``partial_TD``, which may hold something else afterwards."""
        if self.context.world_size == 1 or self.memory is None or not 0 < len(partial_TD) <= self.max_rows:
            return self.context.all_reduce(partial_TD)
        return self._sum_rows(partial_TD, None, None)[0]

    def _sum_rows(
        self, partial_TD: torch.Tensor, residual_TD: torch.Tensor | None, norm: tuple[torch.Tensor, float] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from mixtralkit.ops.all_reduce.triton import sum_rows

        rows, ranks = len(partial_TD), self.context.world_size
        if self.memory is None or rows > self.max_rows:
            return sum_rows(self.context.all_reduce(partial_TD), residual_TD, norm)
        settings = tuned("all_reduce", partial_TD.device, rows, dim=self.dim, ranks=ranks)
        return sum_rows(partial_TD, residual_TD, norm, self.memory, settings)
