"""The dispatchers by name: how rows find their experts, and which one runs.

The layer, the simulator, the plan judge, memory and benchmarks all ask ``choose_dispatcher``, so that what is
predicted is what runs. ``mixtralkit.moe.dispatch`` has the code behind each name.

=============  ===========================  =============================================  ===========================
name           rows before                  rows travel                                    sums travel
=============  ===========================  =============================================  ===========================
local          on the only rank             no                                             no
split_width    on every rank                no; every rank has a part of every expert      one sum over the ranks
replicated     on every rank                no; every rank has some experts                one sum over the ranks
gathered       each rank its own            to every rank, split-width experts             one sum over the ranks
exact          each rank its own            once per destination rank, unequal splits      back, once per row sent
static         each rank its own            to every rank, in shapes fixed beforehand      back, in fixed shapes
symmetric      each rank its own            once per destination rank, by our kernels      fetched, by our kernels
two_stage      each rank its own            once per node, then once per rank inside       back the same way
coherent       where the last layer ran     to their choices' ranks; they stay at one      to the rank they stay at
=============  ===========================  =============================================  ===========================
"""

from __future__ import annotations

from dataclasses import dataclass

DISPATCHERS = (
    "local", "split_width", "replicated", "gathered", "exact", "static", "symmetric", "two_stage", "coherent"
)  # fmt: skip
ROWS_TRAVEL = frozenset({"exact", "static", "symmetric", "two_stage", "coherent"})
"""Those that move a rank's own rows: shadows, two phases and plans between steps are for them."""
IN_GRAPHS = frozenset({"local", "split_width", "replicated", "static", "symmetric"})
"""Those whose shapes and addresses do not depend on the routing, so that a CUDA graph can hold them."""


@dataclass(frozen=True)
class Surroundings:
    """What decides how rows travel, the same on every rank.

    Attributes:
        attention: ``"tp"``, ``"dp"`` or ``"coherent"``; ``experts``: ``"tp"`` or ``"ep"``.
        world_size, ranks_per_node: ``ranks_per_node`` is None when all ranks are on one node.
        symmetric: every rank's kernels reach every other rank's memory.
        exchange: what was asked for: ``"auto"``, ``"exact"`` or ``"static"``.
        trains: gradients are wanted, which only collectives carry.
    """

    attention: str
    experts: str
    world_size: int
    ranks_per_node: int | None = None
    symmetric: bool = False
    exchange: str = "auto"
    trains: bool = False


def choose_dispatcher(of: Surroundings, rows_known: bool, decode: bool) -> str:
    """The name of the dispatcher that runs.

    Args:
        rows_known: every rank knows beforehand how many rows each gives at most, as in all steps of an engine; without,
            only the counts of an exact exchange tell.
        decode: a step of one row a sequence.
    """
    if of.world_size == 1:
        return "local"
    if of.experts == "tp":
        return "split_width" if of.attention == "tp" else "gathered"
    if of.attention == "tp":
        return "replicated"
    if of.attention == "coherent" and decode:
        return "coherent"
    if rows_known and not of.trains:
        if of.exchange == "static":
            return "static"
        if of.exchange == "auto" and of.symmetric:
            return "symmetric"
        if of.exchange == "auto" and decode:
            return "static"
    return "two_stage" if of.ranks_per_node and 1 < of.ranks_per_node < of.world_size else "exact"
