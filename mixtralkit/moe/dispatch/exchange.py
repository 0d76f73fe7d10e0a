"""One exchange of rows between ranks by collectives: out once for each rank that computes a part, one sum back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.dispatch.collectives import all_to_all, gather_ranks


@dataclass(frozen=True)
class TravellingRows:
    """Rows and where each of their choices is computed; what an exchange takes and gives.

    Attributes:
        x_RD: rows.
        ranks_RK, slots_RK: int64 rank and slot of each choice, -1 where it was dropped.
        weights_RK: float32.
        ids_R: int64 number of each row in whatever count the caller keeps, below 2^24; None where nobody needs it.
    """

    x_RD: torch.Tensor
    ranks_RK: torch.Tensor
    slots_RK: torch.Tensor
    weights_RK: torch.Tensor
    ids_R: torch.Tensor | None = None

    def take(self, index_N: torch.Tensor) -> TravellingRows:
        """The rows of the given numbers."""
        return TravellingRows(*(None if t is None else t[index_N] for t in self._columns))

    @property
    def _columns(self) -> tuple[torch.Tensor | None, ...]:
        return self.x_RD, self.ranks_RK, self.slots_RK, self.weights_RK, self.ids_R

    def followed_by(self, other: TravellingRows) -> TravellingRows:
        """These rows, then the other ones."""
        pairs = zip(self._columns, other._columns, strict=True)
        return TravellingRows(*(None if a is None else torch.cat([a, b]) for a, b in pairs))

    def for_rank(self, rank: int) -> RoutedRows:
        """The rows as the experts take them: slots of other ranks' choices are -1."""
        return RoutedRows(self.x_RD, self.slots_RK.masked_fill(self.ranks_RK != rank, -1), self.weights_RK)

    def pack(self) -> torch.Tensor:
        """All but the rows as float32 [R, 3K or 3K+1], so that one message carries it.

        Whole numbers up to 2^24 are exact in float32.
        """
        whole = [self.ranks_RK, self.slots_RK, *([] if self.ids_R is None else [self.ids_R[:, None]])]
        return torch.cat([self.weights_RK, *(values.to(torch.float32) for values in whole)], dim=1)

    def unpack(self, packed_RP: torch.Tensor, x_RD: torch.Tensor) -> TravellingRows:
        """``pack`` backwards, for other rows ``x_RD`` that travelled beside it."""
        top_k = self.ranks_RK.shape[1]
        ranks, slots, ids = packed_RP.detach()[:, top_k:].long().tensor_split([top_k, 2 * top_k], dim=1)
        ids_R = None if self.ids_R is None else ids.squeeze(1)
        return TravellingRows(x_RD, ranks, slots, packed_RP[:, :top_k], ids_R)


@dataclass(frozen=True)
class ExchangeHandle:
    """What brings the sums of an exchange back.

    Attributes:
        send, receive: rows sent to and received from each member.
        local: rows that stayed, first among those handed on.
        merge_RK: for every choice the place of its sum among ``(rows that stayed)(rows sent)(one row of zeros)``;
            a choice whose sum an earlier choice of the row brings points at the zeros.
    """

    send: list[int]
    receive: list[int]
    local: int
    merge_RK: torch.Tensor


@dataclass(frozen=True)
class SortedRows:
    """Rows of one member before they leave.

    Attributes:
        staying, leaving: rows computed here, and rows for the others, by member and then by row.
        counts_W: int64 rows for each member, none for this one.
        merge_RK: as in ``ExchangeHandle``.
    """

    staying: TravellingRows
    leaving: TravellingRows
    counts_W: torch.Tensor
    merge_RK: torch.Tensor


