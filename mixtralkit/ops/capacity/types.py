"""What a cut leaves."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Cut(NamedTuple):
    """Choices after the capacity.

    Attributes:
        experts_TK: int64, -1 where the choice was dropped or its row is not valid.
        weights_TK: float32, zero there.
        dropped, rerouted: int64 scalars on the device: choices of valid rows over a capacity that found no other
            expert, and that found one.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    dropped: torch.Tensor
    rerouted: torch.Tensor
