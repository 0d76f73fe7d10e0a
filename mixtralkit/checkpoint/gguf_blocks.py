"""Numbers of llama.cpp's block formats, bit for bit as its own ``gguf`` package makes them.

A row is a run of blocks, each of some neighbours. ``planes`` are parts of bytes: byte i of a run of n bytes has, from
its low bits up, numbers i, n + i, 2n + i … of the run::

    16 bytes of 4 bits     low halves: numbers 0 … 15      high halves: numbers 16 … 31
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockType:
    """A type of a tensor in a file: ``weights`` numbers in ``size`` bytes."""

    name: str
    weights: int
    size: int
    numbers: Callable[[torch.Tensor], torch.Tensor]  # uint8 [N, size] to float32 [N, weights]


def planes(bytes_NB: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """uint8 [N, B · 8 / bits], the bits of each byte as numbers, in runs of ``run`` bytes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return ((bytes_NB.unflatten(1, (-1, 1, run)) >> shifts) & (2**bits - 1)).flatten(1)


def _half(bytes_N2: torch.Tensor) -> torch.Tensor:
    return bytes_N2.contiguous().view(torch.float16).float()


def _bits_of(bytes_NB: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 8 B]: bits in order, the low one of the first byte first."""
    return ((bytes_NB[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def _scaled(scales_NG: torch.Tensor, q_NW: torch.Tensor, less_NG: torch.Tensor | None = None) -> torch.Tensor:
    """scale · q [- less], by groups."""
    found = scales_NG[..., None] * q_NW.float().unflatten(1, (scales_NG.shape[1], -1))
    return (found if less_NG is None else found - less_NG[..., None]).flatten(1)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b[:, :2]) * (planes(b[:, 2:], 16, 4).float() - 8)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _half(b[:, :2]) * planes(b[:, 4:], 16, 4).float() + _half(b[:, 2:4])


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    q = planes(b[:, 6:], 16, 4) | _bits_of(b[:, 2:6]) << 4
    return _half(b[:, :2]) * (q.float() - 16)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    q = planes(b[:, 8:], 16, 4) | _bits_of(b[:, 4:8]) << 4
    return _half(b[:, :2]) * q.float() + _half(b[:, 2:4])


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b[:, :2])


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scales, q = b[:, :16], planes(b[:, 16:80], 32, 2)
    return _scaled(_half(b[:, 80:82]) * (scales & 15).float(), q, _half(b[:, 82:84]) * (scales >> 4).float())


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    """A weight is two bits less 4 where its bit of the mask is not set; scales are six bits less 32."""
    scales = planes(b[:, 96:104], 8, 4) | planes(b[:, 104:108], 4, 2) << 4
    q = planes(b[:, 32:96], 32, 2).float() - 4 * (1 - planes(b[:, :32], 32, 1).float())
    return _scaled(_half(b[:, 108:110]) * (scales.float() - 32), q)


def _scales_and_less(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K: 8 scales and 8 offsets of 6 bits in 12 bytes, by the two halves in front of them."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], 1)
    less = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], 1)
    return _half(b[:, :2]) * scales.float(), _half(b[:, 2:4]) * less.float()


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scales, less = _scales_and_less(b)
    return _scaled(scales, planes(b[:, 16:], 32, 4), less)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scales, less = _scales_and_less(b)
    return _scaled(scales, planes(b[:, 48:], 32, 4) | planes(b[:, 16:48], 32, 1) << 4, less)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    q = (planes(b[:, :128], 64, 4) | planes(b[:, 128:192], 32, 2) << 4).float() - 32
    return _scaled(_half(b[:, 208:210]) * b[:, 192:208].contiguous().view(torch.int8).float(), q)


BLOCK_TYPES = {
    2: BlockType("Q4_0", 32, 18, _q4_0), 3: BlockType("Q4_1", 32, 20, _q4_1), 6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1), 8: BlockType("Q8_0", 32, 34, _q8_0), 10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k), 12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k), 14: BlockType("Q6_K", 256, 210, _q6_k),
}  # fmt: skip
