"""A weight matrix of attention, or of the output, in any format."""

from __future__ import annotations

import torch
from torch import nn

from mixtralkit.moe.weights import ExpertWeights, PackedWeight


class Projection(nn.Module):
    """A matrix [O, I] as ``ops.linear`` takes it: parameter ``weight``, or the parts of a format of fewer bits."""

    def __init__(
        self, outputs: int, inputs: int, weights: ExpertWeights, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weights, self.inputs = weights, inputs
        for part in weights.parts:
            held = dtype if part.dtype is None else getattr(torch, part.dtype)
            empty = torch.empty(weights.shape(part, outputs, inputs), dtype=held, device=device)
            self.register_parameter(part.name, nn.Parameter(empty, requires_grad=False))

    @property
    def matrix(self) -> torch.Tensor | PackedWeight:
        if self.weights.is_plain:
            return self.weight
        return PackedWeight(self.weights, self.inputs, tuple(getattr(self, part.name) for part in self.weights.parts))
