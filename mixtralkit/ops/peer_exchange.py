"""Rows to the ranks that compute them and their sums back, by kernels that reach into each other's memory.

For attention ``dp`` with experts ``ep`` on one host, up to ``max_rows`` rows a rank: no collective, nothing that waits
for the host, shapes fixed beforehand, so that CUDA graphs can hold it. ``peer_exchange_triton.py`` has the protocol and
why it is safe. Where GPUs cannot reach each other, and on CPUs, the twins below do the same through the group.

With W ranks and ``rows`` rows of each, row t of rank s is number t·W + s of the ``R = rows·W`` at every rank, whatever
``rows`` is: ``(t0,s0)(t0,s1)(t1,s0)(t1,s1)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.distributed import PeerMemory, RankContext
from mixtralkit.ops.norm import rms_norm_plain
from mixtralkit.ops.runtime import runs_triton, tuned

MOST_RANKS = 8
EMPTY = -1  # a choice's word that has not arrived; no choice is sent so
SLOT_BITS = 16  # of a place: rank · 2^16 + slot

Norm = tuple[torch.Tensor, float]  # (weight_D, eps)


@dataclass(frozen=True)
class ExpertPlaces:
    """Who computes what: ``places_EC`` (int32) is rank · 2^16 + slot of expert e for rows t with t mod C = c.

    At home where ``rank`` holds the expert; else its replicas take turns by row, in rank order, and C is such that all
    turns of all experts fit.
    """

    places_EC: torch.Tensor

    @classmethod
    def of(cls, slots_WE: np.ndarray, rank: int, device: torch.device) -> ExpertPlaces:
        """Of one layer; slots_WE: int slot of each expert on each rank, -1 where it is not held."""
        holders = [
            [rank] if slots_WE[rank, e] >= 0 else np.flatnonzero(slots_WE[:, e] >= 0) for e in range(slots_WE.shape[1])
        ]
        turns = math.lcm(*(len(ranks) for ranks in holders))
        chosen_EC = np.array([[ranks[turn % len(ranks)] for turn in range(turns)] for ranks in holders])
        slots_EC = slots_WE[chosen_EC, np.arange(len(holders))[:, None]]
        return cls(torch.tensor((chosen_EC << SLOT_BITS) + slots_EC, dtype=torch.int32, device=device))

    def look_up(self, experts_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (ranks_TK, slots_TK) of the choices, both -1 where ``experts_TK`` is."""
        turn_T = torch.arange(len(experts_TK), device=experts_TK.device) % self.places_EC.shape[1]
        places_TK = self.places_EC[experts_TK.clamp(min=0), turn_T[:, None]].long().masked_fill(experts_TK < 0, -1)
        slots_TK = (places_TK & (2**SLOT_BITS - 1)).masked_fill(experts_TK < 0, -1)
        return places_TK >> SLOT_BITS, slots_TK


@dataclass(frozen=True)
class ArrivedRows:
    """Rows at the rank that computes them, and what the way back needs.

    Attributes:
        x_RD: rows; whatever memory held where no choice is this rank's.
        slots_RK: int64 slot of this rank's expert for each choice, -1 where another rank computes it.
        weights_RK: float32, zero where another rank computes the choice.
        members_T: int32, for each of the rows that were given: bit w says that rank w computes a part.
    """

    x_RD: torch.Tensor
    slots_RK: torch.Tensor
    weights_RK: torch.Tensor
    members_T: torch.Tensor


@dataclass(frozen=True)
class PeerMailbox:
    """Memory for the exchange on every rank.

    ``rows`` is [2 · max_rows · W, D]: rows that arrive, then sums that others fetch. ``words`` is int64: one word a
    choice for two turns [2, max_rows, W, K], all ``EMPTY`` between calls, then for each rank the number [W] of the last
    call whose sums it has ready. ``calls`` (int64 [2], this rank's alone) is the number of calls begun and ended.
    """

    rows: PeerMemory
    words: PeerMemory
    calls: torch.Tensor
    max_rows: int

    @staticmethod
    def words_of(ranks: int, max_rows: int, top_k: int) -> int:
        return 2 * max_rows * ranks * top_k + ranks


