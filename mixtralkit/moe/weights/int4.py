"""Four bits a weight, one scale for a group of columns of an output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from mixtralkit.moe.weights.base import ExpertWeights, PackedWeight, Part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Int4(ExpertWeights):
    """w ≈ (q - z) · s with q in 0 … 15, for every ``group`` columns of an output.

    Without zero points z is 8 and -8 is the weight of largest size, as in llama.cpp's Q4_0, or of two such the one
    above 0; with them the 16 steps
    reach from the smallest weight, or 0, to the largest. Scales are float16, rounded before the weights are.

    Of 64 columns, bits 4j … 4j + 3 of the i-th of 16 words of 16 bits are column 16j + i::

        byte  0        1        2        3      …  word i = bytes 2i, 2i + 1, the low byte first
        bits  16 | 0   48 | 32  17 | 1   49 | 33   columns in the high and the low half of each byte
    """

    group: int = 32
    zero_points: bool = False
    cpu_type: ClassVar[int] = 4

    @property
    def name(self) -> str:
        return f"int4:{self.group}" + (":zeros" if self.zero_points else "")

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        zeros = (Part("zeros", "uint8", columns=self.group),) if self.zero_points else ()
        return (Part("data", "uint8", columns=2), Part("scales", "float16", columns=self.group), *zeros)

    @property
    def unit(self) -> int:
        return max(64, self.group)

    def quantize(self, w_OK: torch.Tensor) -> PackedWeight:
        import torch
        import torch.nn.functional as F

        columns = w_OK.shape[-1]
        w_OGC = F.pad(w_OK.float(), (0, -columns % self.unit)).unflatten(-1, (-1, self.group))
        low_OG, high_OG = w_OGC.amin(-1), w_OGC.amax(-1)
        if self.zero_points:
            low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
            scales_OG = ((high_OG - low_OG) / 15).half()
        else:
            scales_OG = (torch.where(high_OG < -low_OG, low_OG, high_OG) / -8).half()
        step_OG = torch.where(scales_OG == 0, 1.0, scales_OG.float())
        zeros_OG = (-low_OG / step_OG).round().clamp(0, 15) if self.zero_points else torch.full_like(step_OG, 8.0)
        bits_OGC = (w_OGC / step_OG[..., None] + zeros_OG[..., None]).round_().clamp_(0, 15)
        zeros = (zeros_OG.to(torch.uint8),) if self.zero_points else ()
        return PackedWeight(self, columns, (pack_bits(bits_OGC.to(torch.uint8).flatten(-2)), scales_OG, *zeros))

    def dequantize(self, packed: PackedWeight) -> torch.Tensor:
        data, scales_OG, *zeros = packed.tensors
        bits_OGC = unpack_bits(data).unflatten(-1, (-1, self.group)).float()
        zeros_OG1 = zeros[0][..., None].float() if zeros else 8.0
        return ((bits_OGC - zeros_OG1) * scales_OG[..., None].float()).flatten(-2)[..., : packed.columns]


def pack_bits(bits_OK: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K / 2] of uint8 [..., K] below 16, K a multiple of 64."""
    import torch

    low, high = bits_OK.unflatten(-1, (-1, 2, 2, 16)).unbind(-2)  # of 64 columns 0 and 32, 16 and 48 are neighbours
    return (low | high << 4).transpose(-1, -2).contiguous().to(torch.uint8).flatten(-3)


_LOW = 0x0F0F0F0F0F0F0F0F  # the low halves of eight bytes


def pack_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """What ``pack_bits`` makes of columns of which two neighbours are in a byte of [..., K / 2], the first one low."""
    import torch

    # Of 64 columns, eight bytes at a time are columns 0, 16, 32 and 48 and those behind them.
    first, second = pairs.contiguous().view(torch.int64).unflatten(-1, (-1, 2, 2)).unbind(-1)
    even = (first & _LOW) | (second & _LOW) << 4
    odd = (first >> 4 & _LOW) | (second & ~_LOW)
    bytes_ = torch.stack([even, odd], -2).unsqueeze(-1).view(torch.uint8)  # [..., 2 parities, 2 halves of 64, 8]
    return bytes_.movedim(-1, -3).flatten(-4)


def unpack_bits(data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K], what ``pack_bits`` packed."""
    import torch

    bytes_ = data.unflatten(-1, (-1, 16, 2)).transpose(-1, -2)
    return torch.stack([bytes_ & 15, bytes_ >> 4], -2).flatten(-4)
