"""What every dispatcher takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.hidden import Hidden, Norm


@dataclass(frozen=True)
class RoutedRows:
    """Rows at the rank that computes them.

    Attributes:
        x_RD: the rows.
        slots_RK: int64 slot of this rank's expert for each choice of the row, -1 where another rank computes it.
        weights_RK: float32 weight of each choice.
        residual_RD, out_RD, likely_rows: as ``ops.experts.expert_sum`` takes them.
    """

    x_RD: torch.Tensor
    slots_RK: torch.Tensor
    weights_RK: torch.Tensor
    residual_RD: torch.Tensor | None = None
    out_RD: torch.Tensor | None = None
    likely_rows: int | None = None


class Dispatcher(Protocol):
    """How rows of one layer find their experts, and their sums the way back.

    ``dispatch`` returns the rows that this rank computes and a handle; ``combine`` takes one partial sum for each of
    them and the handle, and returns the rows that were given to ``dispatch``, in their order.
    """

    def dispatch(
        self, hidden: Hidden, cut: CutRouting, table: LayerTable, rows_per_rank: int | None = None
    ) -> tuple[RoutedRows, Any]:
        """Collective.

        Args:
            hidden: rows with ``normed_TD``, which the experts see; ``x_TD`` is what the sums are added to.
            cut: the choices, -1 where one is dropped.
            rows_per_rank: the most rows that any rank gives, where all ranks know that; None where they do not.
        """

    def combine(self, y_RD: torch.Tensor, handle: Any, norm: Norm | None = None) -> Hidden:
        """x + Σ parts, and its norm by ``norm`` where that comes cheaper here. Collective."""
