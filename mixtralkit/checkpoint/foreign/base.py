"""What all checkpoints have in common whose linear layers others quantised: tensors that are made of stored ones.

A method (a file each beside this one) says of a layer in which format of ours its numbers are, and how the parts of
that format are made of what the file has. Parts are bit for bit the same numbers: what has no exact home is given as
float32 numbers instead. Everything is read a rectangle at a time, as stored tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from mixtralkit.checkpoint.files import Region
from mixtralkit.moe.weights import FORMATS, PLAIN, ExpertWeights, Fp8, Int4, Int8, PackedWeight
from mixtralkit.moe.weights.fp8 import BLOCK
from mixtralkit.moe.weights.int4 import pack_pairs

Bounds = tuple[int, int]
Make = Callable[[Bounds, Bounds], torch.Tensor]  # rows and columns to a tensor of them

_CHECKED_NUMBERS = 4 << 20  # of scales at a time
_MADE_BYTES = 1 << 20  # made at a time, so that what lies between stays in the processor's cache


@dataclass(frozen=True)
class Made(Region):
    """A tensor that is made while it is read.

    Attributes:
        stored: what it is made of, and is largest in the file.
        make: some rows and columns.
        meant: the dtype that its numbers had; None is the one that it is made in.
        is_across: ``stored`` has its columns as rows, so that columns and not rows are made one after the other.
    """

    stored: Region | None = None
    make: Make | None = None
    meant: torch.dtype | None = None
    is_across: bool = False

    @classmethod
    def of(
        cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, stored: Region, make: Make,
        meant: torch.dtype | None = None, is_across: bool = False,
    ) -> Made:  # fmt: skip
        pitch = (shape[-1] if len(shape) > 1 else 1) * dtype.itemsize
        return cls(stored.file, name, shape, dtype, stored.offset, pitch, stored, make, meant, is_across)

    @property
    def written(self) -> torch.dtype:
        return self.meant or self.dtype

    @property
    def end(self) -> int:
        return self.stored.end

    def position(self, row: int, column: int) -> int:
        """About where in the file what it is made of lies."""
        return self.offset + (self.stored.end - self.offset) * row // max(self.rows, 1)

    def read_into(self, out: torch.Tensor, row: int, column: int) -> None:
        (count, width), size = out.shape, self.dtype.itemsize
        if not count or not width:
            return
        step = max(BLOCK, _MADE_BYTES // ((count if self.is_across else width) * size) // BLOCK * BLOCK)
        for start in range(0, width if self.is_across else count, step):
            if self.is_across:
                part = out[:, start : start + step]
                rows, columns = (row, row + count), (column + start, column + start + part.shape[1])
            else:
                part = out[start : start + step]
                rows, columns = (row + start, row + start + len(part)), (column, column + width)
            part.copy_(self.make(rows, columns))


def piece(region: Region, rows: Bounds, columns: Bounds | None = None) -> torch.Tensor:
    """Rows and columns (None for all) of a tensor of a file, as they are stored."""
    first, last = columns or (0, region.columns)
    out = torch.empty(rows[1] - rows[0], last - first, dtype=region.dtype)
    region.read_into(out, rows[0], first)
    return out


def nibbles(pairs: torch.Tensor) -> torch.Tensor:
    """uint8 below 16 [R, 2 B] of the low and high halves of bytes [R, B]."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)


@dataclass(frozen=True)
class Linear:
    """A layer [O, K] of a foreign file.

    Attributes:
        weights: the format of ours that ``parts`` are in; plain where the file's has no exact form in any.
        parts: the format's tensors; of the plain one float32 numbers.
        numbers: the same as float32 numbers.
        why: the experts are not kept in a format of ours, where they are not.
    """

    weights: ExpertWeights
    parts: tuple[Region, ...]
    numbers: Region
    why: str = ""

    @classmethod
    def packed(cls, module: Module, weights: ExpertWeights, parts: tuple[Region, ...], why: str = "") -> Linear:
        numbers = _numbers(module, weights, parts)
        if weights.name not in FORMATS:
            why = why or f"{weights.name} is no format here"
        return cls(weights if not why else PLAIN, parts if not why else (numbers,), numbers, why)

    @classmethod
    def plain(cls, module: Module, stored: Region, make: Make, why: str, is_across: bool = False) -> Linear:
        numbers = Made.of(f"{module.name}.weight", module.shape, torch.float32, stored, make, module.meant, is_across)
        return cls(PLAIN, (numbers,), numbers, why)


