"""Bytes on disk: where each stored tensor lies in its file, and reads of just the bytes that are wanted.

Opening a file reads its index only. Nothing is mapped: a mapped file would count as resident memory of the rank.
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from mixtralkit.json_file import check_ordinary

NARROW_BYTES = 1024  # rows cut to less than this are read whole: a system call costs more than the bytes around them
READAHEAD_BYTES = 1 << 20  # the kernel shortens longer requests for readahead


class ByteFile:
    """One file, or the parts of one file in order, read at any offset by any number of threads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._files: list[int] = []
        self._starts = [0]
        self._picking = threading.Lock()
        for path in self.paths:
            check_ordinary(path)
            try:
                self._files.append(os.open(path, os.O_RDONLY))
            except OSError as error:
                raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
            self._starts.append(self._starts[-1] + os.fstat(self._files[-1]).st_size)

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} … {self.paths[-1].name}"

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return self._starts[-1]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills ``buffer`` from ``offset``; ValueError when the file ends before."""
        while len(buffer):
            part = self._part_of(offset)
            if part is None:
                raise ValueError(f"{self}: truncated: {len(buffer)} bytes wanted at {offset}, the file has {self.size}")
            wanted = min(len(buffer), self._starts[part + 1] - offset)
            try:
                got = os.preadv(self._files[part], [buffer[:wanted]], offset - self._starts[part])
            except OSError as error:
                raise ValueError(f"{self.paths[part]}: cannot be read ({error.strerror})") from None
            if got == 0:
                raise ValueError(f"{self.paths[part]}: was cut short while it was read")
            buffer, offset = buffer[got:], offset + got

    def read_rows_into(self, rows: np.ndarray, offset: int, pitch: int) -> None:
        """Fills each of ``rows`` (uint8) from places ``pitch`` bytes apart; ValueError when the file ends before."""
        count, width = rows.shape
        end = offset + (count - 1) * pitch + width
        part = self._part_of(offset)
        if part is None or end > self._starts[part + 1]:
            for i in range(count):
                self.read_into(memoryview(rows[i]), offset + i * pitch)
            return
        first = offset - self._starts[part]
        places = range(first, first + count * pitch, pitch)
        try:
            # one thread at a time: several hand Python's lock to and fro at every row, at twice the processor time
            with self._picking:
                got = sum(map(os.preadv, repeat(self._files[part]), zip(rows, strict=True), places))
        except OSError as error:
            raise ValueError(f"{self.paths[part]}: cannot be read ({error.strerror})") from None
        if got != rows.size:
            raise ValueError(f"{self.paths[part]}: was cut short while it was read")

    def _part_of(self, offset: int) -> int | None:
        return next((i for i in range(len(self._files)) if offset < self._starts[i + 1]), None)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; ValueError when the file ends before."""
        content = bytearray(size)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def will_need(self, offset: int, size: int) -> None:
        """Asks the kernel to read a stretch in one go, before rows are picked out of it."""
        if not hasattr(os, "posix_fadvise"):
            return
        for start in range(offset, offset + size, READAHEAD_BYTES):
            for part, file in enumerate(self._files):
                if self._starts[part] <= start < self._starts[part + 1]:
                    length = min(READAHEAD_BYTES, offset + size - start)
                    os.posix_fadvise(file, start - self._starts[part], length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Gives the file descriptors back."""
        for file in self._files:
            os.close(file)
        self._files.clear()


class Cursor(io.RawIOBase):
    """A position in a ``ByteFile``: what ``zipfile`` wants of a file object."""

    def __init__(self, file: ByteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self._file.size - self._at))
        self._file.read_into(memoryview(buffer)[:size], self._at)
        self._at += size
        return size


@dataclass(frozen=True)
class Region:
    """A stored tensor seen as a matrix: leading dimensions are folded into ``rows``, a vector has one column.

    ``offset`` is the byte of its first element, ``pitch`` the bytes from one row to the next.
    """

    file: ByteFile
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    pitch: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def written(self) -> torch.dtype:
        """The dtype that it is converted in where nobody asks for another."""
        return self.dtype

    @property
    def end(self) -> int:
        """Byte behind its last element."""
        return self.position(self.rows - 1, self.columns) if self.rows and self.columns else self.offset

    def position(self, row: int, column: int) -> int:
        """Byte of an element in the file."""
        return self.offset + row * self.pitch + column * self.dtype.itemsize

    def read_into(self, out: torch.Tensor, row: int, column: int) -> None:
        """Fills ``out`` [rows, columns], on the CPU, of the region's dtype and with unit column stride."""
        count, width = out.shape[0], out.shape[1] * self.dtype.itemsize
        start = self.position(row, column)
        if not count or not width:
            return
        if width == self.pitch and out.is_contiguous():
            self.file.read_into(memoryview(out.view(-1).view(torch.uint8).numpy()), start)
            return
        span = (count - 1) * self.pitch + width
        if width < NARROW_BYTES and width < self.pitch:
            whole = torch.empty(count * self.pitch, dtype=torch.uint8)
            self.file.read_into(memoryview(whole[:span].numpy()), start)
            out.copy_(whole.view(count, self.pitch)[:, :width].view(self.dtype))
            return
        self.file.read_rows_into(out.view(torch.uint8).numpy(), start, self.pitch)
