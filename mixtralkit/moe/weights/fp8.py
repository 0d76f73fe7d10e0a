"""Eight bits a weight in floating point (e4m3), with a scale for each matrix, output or block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mixtralkit.moe.weights.base import ExpertWeights, PackedWeight, Part

if TYPE_CHECKING:
    import torch

LARGEST = 448.0  # of e4m3
BLOCK = 128


@dataclass(frozen=True)
class Fp8(ExpertWeights):
    """w ≈ q · s with q in e4m3 and s = max |w| / 448, of the matrix, of an output, or of 128 × 128 weights; float32.

    ``scale`` is ``tensor``, ``channel`` or ``block``. w1 and w3 have scales of their own.
    """

    scale: str = "channel"

    @property
    def name(self) -> str:
        return f"fp8:{self.scale}"

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        rows, columns = {"tensor": (None, None), "channel": (1, None), "block": (BLOCK, BLOCK)}[self.scale]
        return Part("data", "float8_e4m3fn"), Part("scales", "float32", rows, columns)

    @property
    def unit(self) -> int:
        return BLOCK if self.scale == "block" else 1

    @property
    def height(self) -> int | None:
        return {"tensor": None, "channel": 1, "block": BLOCK}[self.scale]

    def quantize(self, w_OK: torch.Tensor) -> PackedWeight:
        import torch
        import torch.nn.functional as F

        outputs, columns = w_OK.shape[-2:]
        w_OK = F.pad(w_OK.float(), (0, -columns % self.unit))
        size_OK = w_OK.abs()
        if self.scale == "tensor":
            most = size_OK.amax((-2, -1), keepdim=True)
        elif self.scale == "channel":
            most = size_OK.amax(-1, keepdim=True)
        else:
            blocks = F.pad(size_OK, (0, 0, 0, -outputs % BLOCK)).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
            most = blocks.amax((-3, -1))
        scales = most / LARGEST
        steps = w_OK / self._spread(torch.where(scales > 0, scales, 1.0), outputs)
        data = steps.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return PackedWeight(self, columns, (data, scales))

    def dequantize(self, packed: PackedWeight) -> torch.Tensor:
        data, scales = packed.tensors
        return (data.float() * self._spread(scales, data.shape[-2]))[..., : packed.columns]

    def _spread(self, scales: torch.Tensor, outputs: int) -> torch.Tensor:
        """Scales as they multiply the matrix."""
        if self.scale != "block":
            return scales
        return scales.repeat_interleave(BLOCK, -2)[..., :outputs, :].repeat_interleave(BLOCK, -1)
