"""Eight bits a weight, one scale an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mixtralkit.moe.weights.base import ExpertWeights, PackedWeight, Part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Int8(ExpertWeights):
    """w ≈ q · s_o with q in -127 … 127 and s_o = max |w_o| / 127, the scales in float32."""

    name: ClassVar[str] = "int8"
    parts: ClassVar = (Part("data", "int8"), Part("scales", "float32", columns=None))
    unit: ClassVar[int] = 64
    cpu_type: ClassVar[int] = 3

    def quantize(self, w_OK: torch.Tensor) -> PackedWeight:
        import torch
        import torch.nn.functional as F

        w_OK, columns = w_OK.float(), w_OK.shape[-1]
        scales_O1 = w_OK.abs().amax(-1, keepdim=True) / 127
        steps_OK = w_OK / torch.where(scales_O1 > 0, scales_O1, 1.0)
        data_OK = steps_OK.round_().clamp_(-127, 127).to(torch.int8)
        return PackedWeight(self, columns, (F.pad(data_OK, (0, -columns % self.unit)), scales_O1))

    def dequantize(self, packed: PackedWeight) -> torch.Tensor:
        data_OK, scales_O1 = packed.tensors
        return data_OK[..., : packed.columns].float() * scales_O1
