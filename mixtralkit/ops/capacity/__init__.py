"""The cut of choices to a cold expert's capacity, counted on the device, so that a CUDA graph can hold it."""

from __future__ import annotations

import torch

from mixtralkit.ops.capacity.reference import cut_to_capacity_reference
from mixtralkit.ops.capacity.types import Cut
from mixtralkit.ops.runtime import runs_triton
from mixtralkit.planning.capacity import CapacityRule

__all__ = ["CapacityRule", "Cut", "cut_to_capacity"]


def cut_to_capacity(
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    local_E: torch.Tensor,
    rule: CapacityRule,
    valid_T: torch.Tensor | None = None,
) -> Cut:
    """Each cold expert keeps the rule's share of the valid rows, the heaviest choices or the earliest rows'.

    What is over is dropped, or offered to the row's next-best experts in turn: ``planning.capacity.cut_choices`` says
    in which order. A row that lost a choice to another expert gets the softmax over the experts it ends with.

    Args:
        experts_TK, weights_TK, logits_TE: as ``ops.gate.gate`` gives them.
        local_E: bool, experts without a limit: those that are computed where the rows are.
        valid_T: int64, negative for a row without a sequence: it counts for nothing and loses all its choices.
    """
    if not runs_triton(weights_TK, logits_TE):
        return cut_to_capacity_reference(experts_TK, weights_TK, logits_TE, local_E, rule, valid_T)
    from mixtralkit.ops.capacity.triton import cut_rows

    return cut_rows(experts_TK, weights_TK, logits_TE, local_E, rule, valid_T)