class PeerExchange:
    """The exchange of one model on one rank; all layers take turns with its memory.

    Every rank must make the same calls, ``dispatch`` and ``combine`` by turns, with the same ``rows``, one after the
    other in stream order. They may be captured in CUDA graphs, which may be replayed in any order that is the same on
    all ranks. A rank that dies leaves the others' kernels waiting: under ``torchrun`` they are ended with it.
    """

    def __init__(
        self, context: RankContext, mailbox: PeerMailbox | None, max_rows: int, dim: int, top_k: int, dtype: torch.dtype
    ) -> None:
        self.context, self.mailbox, self.max_rows = context, mailbox, max_rows
        self.dim, self.top_k, self.dtype = dim, top_k, dtype

    @classmethod
    def create(cls, context: RankContext, max_rows: int, dim: int, top_k: int, dtype: torch.dtype) -> PeerExchange:
        """Takes the memory for up to ``max_rows`` rows [D] of each rank: ``2 · W · max_rows`` rows; collective."""
        mailbox, ranks = None, context.world_size
        if 1 < ranks <= MOST_RANKS and runs_triton(torch.empty(0, device=context.device)):
            rows = context.peer_memory((2 * max_rows * ranks, dim), dtype, 0)
            words = context.peer_memory((PeerMailbox.words_of(ranks, max_rows, top_k),), torch.int64, EMPTY)
            if rows is not None and words is not None:
                calls = torch.zeros(2, dtype=torch.int64, device=context.device)
                mailbox = PeerMailbox(rows, words, calls, max_rows)
        return cls(context, mailbox, max_rows, dim, top_k, dtype)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        places: ExpertPlaces,
        rows: int,
        kept_T: torch.Tensor | None = None,
    ) -> ArrivedRows:
        """Sends each row once to each rank that computes any of its choices; returns what came here. Collective.

        Args:
            experts_TK: int64, -1 for a choice that is dropped.
            weights_TK: float32.
            rows: what every rank gives at most, at least 1; each has room for so many.
            kept_T: int64, negative for a row whose choices are all dropped; None drops no row.
        """
        if not max(1, len(x_TD)) <= rows <= self.max_rows:
            raise ValueError(f"rows ({rows}) must be at least 1 and this rank's {len(x_TD)}, at most {self.max_rows}")
        if self.mailbox is None:
            return dispatch_plain(self.context, x_TD, experts_TK, weights_TK, places, rows, kept_T)
        from mixtralkit.ops.peer_exchange_triton import send_rows

        return send_rows(x_TD, experts_TK, weights_TK, places, rows, self.mailbox, self._settings(rows), kept_T)

    def outbox(self, rows: int) -> torch.Tensor:
        """Memory [R, D] for the sums of a call; ``combine`` copies sums that lie elsewhere into it."""
        count = rows * self.context.world_size
        if self.mailbox is None:
            return torch.empty(count, self.dim, dtype=self.dtype, device=self.context.device)
        return self.mailbox.rows.own[self.max_rows * self.context.world_size :][:count]

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
        if self.mailbox is None:
            return combine_plain(self.context, y_RD, members_T, residual_TD, norm)
        from mixtralkit.ops.peer_exchange_triton import fetch_sums

        outbox_RD = self.outbox(len(y_RD) // self.context.world_size)
        if y_RD.data_ptr() != outbox_RD.data_ptr():
            outbox_RD.copy_(y_RD)
        settings = self._settings(len(members_T))
        return fetch_sums(members_T, self.mailbox, residual_TD, norm, settings)

    def _settings(self, rows: int) -> dict[str, int] | None:
        return tuned("peer-exchange", self.context.device, rows, dim=self.dim, ranks=self.context.world_size)


def dispatch_plain(
    context: RankContext,
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    places: ExpertPlaces,
    rows: int,
    kept_T: torch.Tensor | None = None,
) -> ArrivedRows:
    """The twin of ``PeerExchange.dispatch``: every row goes everywhere."""
    if kept_T is not None:
        experts_TK = experts_TK.masked_fill((kept_T < 0)[:, None], -1)
    ranks_TK, slots_TK = places.look_up(experts_TK)

    def everyone(values: torch.Tensor, fill: float) -> torch.Tensor:
        padded = torch.cat([values, values.new_full((rows - len(values), *values.shape[1:]), fill)])
        return context.all_gather(padded).transpose(0, 1).flatten(0, 1)

    elsewhere_RK = everyone(ranks_TK, -1) != context.rank
    slots_RK = everyone(slots_TK, -1).masked_fill(elsewhere_RK, -1)
    weights_RK = everyone(weights_TK, 0.0).masked_fill(elsewhere_RK, 0.0)
    is_member_TW = (ranks_TK[:, :, None] == torch.arange(context.world_size, device=x_TD.device)).any(1)
    bits_W = 2 ** torch.arange(context.world_size, device=x_TD.device)
    members_T = (is_member_TW * bits_W).sum(1).int()
    return ArrivedRows(everyone(x_TD, 0.0), slots_RK, weights_RK, members_T)


def combine_plain(
    context: RankContext,
    y_RD: torch.Tensor,
    members_T: torch.Tensor,
    residual_TD: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The twin of ``PeerExchange.combine``: every sum goes everywhere."""
    ranks, own = context.world_size, len(members_T)
    parts_WTD = context.all_gather(y_RD).unflatten(1, (-1, ranks))[:, :own, context.rank].float()
    sum_TD = torch.zeros(own, y_RD.shape[1], dtype=torch.float32, device=y_RD.device)
    for rank, part_TD in enumerate(parts_WTD):
        sum_TD += part_TD.masked_fill(((members_T >> rank) & 1 == 0)[:, None], 0.0)
    if residual_TD is not None:
        sum_TD += residual_TD
    x_TD = sum_TD.type_as(y_RD)
    return x_TD, None if norm is None else rms_norm_plain(x_TD, *norm)
