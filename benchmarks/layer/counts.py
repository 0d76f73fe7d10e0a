"""What one call of a layer moves and computes, by the plan's own rules and not by a clock."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.runtime import tuned
from mixtralkit.planning.replicas import is_small


@dataclass(frozen=True)
class Counts:
    """Of one call; of this rank's rows, or (``over_ranks``) of all ranks'.

    Attributes:
        computed_W: float64, choices that each rank computes; a part of a choice counts as one.
        bytes_WW: float64, bytes from rank to rank that these rows cause; collectives as a ring sends them.
        choices, at_home, dropped: int, all of them; those computed where they were because the expert is replicated
            there; those over a capacity.
        weight_bytes: of experts that moved, received by each rank but the owner.
        shadowed: experts that are local thanks to a copy.
    """

    computed_W: torch.Tensor
    bytes_WW: torch.Tensor
    choices: int
    at_home: int = 0
    dropped: int = 0
    weight_bytes: int = 0
    shadowed: tuple[int, ...] = ()

    def over_ranks(self, context: RankContext) -> Counts:
        """Collective."""
        sums = [self.choices, self.at_home, self.dropped]
        mine = torch.cat([self.computed_W, self.bytes_WW.flatten(), torch.tensor(sums, dtype=torch.float64)])
        total = context.all_reduce(mine.to(context.device)).cpu()
        world = context.world_size
        computed_W, bytes_N, last = total.split([world, world * world, len(sums)])
        whole = [int(value) for value in last]
        return Counts(computed_W, bytes_N.view(world, world), *whole, self.weight_bytes, self.shadowed)


def computing_ranks(dispatcher: str, cut: CutRouting, table: LayerTable, rows_per_rank: int) -> torch.Tensor:
    """int64 [T, K], where a dispatcher of travelling rows has each choice computed; -1 where it is dropped.

    Collective where counts are exchanged.
    """
    if dispatcher in ("exact", "two_stage", "coherent"):
        return table.pour(cut.kept_TK)[0]
    top_k, world = cut.experts_TK.shape[1], table.context.world_size
    return table.look_up(cut.kept_TK, is_small(rows_per_rank * world, top_k, len(table.local_E)))[0]


def traffic(
    dispatcher: str, ranks_TK: torch.Tensor, context: RankContext, row: int, sums: RowReducer | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``computed_W`` and ``bytes_WW`` of this rank's rows of ``row`` bytes, by the dispatcher's name.

    ``ranks_TK`` are ``computing_ranks``; only its shape counts where every rank computes a part of every choice, by
    ``sums`` for ``split_width``.
    """
    (rows, top_k), world = ranks_TK.shape, context.world_size
    packed = row + 12 * top_k  # ranks or experts, slots and weights beside each row, as ``TravellingRows.pack`` has it
    match dispatcher:
        case "local":
            return by_rows(ranks_TK, context, 0, 0)
        case "exact":
            return by_rows(ranks_TK, context, packed, row)
        case "static":
            return computed(ranks_TK, world), to_all(context, rows * (packed + row))
        case "symmetric":
            computed_W, bytes_WW = by_rows(ranks_TK, context, row, row)
            return computed_W, bytes_WW + to_all(context, 8 * ranks_TK.numel())  # a word for each choice, to every rank
        case "coherent+symmetric":
            bytes_WW = _bytes_of_moves(ranks_TK, context, row, row)
            return computed(ranks_TK, world), bytes_WW + to_all(context, 8 * ranks_TK.numel())
        case "coherent":
            return computed(ranks_TK, world), _bytes_of_moves(ranks_TK, context, packed + 4, row)  # and its number
        case "gathered":  # the rows, their experts and weights; then a ring's sum of all ranks' rows
            return torch.zeros(world, dtype=torch.float64), to_all(context, rows * (packed + 2 * row))
        case "split_width":
            one_trip = sums is not None and _in_one_trip(sums, rows * world)
            return torch.zeros(world, dtype=torch.float64), to_all(context, rows * row * (world if one_trip else 2))
    raise AssertionError(dispatcher)


