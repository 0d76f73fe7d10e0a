"""What tiers are told, what they answer, and what they count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from mixtralkit.checkpoint.mapped import MappedLayers
from mixtralkit.config import TierOptions
from mixtralkit.moe.tiers.bus import Ticket
from mixtralkit.moe.tiers.costs import Costs


@dataclass
class TierCounts:
    """What became of experts that rows asked for, since the start; of this rank.

    Attributes:
        hits: they were on the GPU, and had not been brought for these rows.
        misses: they were not.
        expected: of the misses, those that had been brought for the rows before they asked, or were on their way.
        fetches: experts brought whole, expected and wanted ones.
        products: experts computed on the CPU, all of their width or a part.
        splits: experts of which the CPU computed a part and the bus brought the rest.
        fetched_bytes: that came over the bus.
    """

    hits: int = 0
    misses: int = 0
    expected: int = 0
    fetches: int = 0
    products: int = 0
    splits: int = 0
    fetched_bytes: int = 0


@dataclass(frozen=True)
class TierSetup:
    """How a rank's experts are tiered.

    Attributes:
        places: experts that the GPU has room for.
        costs: what misses cost; None measures it before the first step.
        piece_rows: most rows that go through a layer's experts at once; None for all.
        mapped: layers whose experts stay in the checkpoint's file; None has all in memory.
        splits: whether a missed expert may be split between CPU and bus; None where there is a bus.
    """

    places: int
    options: TierOptions = field(default_factory=TierOptions)
    costs: Costs | None = None
    piece_rows: int | None = None
    splits: bool | None = None
    mapped: MappedLayers | None = None


class Answer(NamedTuple):
    """What becomes of a layer's experts, by slot.

    Attributes:
        here: on the GPU.
        late: on the GPU when ``tickets`` are done.
        cpu: on the CPU, the first ``first`` of their hidden columns, or all where that is None.
    """

    here: tuple[int, ...]
    late: tuple[int, ...] = ()
    tickets: tuple[Ticket, ...] = ()
    cpu: tuple[int, ...] = ()
    first: int | None = None