class Exchange:
    """Exact exchange between the members of ``context`` (all ranks, or a part of them): unequal splits."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def send(self, rows: TravellingRows, members_RK: torch.Tensor) -> tuple[TravellingRows, ExchangeHandle]:
        """Rows for this member: those of its own that stay, then the others' in member order.

        Args:
            members_RK: which member of the group each choice goes to, -1 for none. A row leaves once for each
                member, however many of its choices go there.
        """
        return self.cross(self.sort(rows, members_RK))

    def sort(self, rows: TravellingRows, members_RK: torch.Tensor) -> SortedRows:
        """The part of ``send`` that no other member is needed for."""
        device, members = rows.x_RD.device, self.context.world_size
        goes_WR = _one_hot(members_RK, members)
        stays_R = goes_WR[self.context.rank].nonzero().squeeze(1)  # host sync
        goes_WR[self.context.rank] = False
        to_N, row_N = goes_WR.nonzero(as_tuple=True)  # host sync; by member, then by row
        zeros = len(stays_R) + len(row_N)
        place_RW = torch.full((len(members_RK), members), zeros, device=device)
        place_RW[stays_R, self.context.rank] = torch.arange(len(stays_R), device=device)
        place_RW[row_N, to_N] = torch.arange(len(stays_R), zeros, device=device)
        merge_RK = place_RW.gather(1, members_RK.clamp(min=0)).masked_fill(members_RK < 0, zeros)
        merge_RK = merge_RK.masked_fill(_repeats(members_RK), zeros)
        return SortedRows(rows.take(stays_R), rows.take(row_N), goes_WR.sum(1), merge_RK)

    def cross(self, rows: SortedRows) -> tuple[TravellingRows, ExchangeHandle]:
        """The part of ``send`` that members do together: counts, then rows."""
        context, staying, leaving = self.context, rows.staying, rows.leaving
        counts_WW = context.all_gather(rows.counts_W).tolist()  # host sync: the splits of an exact exchange
        send, receive = counts_WW[context.rank], [row[context.rank] for row in counts_WW]
        arrived_RD = all_to_all(leaving.x_RD, context, send, receive)
        arrived = leaving.unpack(all_to_all(leaving.pack(), context, send, receive), arrived_RD)
        return staying.followed_by(arrived), ExchangeHandle(send, receive, len(staying.x_RD), rows.merge_RK)

    def bring_back(self, y_RD: torch.Tensor, handle: ExchangeHandle) -> torch.Tensor:
        """One sum for each row handed on by ``send`` → the sum of all its parts for each row given to it."""
        stayed_D, away_D = y_RD.split([handle.local, y_RD.shape[0] - handle.local])
        back_ND = all_to_all(away_D, self.context, handle.receive, handle.send)
        parts_ND = torch.cat([stayed_D, back_ND, y_RD.new_zeros(1, y_RD.shape[1])])
        return parts_ND[handle.merge_RK].sum(1)


class StaticExchange:
    """The same with shapes fixed before the rows are known, so that nothing waits for the host.

    Room for every rank's rows is kept at every rank (a row may go anywhere); choices of other ranks are skipped
    where they arrive. The sums return as equal splits.
    """

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def send(self, rows: TravellingRows, rows_per_rank: int) -> TravellingRows:
        """All ranks' rows, ``rows_per_rank`` of each, in rank order; unused room has choices of no rank."""
        missing = rows_per_rank - rows.x_RD.shape[0]
        if missing < 0:
            raise ValueError(f"rows_per_rank ({rows_per_rank}) must be at least this rank's rows ({len(rows.x_RD)})")

        def everyone(values: torch.Tensor, fill: float) -> torch.Tensor:
            padded = torch.cat([values, values.new_full((missing, *values.shape[1:]), fill)])
            return gather_ranks(padded, self.context).flatten(0, 1)

        return replace(rows, ids_R=None).unpack(everyone(rows.pack(), -1.0), everyone(rows.x_RD, 0.0))

    def bring_back(self, y_RD: torch.Tensor, own_rows: int) -> torch.Tensor:
        """Every rank's part of this rank's rows, added up in rank order."""
        world = self.context.world_size
        splits = [y_RD.shape[0] // world] * world
        parts_WTD = all_to_all(y_RD, self.context, splits, splits).unflatten(0, (world, -1))
        return parts_WTD[:, :own_rows].sum(0)


def _one_hot(members_RK: torch.Tensor, world_size: int) -> torch.Tensor:
    """True at [member, row] where any choice of the row goes to the member."""
    flags_RW = torch.zeros(len(members_RK), world_size + 1, dtype=torch.bool, device=members_RK.device)
    return flags_RW.scatter_(1, members_RK.masked_fill(members_RK < 0, world_size), True)[:, :-1].T.contiguous()


def _repeats(members_RK: torch.Tensor) -> torch.Tensor:
    """True for a choice that goes to the same member as an earlier choice of its row."""
    same_RKK = members_RK[:, :, None] == members_RK[:, None, :]
    return same_RKK.tril(diagonal=-1).any(-1)