@dataclass
class Module:
    """A linear layer as the file names it.

    Attributes:
        shape: [O, K] of the model's.
        tensors: by the end of their names.
        meant: the dtype that its numbers had.
        common: a number that divides K of all experts' layers.
        taken: the ends that were asked for.
    """

    name: str
    shape: tuple[int, int]
    tensors: Mapping[str, Region]
    meant: torch.dtype
    common: int
    taken: set[str] = field(default_factory=set)

    def error(self, end: str, found: object, wanted: object) -> ValueError:
        region = self.tensors.get(end) or next(iter(self.tensors.values()))
        return ValueError(f"{region.file}: {self.name}.{end}: found {found}, wanted {wanted}")

    def take(self, end: str, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> Region:
        """The tensor; ValueError unless it is there, with one of ``shapes`` and ``dtypes``."""
        self.taken.add(end)
        region = self.tensors.get(end)
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        if region is None:
            raise self.error(end, "nothing", f"a tensor {wanted}")
        if region.shape not in shapes:
            raise self.error(end, list(region.shape), wanted)
        if region.dtype not in dtypes:
            raise self.error(end, name_of(region.dtype), " or ".join(map(name_of, dtypes)))
        return region

    def scales(self, end: str, shapes: Sequence[tuple[int, ...]], may_be_zero: bool = False) -> Region:
        """Scales [rows, columns] of any floating dtype, which are looked at when they are read."""
        region = self.take(end, shapes, (torch.float32, torch.bfloat16, torch.float16))

        def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
            found = piece(region, rows, columns)
            wrong = ~found.isfinite() if may_be_zero else ~found.isfinite() | (found == 0)
            if wrong.any():
                raise self.error(end, f"a scale of {found[wrong][0].item()}", "finite numbers other than 0")
            return found

        return Made.of(region.name, region.shape, region.dtype, region, make)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Method(Protocol):
    """A way to quantise linear layers, as a ``config.json`` states it.

    Attributes:
        title: what people call it.
        marks: ends of tensors' names that only a quantised layer has.
        ignored: ends that say nothing about the weights.
    """

    title: str
    marks: tuple[str, ...]
    ignored: tuple[str, ...]

    def __init__(self, stated: Mapping[str, Any]) -> None:
        """ValueError, naming key, value and rule, for settings that are not read."""

    def linear(self, module: Module) -> Linear:
        """ValueError, naming file, tensor, found and wanted, where the tensors do not fit."""


def _numbers(module: Module, weights: ExpertWeights, parts: Sequence[Region]) -> Made:
    outputs, inputs = module.shape
    height = max(part.rows or 1 for part in weights.parts)

    def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
        top, left = rows[0] // height * height, columns[0] // weights.unit * weights.unit
        around = (top, min(-(-rows[1] // height) * height, outputs)), (left, min(weights.whole(columns[1]), inputs))
        tensors = [
            piece(region, *weights.bounds(part, *around)) for part, region in zip(weights.parts, parts, strict=True)
        ]
        numbers = weights.dequantize(PackedWeight(weights, around[1][1] - left, tuple(tensors)))
        return numbers[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]

    is_across = isinstance(parts[0], Made) and parts[0].is_across
    return Made.of(f"{module.name}.weight", module.shape, torch.float32, parts[0], make, module.meant, is_across)


def fp8_linear(module: Module, data: Region, scales: Region, scale: str) -> Linear:
    """Of e4m3 ``data`` [O, K] and multipliers: one, one an output, or one for 128 × 128."""
    weights, (outputs, inputs) = Fp8(scale), module.shape
    whole = weights.whole(inputs)
    if whole != inputs:
        stored = data

        def padded(rows: Bounds, columns: Bounds) -> torch.Tensor:
            found = piece(stored, rows, (columns[0], min(columns[1], inputs))).view(torch.uint8)
            return F.pad(found, (0, columns[1] - columns[0] - found.shape[1])).view(torch.float8_e4m3fn)

        data = Made.of(data.name, (outputs, whole), data.dtype, data, padded)
    data = replace(data, name=f"{module.name}.data")
    return Linear.packed(module, weights, (data, _as_floats(module, weights, scales)))


def by_output(linear: Linear) -> Linear:
    """The same with a scale for each output, if it has one for the matrix in e4m3."""
    if linear.weights != Fp8("tensor"):
        return linear
    data, scale = linear.parts

    def repeated(rows: Bounds, columns: Bounds) -> torch.Tensor:
        return piece(scale, (0, 1)).expand(rows[1] - rows[0], 1)

    scales = Made.of(scale.name, (data.rows, 1), scale.dtype, scale, repeated)
    return Linear(Fp8("channel"), (data, scales), linear.numbers)


def int8_linear(module: Module, data: Region, scales: Region) -> Linear:
    """Of int8 ``data`` [O, K] and a multiplier an output."""
    weights, (outputs, inputs) = Int8(), module.shape

    def padded(rows: Bounds, columns: Bounds) -> torch.Tensor:
        found = piece(data, rows, (columns[0], min(columns[1], inputs)))
        return F.pad(found, (0, columns[1] - columns[0] - found.shape[1]))

    made = Made.of(f"{module.name}.data", (outputs, weights.whole(inputs)), data.dtype, data, padded)
    return Linear.packed(module, weights, (made, _as_floats(module, weights, scales)))


def _as_floats(module: Module, weights: ExpertWeights, scales: Region) -> Region:
    part = weights.parts[1]
    shape = weights.shape(part, *module.shape)

    def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
        whole = piece(scales, (0, scales.rows)).float().view(shape) if scales.rows * scales.columns == 1 else None
        return piece(scales, rows, columns).float() if whole is None else whole

    return Made.of(f"{module.name}.{part.name}", shape, torch.float32, scales, make)


def int4_linear(
    module: Module, data: Region, pairs: Make, scales: Region, group: int, zeros: tuple[Region, Make] | None = None,
    transposed: bool = False, index: Region | None = None,
) -> Linear:  # fmt: skip
    """Of four bits a weight, (q - z) · s, z being 8 or given.

    Args:
        data: what ``pairs`` reads: bytes [rows, columns / 2] of the layer, of two neighbours, the first one low.
            Bounds of columns are even.
        scales: [O, K / ``group``], or the other way round where ``transposed``.
        group: columns with one scale; of several of our groups, each gets the same.
        zeros: what the zero points are in, and uint8 below 16 [rows, groups].
        index: [K], the group of each column where these are not neighbours; -1 is that they are.
    """
    outputs, inputs = module.shape
    held = next((size for size in (128, 64, 32) if math.gcd(group, module.common) % size == 0), group)
    weights = Int4(held, zeros is not None)
    whole, times = weights.whole(inputs), group // held

    def data_of(rows: Bounds, columns: Bounds) -> torch.Tensor:
        first, last = columns[0] // 32 * 64, min(-(-columns[1] // 32) * 64, whole)
        found = pairs(rows, (first, min(last, inputs)))
        found = F.pad(found, (0, (last - first) // 2 - found.shape[1]), value=0 if zeros else 0x88)
        return pack_pairs(found)[:, columns[0] - first // 2 : columns[1] - first // 2]

    def of_groups(make: Make) -> Make:
        def spread(rows: Bounds, columns: Bounds) -> torch.Tensor:
            first, last = columns[0] // times, min(-(-columns[1] // times), inputs // group)
            if first >= last:  # columns that are made up
                return make(rows, (0, 1)).new_zeros(rows[1] - rows[0], columns[1] - columns[0])
            found = make(rows, (first, last)).repeat_interleave(times, 1)[:, columns[0] - first * times :]
            return F.pad(found, (0, columns[1] - columns[0] - found.shape[1]))

        return spread

    def scales_of(rows: Bounds, groups: Bounds) -> torch.Tensor:
        return piece(scales, groups, rows).T if transposed else piece(scales, rows, groups)

    if index is not None:
        group_K = piece(index, (0, inputs)).flatten().long()
        if not (group_K.eq(-1) | group_K.eq(torch.arange(inputs) // group)).all():
            groups = inputs // group
            if group_K.amin() < 0 or group_K.amax() >= groups:
                raise module.error(index.name.rpartition(".")[2], f"group {group_K.amax()}", f"0 to {groups - 1}")

            def out_of_order(rows: Bounds, columns: Bounds) -> torch.Tensor:
                of_K = group_K[slice(*columns)]
                zero = zeros[1](rows, (0, groups))[:, of_K].float() if zeros else 8.0
                first = columns[0] // 2 * 2
                q_OK = nibbles(pairs(rows, (first, -(-columns[1] // 2) * 2)))[:, columns[0] - first :]
                return (q_OK[:, : len(of_K)].float() - zero) * scales_of(rows, (0, groups))[:, of_K].float()

            why = "its groups are not of neighbours (act-order)"
            return Linear.plain(module, data, out_of_order, why, is_across=transposed)
    is_half = _is_half(scales)
    shape, stem = (outputs, whole // held), module.name
    dtype = torch.float16 if is_half else scales.dtype
    parts = [
        Made.of(f"{stem}.data", (outputs, whole // 2), torch.uint8, data, data_of, is_across=transposed),
        Made.of(f"{stem}.scales", shape, dtype, scales, of_groups(scales_of)),
    ]
    if zeros is not None:
        parts.append(Made.of(f"{stem}.zeros", shape, torch.uint8, zeros[0], of_groups(zeros[1])))
    why = "" if is_half else f"scales are {name_of(scales.dtype)} and beyond float16"
    return Linear.packed(module, weights, tuple(parts), why)


def _is_half(scales: Region) -> bool:
    """Whether all are float16 numbers, for which those of any other dtype are read."""
    if scales.dtype == torch.float16:
        return True
    step = max(1, _CHECKED_NUMBERS // scales.columns)
    for first in range(0, scales.rows, step):
        found = piece(scales, (first, min(first + step, scales.rows)))
        if not found.half().to(found.dtype).equal(found):
            return False
    return True


def check_group(group: object, inputs: int, what: str) -> int:
    """Columns of a group; ValueError unless groups divide an input of so many columns. -1 is all of them."""
    if isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != -1):
        raise ValueError(f"{what} ({group!r}) must be a number of columns, or -1 for all")
    size = inputs if group == -1 else group
    if inputs % size or (size % 32 and 64 % size):
        raise ValueError(f"{what} ({group}) must divide {inputs} columns, and be a multiple of 32 or 1 to 16 by twos")
    return size


__all__ = [
    "BLOCK", "Bounds", "Linear", "Made", "Make", "Method", "Module", "by_output", "check_group", "fp8_linear",
    "int4_linear", "int8_linear", "name_of", "nibbles", "piece",
]  # fmt: skip
