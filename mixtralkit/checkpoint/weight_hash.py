"""A hash of all weights of a checkpoint, made of what the ranks read while they load, whatever each of them reads.

Of every stored tensor, as rows of 8-byte words w, the sum of a_r · b_c · w_rc over rows r and words c, modulo 2^64, a
and b being fixed odd numbers that look random. It is linear, so parts may come in any order, cut by rows and columns in
any way, and from any rank. It tells other weights from these, not an attacker's.
"""

from __future__ import annotations

import hashlib
import threading
from functools import lru_cache

import numpy as np
import torch

from mixtralkit.checkpoint.files import Region
from mixtralkit.distributed import RankContext

_WORD = 8
_ROWS, _WORDS = 1, 2  # which sequence of coefficients


class WeightHash:
    """Sums over what this rank reads; any number of threads may add."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], int] = {}
        self._adding = threading.Lock()

    def add(self, region: Region, row: int, column: int, block_RC: torch.Tensor) -> None:
        """Counts elements of ``region`` from ``row`` and ``column`` on: on the CPU, its dtype, unit column stride."""
        rows, columns = block_RC.shape
        if not rows or not columns:
            return
        weights_R = _coefficients(_ROWS, row, rows)
        start, width = column * region.dtype.itemsize, columns * region.dtype.itemsize
        pitch = block_RC.stride(0) * region.dtype.itemsize
        if not any(number % _WORD for number in (start, width, pitch, block_RC.data_ptr())):
            words_RC, by_C = block_RC.view(torch.int64), _coefficients(_WORDS, start // _WORD, width // _WORD)
        else:
            words_RC, by_C = _as_elements(block_RC, start)
        found = int((torch.mv(words_RC, by_C) * weights_R).sum())
        with self._adding:
            key = (id(region.file), region.name)
            self._sums[key] = self._sums.get(key, 0) + found

    def digest(self, regions: list[Region], context: RankContext) -> str:
        """The hash of all of ``regions``, the same on every rank. Collective."""
        own = [self._sums.get((id(region.file), region.name), 0) % 2**64 for region in regions]
        sums_N = torch.from_numpy(np.array(own, dtype=np.uint64).view(np.int64)).to(context.device)
        if context.world_size > 1:
            sums_N = context.all_gather(sums_N).view(context.world_size, -1).sum(0)
        digest = hashlib.sha256()
        for region, found in zip(regions, sums_N.tolist(), strict=True):
            digest.update(f"{region.name} {region.dtype} {region.shape} {found}\n".encode())
        return digest.hexdigest()


def _as_elements(block_RC: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements as unsigned numbers, and the coefficients by which they add up to what their words would."""
    size, columns = block_RC.element_size(), block_RC.shape[1]
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
    raw = block_RC.contiguous().view(-1).view(torch.uint8).numpy().view(kind).reshape(block_RC.shape)
    places = start + size * np.arange(columns)
    first = start // _WORD
    words = _coefficients(_WORDS, first, int(places[-1]) // _WORD - first + 1).numpy().view(np.uint64)
    shifts = (8 * (places % _WORD)).astype(np.uint64)
    by_C = (words[places // _WORD - first] << shifts).view(np.int64)
    return torch.from_numpy(raw.astype(np.uint64).view(np.int64)), torch.from_numpy(by_C)


@lru_cache(maxsize=256)
def _coefficients(sequence: int, start: int, count: int) -> torch.Tensor:
    """Odd int64 numbers ``start`` … of a fixed sequence (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.arange(start, start + count, dtype=np.uint64) + np.uint64(sequence << 48)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64))
