"""Names and places of the tensors in a ``.safetensors``, ``.pth`` or ``.pt`` file, without reading any of them.

A ``.pth`` is a zip archive of a pickle and of raw storages. The pickle is read with a list of what it may ask for that
is shorter than that of ``torch.load(weights_only=True)``: tensors described by sizes, and nothing that runs.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch

from mixtralkit.checkpoint.files import ByteFile, Cursor, Region
from mixtralkit.checkpoint.gguf import MAGIC, read_gguf_index
from mixtralkit.checkpoint.quantised import method_of_tensors, unstated
from mixtralkit.json_file import Count, conform, parse_json, shown

MOST_HEADER_BYTES = 100_000_000  # as safetensors itself has it
MOST_PICKLE_BYTES = 64 << 20  # of the names and sizes alone

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
PACKED_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}  # of our own format
FOREIGN_DTYPES = PACKED_DTYPES | {"I32": torch.int32, "U32": torch.int32, "I64": torch.int64}  # of other quantisers

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32,
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
}  # fmt: skip


def read_index(file: ByteFile, more: Mapping[str, torch.dtype] | None = None) -> dict[str, Region]:
    """Names and places of the tensors of a ``.safetensors``, ``.pth``, ``.pt`` or ``.gguf`` file, by its content.

    ``more`` are dtypes that safetensors may have beside floating ones. ValueError, naming the file, for a damaged
    file and for a pickle that asks for more than tensors.
    """
    head = file.read(0, min(file.size, 64))
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: is a Git LFS pointer and not the file itself; fetch it with git lfs pull")
    if head.startswith(MAGIC):
        return read_gguf_index(file)
    if ".safetensors" in file.paths[0].suffixes:
        return _read_safetensors_index(file, SAFETENSORS_DTYPES | (more or {}))
    if head.startswith(b"PK"):
        return _read_torch_index(file)
    if head.startswith(b"\x80"):
        raise ValueError(f"{file}: is in torch's format of before 1.6; torch.load it and torch.save it again")
    raise ValueError(f"{file}: is not a torch file (it starts with {head[:8]!r})")


def _read_safetensors_index(file: ByteFile, dtypes: Mapping[str, torch.dtype]) -> dict[str, Region]:
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else file.size
    if length > file.size - 8:
        raise ValueError(f"{file}: truncated: its header wants {length} bytes, the file has {file.size}")
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"{file}: its header claims {length:,} bytes, more than the {MOST_HEADER_BYTES:,} it may have")
    try:
        header = conform(parse_json(file.read(8, length)), dict)
        header.pop("__metadata__", None)
        entries = conform(header, dict[str, _Entry])
    except ValueError as error:
        raise ValueError(f"{file}: its safetensors header is not readable ({error})") from None
    stored = dict.fromkeys(entry.dtype for entry in entries.values())
    unknown = next((dtype for dtype in stored if dtype not in dtypes), None)
    if unknown is not None:
        method = method_of_tensors(entries) if len(dtypes) == len(SAFETENSORS_DTYPES) else None
        name = next(name for name, entry in entries.items() if entry.dtype == unknown)
        what = f"; it {unstated(method)}" if method else f"; only {', '.join(dtypes)} are read"
        raise ValueError(f"{file}: {shown(name)} is stored as {shown(unknown)}{what}")
    index = {}
    for name, entry in entries.items():
        shape, (start, end), torch_dtype = entry.shape, entry.data_offsets, dtypes[entry.dtype]
        if end - start != math.prod(shape) * torch_dtype.itemsize:
            raise ValueError(f"{file}: {name} has {end - start} bytes, its shape {list(shape)} wants another number")
        pitch = (shape[-1] if len(shape) > 1 else 1) * torch_dtype.itemsize
        index[name] = _checked(Region(file, name, shape or (1,), torch_dtype, 8 + length + start, pitch))
    return index


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[Count, Count]


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


class _TensorPickle(pickle._Unpickler):
    """Reads a pickle of tensors as their descriptions; asking for anything else raises ``_Refused``.

    Python's own unpickler and not C's, so that a key is looked at before it is hashed: tuples that hold the tuple below
    twice, forty deep, take a trillion steps to hash, to compare or to print.
    """

    dispatch = {  # noqa: RUF012  (what the base class has, but for what makes sets and objects)
        op: load
        for op, load in pickle._Unpickler.dispatch.items()
        if bytes([op]) not in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.INST, pickle.OBJ,
                               pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4)
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _new_dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _described
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise _Refused(f"{module}.{name}"[:200])

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str | int):
            raise _Refused(f"a {kind[:40]!r} object" if isinstance(kind, str) else "an object that is no storage")
        return _Storage(dtype, str(key))

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def load_build(self) -> None:
        state = self.stack.pop()  # the version of each module, beside the tensors
        if not isinstance(self.stack[-1], OrderedDict) or not isinstance(state, dict):
            raise _Refused("the state of an object")

    @staticmethod
    def _check_keys(keys: list[Any]) -> None:
        if not all(type(key) is str for key in keys):
            raise _Refused("a mapping whose keys are no texts")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BUILD[0]] = load_build


def _new_dict(*items: Any) -> OrderedDict[str, Any]:
    if items:
        raise _Refused("a mapping made of a list")
    return OrderedDict()


def _described(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = [start, *shape, *strides] if isinstance(shape, tuple) and isinstance(strides, tuple) else [None]
    if not isinstance(storage, _Storage) or not all(type(number) is int for number in numbers):
        raise ValueError("a tensor without a storage or whole numbers as sizes")
    return _Tensor(storage, start, shape, strides)


def _read_torch_index(file: ByteFile) -> dict[str, Region]:
    tail = min(file.size, 1 << 16)
    if b"PK\5\6" not in file.read(file.size - tail, tail):
        raise ValueError(f"{file}: truncated: the index at its end is missing; the file has {file.size} bytes")
    try:
        records = _records(file)
        if records["data.pkl"][1] > MOST_PICKLE_BYTES:
            raise ValueError(f"its pickle claims {records['data.pkl'][1]:,} bytes")
        content = _TensorPickle(io.BytesIO(file.read(*records["data.pkl"]))).load()
        big_endian = "byteorder" in records and file.read(records["byteorder"][0], 6) != b"little"
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
    return {name: _torch_region(file, name, tensor, records) for name, tensor in content.items()}


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
            if start + entry.file_size > file.size:
                raise ValueError(f"{entry.filename[:80]} claims {entry.file_size:,} bytes, more than the file has")
            records[entry.filename.partition("/")[2]] = (start, entry.file_size)
    return records


def _torch_region(file: ByteFile, name: str, tensor: object, records: Mapping[str, tuple[int, int]]) -> Region:
    if not isinstance(tensor, _Tensor):
        raise ValueError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor")
    shape, dtype, strides = tensor.shape or (1,), tensor.storage.dtype, tensor.strides or (1,)
    if min(*shape, *strides, tensor.start) < 0 or len(shape) != len(strides):
        raise ValueError(f"{file}: {name} has no valid sizes: {shown(shape)}, strides {shown(strides)}")
    place, size = records.get(f"data/{tensor.storage.key}", (0, 0))
    pitch = strides[-2] if len(shape) > 1 else 1
    folded = all(strides[i] == shape[i + 1] * strides[i + 1] for i in range(len(shape) - 2))
    if f"data/{tensor.storage.key}" not in records:
        raise ValueError(f"{file}: damaged: {name} is in storage {shown(tensor.storage.key)}, which is not there")
    overlaps = len(shape) > 1 and pitch < shape[-1]
    if (strides[-1] != 1 and shape[-1] != 1) or not folded or overlaps:
        raise ValueError(f"{file}: {name} is not stored row by row (strides {shown(strides)})")
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
