"""Names and places of the tensors in a ``.safetensors``, ``.pth`` or ``.pt`` file, without reading any of them.

A ``.pth`` is a zip archive of a pickle and of raw storages. The pickle is read with a list of what it may ask for that
is shorter than that of ``torch.load(weights_only=True)``: tensors described by sizes, and nothing that runs.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mixtralkit.checkpoint.files import ByteFile, Cursor, Region

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32,
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
}  # fmt: skip


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


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    pass


class _TensorPickle(pickle.Unpickler):
    """Reads a pickle of tensors as their descriptions; asking for anything else raises ``_Refused``."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, start, shape, strides, *_: _Tensor(storage, start, tuple(shape), tuple(strides))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise _Refused(f"a {kind!r} object")
        return _Storage(dtype, str(key))


def _read_torch_index(file: ByteFile) -> dict[str, Region]:
    tail = min(file.size, 1 << 16)
    if b"PK\5\6" not in file.read(file.size - tail, tail):
        raise ValueError(f"{file}: truncated: the index at its end is missing; the file has {file.size} bytes")
    try:
        records = _records(file)
        content = _TensorPickle(io.BytesIO(file.read(*records["data.pkl"]))).load()
        big_endian = "byteorder" in records and file.read(*records["byteorder"]) != b"little"
    except _Refused as error:
        message = f"{file}: refused: its pickle asks for {error}, and a checkpoint may hold only plain tensors"
        raise ValueError(message) from None
    except Exception as error:  # a damaged archive or pickle raises anything
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise ValueError(f"{file}: damaged: its index cannot be read ({reason})") from None
    if big_endian:
        raise ValueError(f"{file}: was written on a big-endian machine; load it and save it again there as safetensors")
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    return {str(name): _torch_region(file, str(name), tensor, records) for name, tensor in content.items()}


def _records(file: ByteFile) -> dict[str, tuple[int, int]]:
    """Place and size of every record of the archive, by its name without the archive's folder."""
    records = {}
    with zipfile.ZipFile(Cursor(file)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            lengths = file.read(entry.header_offset + 26, 4)  # of the name and the padding before the bytes
            start = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little")
            start += int.from_bytes(lengths[2:], "little")
            records[entry.filename.partition("/")[2]] = (start, entry.file_size)
    return records


def _torch_region(file: ByteFile, name: str, tensor: object, records: Mapping[str, tuple[int, int]]) -> Region:
    if not isinstance(tensor, _Tensor):
        raise ValueError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor")
    shape, dtype, strides = tensor.shape or (1,), tensor.storage.dtype, tensor.strides or (1,)
    numbers = (*shape, *strides, tensor.start)
    if any(not isinstance(number, int) or number < 0 for number in numbers) or len(shape) != len(strides):
        raise ValueError(f"{file}: {name} has no valid sizes: {shape}, strides {strides}")
    place, size = records.get(f"data/{tensor.storage.key}", (0, 0))
    pitch = strides[-2] if len(shape) > 1 else 1
    folded = all(strides[i] == shape[i + 1] * strides[i + 1] for i in range(len(shape) - 2))
    if (strides[-1] != 1 and shape[-1] != 1) or not folded:
        raise ValueError(f"{file}: {name} is not stored row by row (strides {strides})")
    region = Region(file, name, shape, dtype, place + tensor.start * dtype.itemsize, pitch * dtype.itemsize)
    if region.end > place + size:
        raise ValueError(f"{file}: damaged: {name} goes beyond the {size} bytes that are stored for it")
    return _checked(region)


def _checked(region: Region) -> Region:
    if region.end > region.file.size:
        raise ValueError(
            f"{region.file}: truncated: {region.name} ends at byte {region.end}, the file has {region.file.size}"
        )
    return region
