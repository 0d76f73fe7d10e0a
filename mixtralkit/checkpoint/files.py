"""Bytes on disk: where each stored tensor lies in its file, and reads of just the bytes that are wanted.

Opening a file reads its index only. Nothing is mapped: a mapped file would count as resident memory of the rank.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

NARROW_BYTES = 1024  # rows cut to less than this are read whole: a system call costs more than the bytes around them
READAHEAD_BYTES = 1 << 20  # the kernel shortens longer requests for readahead

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


class ByteFile:
    """One file, or the parts of one file in order, read at any offset by any number of threads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._files: list[int] = []
        self._starts = [0]
        for path in self.paths:
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


class _Cursor(io.RawIOBase):
    """A position in a ``ByteFile``: what ``torch.load`` wants of a file object."""

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
        self.file.will_need(start, span)
        self.file.read_rows_into(out.view(torch.uint8).numpy(), start, self.pitch)


def read_index(file: ByteFile) -> dict[str, Region]:
    """Names and places of the tensors of a ``.safetensors``, ``.pth`` or ``.pt`` file, by its content.

    ValueError, naming the file, for a damaged file and for a pickle that asks for more than tensors.
    """
    head = file.read(0, min(file.size, 64))
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: is a Git LFS pointer and not the file itself; fetch it with git lfs pull")
    if ".safetensors" in file.paths[0].suffixes:
        return _read_safetensors_index(file)
    if head.startswith(b"PK"):
        return _read_torch_index(file)
    if head.startswith(b"\x80"):
        raise ValueError(f"{file}: is in torch's format of before 1.6; torch.load it and torch.save it again")
    raise ValueError(f"{file}: is not a torch file (it starts with {head[:8]!r})")


def _read_safetensors_index(file: ByteFile) -> dict[str, Region]:
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else file.size
    if length > file.size - 8:
        raise ValueError(f"{file}: truncated: its header wants {length} bytes, the file has {file.size}")
    try:
        header = json.loads(file.read(8, length))
        entries = {k: _safetensors_entry(v) for k, v in header.items() if k != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: its safetensors header is not readable") from None
    index = {}
    for name, (dtype, shape, start, end) in entries.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"{file}: {name} is stored as {dtype}; only {', '.join(SAFETENSORS_DTYPES)} are read")
        torch_dtype = SAFETENSORS_DTYPES[dtype]
        if end - start != math.prod(shape) * torch_dtype.itemsize:
            raise ValueError(f"{file}: {name} has {end - start} bytes, its shape {list(shape)} wants another number")
        pitch = (shape[-1] if len(shape) > 1 else 1) * torch_dtype.itemsize
        index[name] = _checked(Region(file, name, shape or (1,), torch_dtype, 8 + length + start, pitch))
    return index


def _safetensors_entry(entry: dict) -> tuple[str, tuple[int, ...], int, int]:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if any(not isinstance(number, int) or number < 0 for number in (*shape, start, end)):
        raise ValueError("sizes and places must be whole numbers of at least 0")
    return entry["dtype"], shape, start, end


def _read_torch_index(file: ByteFile) -> dict[str, Region]:
    tail = min(file.size, 1 << 16)
    if b"PK\5\6" not in file.read(file.size - tail, tail):
        raise ValueError(f"{file}: truncated: the index at its end is missing; the file has {file.size} bytes")
    try:
        with FakeTensorMode():  # reads the pickle and the places of the storages, none of their bytes
            content = torch.load(_Cursor(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)|class (\S+)|[Uu]nsupported (.+)", str(error))
        what = next((g for g in asked.groups() if g), "") if asked else "something else"
        raise ValueError(
            f"{file}: refused: its pickle asks for {what}, and a checkpoint may hold only tensors"
        ) from None
    except Exception as error:  # a damaged pickle makes torch raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{file}: damaged: torch cannot read its index ({reason})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    return {name: _torch_region(file, name, tensor) for name, tensor in content.items()}


def _torch_region(file: ByteFile, name: str, tensor: object) -> Region:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{file}: {name} is stored as {tensor.dtype}; only floating-point tensors are read")
    if not tensor.is_contiguous() and (tensor.dim() != 2 or tensor.stride(1) != 1):
        raise ValueError(f"{file}: {name} is not stored row by row (strides {tuple(tensor.stride())})")
    shape, itemsize = tuple(tensor.shape) or (1,), tensor.dtype.itemsize
    pitch = (1 if len(shape) == 1 else tensor.stride(-2)) * itemsize
    offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * itemsize
    return _checked(Region(file, name, shape, tensor.dtype, offset, pitch))


def _checked(region: Region) -> Region:
    end = region.position(region.rows - 1, region.columns) if region.rows and region.columns else 0
    if end > region.file.size:
        raise ValueError(f"{region.file}: truncated: {region.name} ends at byte {end}, the file has {region.file.size}")
    return region
