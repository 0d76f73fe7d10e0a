"""A layer's choices after its plan's capacity; ``ops.capacity`` makes the cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mixtralkit.moe.router import Routing
from mixtralkit.ops.capacity import CapacityRule, cut_to_capacity


@dataclass(frozen=True)
class CutRouting:
    """What the dispatchers take.

    Attributes:
        experts_TK: int64 expert of each choice, -1 where the choice was dropped.
        weights_TK: float32, zero where dropped.
        dropped, rerouted: int64 scalars on the device, choices of this rank's rows.
        is_cut: whether some choice may be -1.
        valid_T: int64, negative for a row that only fills the shape and whose choices count as dropped; None where
            there is no such row, or ``experts_TK`` says so already.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    dropped: torch.Tensor
    rerouted: torch.Tensor
    is_cut: bool = True
    valid_T: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        routing: Routing,
        local_E: torch.Tensor,
        rule: CapacityRule | None,
        valid_T: torch.Tensor | None,
        none: torch.Tensor,
    ) -> CutRouting:
        """The routing, cut where there is a rule; ``none`` is an int64 zero on the device."""
        choices = routing.experts_TK, routing.weights_TK
        if rule is None:
            return cls(*choices, none, none, is_cut=False, valid_T=valid_T)
        return cls(*cut_to_capacity(*choices, routing.logits_TE, local_E, rule, valid_T))

    @property
    def kept_TK(self) -> torch.Tensor:
        """``experts_TK``, -1 also in rows that only fill the shape."""
        return self.experts_TK if self.valid_T is None else self.experts_TK.masked_fill((self.valid_T < 0)[:, None], -1)

    def take(self, rows_N: torch.Tensor | slice) -> CutRouting:
        """Of some of the rows."""
        experts_NK, weights_NK = self.experts_TK[rows_N], self.weights_TK[rows_N]
        valid_N = None if self.valid_T is None else self.valid_T[rows_N]
        return replace(self, experts_TK=experts_NK, weights_TK=weights_NK, valid_T=valid_N)