def _bytes_of_moves(ranks_TK: torch.Tensor, context: RankContext, packed: int, row: int) -> torch.Tensor:
    """Rows go to the ranks of their choices; from there, parts to the rank of the heaviest, where the row stays."""
    goes_TW = members(ranks_TK, context.world_size)
    bytes_WW = there_and_back(goes_TW.sum(0), context, packed, 0)
    for stays in range(context.world_size):
        bytes_WW[:, stays] += row * goes_TW[ranks_TK[:, 0] == stays].sum(0).double().cpu()
    return bytes_WW.fill_diagonal_(0)


def _in_one_trip(sums: RowReducer, rows: int) -> bool:
    """Whether every rank sends all its parts to every other, as the kernel does with few rows."""
    if sums.memory is None or rows > sums.memory.one_trip:
        return False
    from mixtralkit.ops.all_reduce.triton import default_settings

    ranks, device = sums.context.world_size, sums.context.device
    settings = tuned("all_reduce", device, rows, dim=sums.dim, ranks=ranks)
    return not (settings or default_settings(rows, sums.dim, ranks, sums.dtype.itemsize))["two_trips"]


def by_rows(ranks_TK: torch.Tensor, context: RankContext, out: float, back: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``computed_W`` and ``bytes_WW`` of rows that go once to each rank that computes any of their choices.

    ``out`` bytes a row on its way there, ``back`` on its way home; -1 in ``ranks_TK`` goes nowhere.
    """
    goes_TW = members(ranks_TK, context.world_size)
    return computed(ranks_TK, context.world_size), there_and_back(goes_TW.sum(0), context, out, back)


def by_choices(
    ranks_TK: torch.Tensor, context: RankContext, out: float, back: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where a row goes once for every choice."""
    computed_W = computed(ranks_TK, context.world_size)
    return computed_W, there_and_back(computed_W, context, out, back)


def to_all(context: RankContext, size: float) -> torch.Tensor:
    """``bytes_WW`` of ``size`` bytes from this rank to each other."""
    bytes_WW = torch.zeros(context.world_size, context.world_size, dtype=torch.float64)
    bytes_WW[context.rank] = size
    return bytes_WW.fill_diagonal_(0)


def there_and_back(count_W: torch.Tensor, context: RankContext, out: float, back: float) -> torch.Tensor:
    """``bytes_WW`` of ``count_W`` things from this rank to each, ``out`` bytes there and ``back`` bytes back."""
    bytes_WW = torch.zeros(context.world_size, context.world_size, dtype=torch.float64)
    bytes_WW[context.rank] += out * count_W.double().cpu()
    bytes_WW[:, context.rank] += back * count_W.double().cpu()
    return bytes_WW.fill_diagonal_(0)


def members(ranks_TK: torch.Tensor, world: int) -> torch.Tensor:
    """bool [T, W], which ranks compute any of a row's choices."""
    return (ranks_TK[:, :, None] == torch.arange(world, device=ranks_TK.device)).any(1)


def computed(ranks_TK: torch.Tensor, world: int) -> torch.Tensor:
    """float64 [W] on the CPU, choices of these rows that each rank computes."""
    return (ranks_TK.flatten() + 1).bincount(minlength=world + 1)[1:].double().cpu()


def summary(calls: list[Counts]) -> dict[str, object]:
    """For JSON: means over the calls of a round, all ranks counted; bytes are those of the rank that sends most."""
    computed_CW = torch.stack([call.computed_W for call in calls])
    mean_C, max_C = computed_CW.mean(1), computed_CW.amax(1).clamp(min=1e-9)
    sent_W = torch.stack([call.bytes_WW.sum(1) for call in calls]).mean(0)
    choices = sum(call.choices for call in calls)
    found = {
        "bytes_sent": round(float(sent_W.max())),
        "hot_share": round(sum(call.at_home for call in calls) / choices, 4),
        "dropped": round(sum(call.dropped for call in calls) / len(calls), 2),
        "dropped_share": round(sum(call.dropped for call in calls) / choices, 4),
        "rows_max_over_mean": round(float((max_C / mean_C.clamp(min=1e-9)).mean()), 4),
        "rows_mean_over_max": round(float((mean_C / max_C).mean()), 4),
    }
    moved = sum(call.weight_bytes for call in calls) / len(calls)
    shadowed = sorted({expert for call in calls for expert in call.shadowed})
    return found | ({"shadowed": shadowed, "weight_bytes": round(moved)} if shadowed or moved else {})
