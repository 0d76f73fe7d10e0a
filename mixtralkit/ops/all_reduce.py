"""Sums of rows over the ranks of one host, with the residual and the norm that follow a tensor-parallel half.

NCCL's all-reduce of 8 KB takes longer than reading an attention layer's weights. Here every rank writes its rows
straight into the others' memory (torch's symmetric memory, no multicast), and the same kernel adds, adds the residual
and normalises. ``all_reduce_triton.py`` has the exchange and why it is safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.distributed import PeerMemory, RankContext
from mixtralkit.ops.runtime import runs_triton, tuned

FEW_ROWS = 128  # that every rank may add for itself, in one trip over the links
MANY_ROWS = 4096  # that one launch exchanges in two trips; more rows take several
MOST_RANKS = 8  # each rank has places in every other's memory
EMPTY_WORDS = {2: (torch.int16, -(2**15)), 4: (torch.int32, -(2**31))}  # the bits of -0.0, by bytes of an element


@dataclass(frozen=True)
class Inboxes:
    """Where the ranks leave rows for each other: ``memory.own`` is [places, D], all bits of ``-0.0`` between calls.

    In this order, each for two turns: one trip's parts [2, W, few], two trips' parts [2, W, ⌈many / W⌉] of the rows
    that this rank adds, and finished rows [2, many]. ``turns_R`` (int32, this rank's alone, [few + many]) is the turn
    of every row in one trip and of every row in two.
    """

    memory: PeerMemory
    few: int
    many: int
    turns_R: torch.Tensor

    @staticmethod
    def places(ranks: int, few: int, many: int) -> int:
        return 2 * ranks * (few + -(-many // ranks)) + 2 * many


class RowReducer:
    """Sums rows over the ranks; on a GPU in one kernel with what follows.

    Every rank must make the same calls, with the same numbers of rows, one after the other in stream order; calls may
    be captured in CUDA graphs, which may be replayed in any order that is the same on all ranks. A rank that dies
    leaves the others' kernels waiting: under ``torchrun`` they are ended with it.
    """

    def __init__(
        self, context: RankContext, inboxes: Inboxes | None, max_rows: int, dim: int, dtype: torch.dtype
    ) -> None:
        self.context, self.inboxes, self.max_rows, self.dim, self.dtype = context, inboxes, max_rows, dim, dtype

    @classmethod
    def create(cls, context: RankContext, max_rows: int, dim: int, dtype: torch.dtype) -> RowReducer:
        """Takes the memory for exchanges of up to ``max_rows`` rows [D]; collective.

        That is some 32 KB a row of 8 KB up to ``MANY_ROWS``, no more for more rows. Calls of still more rows, and all
        calls where GPUs cannot write each other's memory, go through ``context.all_reduce``.
        """
        inboxes, ranks = None, context.world_size
        if 1 < ranks <= MOST_RANKS and runs_triton(torch.empty(0, device=context.device)):
            few, many = min(max_rows, FEW_ROWS), min(max_rows, MANY_ROWS)
            memory = context.peer_memory((Inboxes.places(ranks, few, many), dim), *EMPTY_WORDS[dtype.itemsize])
            if memory is not None:
                turns_R = torch.zeros(few + many, dtype=torch.int32, device=context.device)
                inboxes = Inboxes(memory, few, many, turns_R)
        return cls(context, inboxes, max_rows, dim, dtype)

    def add_norm(
        self, partial_TD: torch.Tensor, residual_TD: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_TD = residual + Σ over ranks of partial, and RMSNorm(x_TD): the same bits on every rank.

        Up to ``max_rows`` rows are added in float32, in rank order, and rounded once; then x is normalised as rounded.
        ``partial_TD`` may hold something else afterwards.
        """
        if not runs_triton(partial_TD) or len(partial_TD) == 0:
            return add_norm_plain(self.context, partial_TD, residual_TD, norm_weight_D, eps)
        return self._sum_rows(partial_TD, residual_TD, (norm_weight_D, eps))

    def sum(self, partial_TD: torch.Tensor) -> torch.Tensor:
        """Σ over ranks of ``partial_TD``, which may hold something else afterwards."""
        if self.context.world_size == 1 or self.inboxes is None or not 0 < len(partial_TD) <= self.max_rows:
            return self.context.all_reduce(partial_TD)
        return self._sum_rows(partial_TD, None, None)[0]

    def _sum_rows(
        self, partial_TD: torch.Tensor, residual_TD: torch.Tensor | None, norm: tuple[torch.Tensor, float] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from mixtralkit.ops.all_reduce_triton import sum_rows

        rows, ranks = len(partial_TD), self.context.world_size
        if self.inboxes is None or rows > self.max_rows:
            return sum_rows(self.context.all_reduce(partial_TD), residual_TD, norm)
        settings = tuned("all_reduce", partial_TD.device, rows, dim=self.dim, ranks=ranks)
        return sum_rows(partial_TD, residual_TD, norm, self.inboxes, settings)


def add_norm_plain(
    context: RankContext, partial_TD: torch.Tensor, residual_TD: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ``RowReducer.add_norm``; the group's backend says how sums of half precision are rounded."""
    x_TD = residual_TD + context.all_reduce(partial_TD)
    x_f32 = x_TD.float()
    normed_TD = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    return x_TD, normed_TD.type_as(x_TD) * norm_weight_D
