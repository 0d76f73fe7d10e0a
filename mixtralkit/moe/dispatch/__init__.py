"""Rows to the ranks that compute them, and their weighted sums back: one protocol, one registry, a file each.

``planning.dispatchers`` says which one a step takes, and what each moves and costs; here is what they do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mixtralkit.config import MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.dispatch.base import Dispatcher, RoutedRows
from mixtralkit.moe.dispatch.coherent import CoherentDispatcher, CoherentSymmetricDispatcher
from mixtralkit.moe.dispatch.everywhere import GatheredDispatcher, ReplicatedDispatcher, SplitWidthDispatcher
from mixtralkit.moe.dispatch.exact import ExactDispatcher, StaticDispatcher, TwoStageDispatcher
from mixtralkit.moe.dispatch.local import LocalDispatcher
from mixtralkit.moe.dispatch.symmetric import SymmetricDispatcher
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.dispatchers import Surroundings, choose_dispatcher

__all__ = ["Dispatcher", "Dispatchers", "RoutedRows"]


@dataclass(frozen=True)
class Dispatchers:
    """Those of a model on this rank, by name, and the choice between them.

    Attributes:
        surroundings: what decides; the same on every rank.
        by_name: those that ``choose_dispatcher`` may name here.
        most_rows: of a rank that ``symmetric`` takes at once; more go in pieces.
    """

    surroundings: Surroundings
    by_name: dict[str, Dispatcher]
    most_rows: int = 0

    @classmethod
    def create(
        cls,
        layout: RankLayout,
        context: RankContext,
        options: MoEOptions,
        sums: RowReducer | None = None,
        symmetric: SymmetricExchange | None = None,
    ) -> Dispatchers:
        """For the layout; groups of nodes are made where the plan has several. Collective then.

        Args:
            sums: of rows that are on every rank; None leaves them to collectives.
            symmetric: memory that all ranks' kernels reach; None where there is none.
        """
        parallel, per_node = layout.parallel, layout.plan.ranks_per_node
        of = Surroundings(
            parallel.attention, parallel.experts, context.world_size, per_node, symmetric is not None, options.exchange
        )
        makers = {
            "local": LocalDispatcher,
            "split_width": lambda: SplitWidthDispatcher(context, sums),
            "replicated": lambda: ReplicatedDispatcher(context, sums),
            "gathered": lambda: GatheredDispatcher(context),
            "exact": lambda: ExactDispatcher(context),
            "static": lambda: StaticDispatcher(context),
            "symmetric": lambda: SymmetricDispatcher(symmetric),
            "two_stage": lambda: TwoStageDispatcher(context, *context.split_nodes(per_node)),
            "coherent": lambda: (
                CoherentDispatcher(context) if symmetric is None else CoherentSymmetricDispatcher(symmetric)
            ),
        }
        kinds = [
            (rows, decode, trains) for rows in (False, True) for decode in (False, True) for trains in (False, True)
        ]
        names = sorted({choose_dispatcher(replace(of, trains=t), r, d) for r, d, t in kinds})
        return cls(of, {name: makers[name]() for name in names}, symmetric.max_rows if symmetric is not None else 0)

    def name(self, rows_known: bool, decode: bool, trains: bool = False) -> str:
        """Of the dispatcher for a step; arguments as ``choose_dispatcher`` takes them."""
        return choose_dispatcher(replace(self.surroundings, trains=trains), rows_known, decode)
