"""What a gate answers."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Gated(NamedTuple):
    """A gate's choice: expert ids int64 [T, K] by falling weight, weights and logits float32 [T, K] and [T, E].

    ``normed_TD`` are the rows the gate saw, which the experts see as well.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor
    normed_TD: torch.Tensor
