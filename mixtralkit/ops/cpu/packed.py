"""Weights of 8 and 4 bits as the CPU's kernels read them (``quantised.h``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

UNIT = 64  # columns that lie together
GROUPS = (32, 128)  # weights of one scale for which kernels are compiled


@dataclass(frozen=True)
class PackedWeight:
    """Matrices [..., O, K], K made up to whole units and groups with zeros.

    Attributes:
        columns: K.
        group: weights of one scale, 0 for 8 bits.
        data: int8 [..., O, K], or uint8 [..., O, K / 2]: of 64 columns, 16 words of 16 bits, of which bits 4j … 4j + 3
            of word i are column 16j + i.
        scales: float32 [..., O] for 8 bits, float16 [..., O, K / group] for 4.
        zeros: uint8 [..., O, K / group], or None, which means 8. A weight of 4 bits is (bits - zero) · scale.
    """

    columns: int
    group: int
    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], self.columns))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.data, self.scales, self.zeros

    def __getitem__(self, slot: int) -> PackedWeight:
        """One of several matrices."""
        parts = (None if part is None else part[slot] for part in self.parts)
        return PackedWeight(self.columns, self.group, *parts)

    def float(self) -> torch.Tensor:
        """The weights in float32, [..., O, K]."""
        if self.group == 0:
            return self.data[..., : self.columns].float() * self.scales[..., None]
        words = self.data.view(torch.int16).unflatten(-1, (-1, 1, 16)).to(torch.int32)
        bits = (words >> (4 * torch.arange(4)[:, None])) & 15
        grouped = bits.flatten(-3).unflatten(-1, (-1, self.group)).float()
        zeros = 8.0 if self.zeros is None else self.zeros[..., None].float()
        return ((grouped - zeros) * self.scales[..., None].float()).flatten(-2)[..., : self.columns]


def pack_int8(values: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """From int8 [..., O, K] and float32 [..., O]."""
    data = F.pad(values, (0, -values.shape[-1] % UNIT)).contiguous()
    return PackedWeight(values.shape[-1], 0, data, scales.float().contiguous())


def pack_int4(bits: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: int) -> PackedWeight:
    """From uint8 [..., O, K] below 16 and, for each group of columns, float16 scales and maybe uint8 zeros.

    Raises:
        ValueError: a group without kernels.
    """
    if group not in GROUPS:
        raise ValueError(f"group ({group}) must be one of {', '.join(map(str, GROUPS))}")
    columns = bits.shape[-1]
    whole = -(-columns // max(UNIT, group)) * max(UNIT, group)
    missing = whole // group - scales.shape[-1]
    words = F.pad(bits, (0, whole - columns)).unflatten(-1, (-1, 4, 16)).to(torch.int32)
    packed = (words << (4 * torch.arange(4)[:, None])).sum(-2, dtype=torch.int32).to(torch.int16)
    data = packed.flatten(-2).view(torch.uint8).contiguous()
    scales, zeros = (
        None if part is None else F.pad(part, (0, missing)).contiguous() for part in (scales.half(), zeros)
    )
    return PackedWeight(columns, group, data, scales, zeros)
