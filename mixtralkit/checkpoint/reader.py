"""A checkpoint folder of any format as canonical tensors, of which any rows and columns can be read alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixtralkit.checkpoint.discover import Found, recognise
from mixtralkit.checkpoint.files import ByteFile, Region
from mixtralkit.checkpoint.index import FOREIGN_DTYPES, PACKED_DTYPES, read_index
from mixtralkit.checkpoint.placing import Tile, Tiles, place, place_ranks
from mixtralkit.checkpoint.weight_hash import WeightHash
from mixtralkit.layout import canonical_shapes
from mixtralkit.moe.weights import PLAIN, ExpertWeights

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Block:
    """One read: ``out`` [rows, columns] = the same rectangle of ``region`` from ``row``, ``column`` on."""

    region: Region
    row: int
    column: int
    out: torch.Tensor

    @property
    def position(self) -> int:
        """Byte of its first element in the file."""
        return self.region.position(self.row, self.column)

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted from the file."""
        return self.out.numel() * self.region.dtype.itemsize

    def prefetch(self) -> None:
        """Asks the kernel for a block of cut rows, and for what lies between them, without waiting.

        Whole rows follow each other in the file and are read in one go, which the kernel is as quick at unasked.
        """
        if self.out.shape[1] * self.region.dtype.itemsize == self.region.pitch:
            return
        end = self.region.position(self.row + self.out.shape[0] - 1, self.column + self.out.shape[1])
        self.region.file.will_need(self.position, end - self.position)

    def read(self, scratch: torch.Tensor | None = None, weight_hash: WeightHash | None = None) -> None:
        """Fills ``out``: straight where it lies in memory as in the file, else through ``scratch`` (uint8).

        From pinned scratch to a GPU the copy is only begun, on the current stream. What was read is added to
        ``weight_hash``.
        """
        out, dtype = self.out, self.region.dtype
        if out.device.type == "cpu" and out.dtype == dtype and out.stride(1) == 1:
            self.region.read_into(out, self.row, self.column)
            if weight_hash is not None:
                weight_hash.add(self.region, self.row, self.column, out)
            return
        if scratch is None or len(scratch) < self.nbytes:
            scratch = torch.empty(self.nbytes, dtype=torch.uint8)
        block = scratch[: self.nbytes].view(dtype).view(out.shape)
        self.region.read_into(block, self.row, self.column)
        if weight_hash is not None:
            weight_hash.add(self.region, self.row, self.column, block)
        if out.dtype != dtype or not out.is_contiguous():
            block = block.to(out.device, non_blocking=True)  # so that conversion and transposition run there
        out.copy_(block, non_blocking=True)


class CheckpointReader:
    """Canonical tensors of a checkpoint folder; opening it reads names and shapes only.

    Attributes:
        folder: where it lies.
        kind: what was found there, in words.
        config: the model.
        found: its files, and the JSON file that the model was read from.
        weights: the format of its experts, or of those for which ``found.precision`` has none.
        attention_weights: that of attention and output in our own files.
        formats: that of each matrix which has another than the plain one, by canonical name without ``.weight``.
    """

    def __init__(
        self,
        found: Found,
        files: Sequence[ByteFile],
        tiles: Tiles,
        weights: ExpertWeights,
        formats: Mapping[str, ExpertWeights],
    ) -> None:
        self.folder, self.kind, self.config, self.found = found.folder, found.kind, found.config, found
        self.weights, self.attention_weights, self.formats = weights, found.attention_weights, formats
        self._files, self._tiles = tuple(files), tiles
        self._order = {id(file): i for i, file in enumerate(self._files)}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file descriptors back; nothing can be read any more."""
        for file in self._files:
            file.close()

    def formats_for(self, wanted: Mapping[str, ExpertWeights]) -> dict[str, ExpertWeights]:
        """In which each matrix is read for the wanted format: as it is held, or as numbers where these can be had too.

        They can of those in fewer bits that others made, and cannot of our own, which are rounded once.
        """
        held = {name: self.format_of(f"{name}.weight") for name in wanted}
        return {name: own if own == wanted[name] or self.found.layouts else PLAIN for name, own in held.items()}

    def format_of(self, source: str) -> ExpertWeights:
        """The format in which the matrix of a canonical name is held."""
        return self.formats.get(source.removesuffix(".weight"), PLAIN)

    @property
    def file_bytes(self) -> int:
        """Size of all weight files together."""
        return sum(file.size for file in self._files)

    @property
    def regions(self) -> list[Region]:
        """The stored tensors that are read, each once, in the order of the model."""
        held = {(id(t.region.file), t.region.name): t.region for tiles in self._tiles.values() for t in tiles}
        return list(held.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical names and shapes, in the order of the model; matrices as they are held, and then as numbers."""
        numbers = {name: shape for name, shape in canonical_shapes(self.config).items() if name in self._tiles}
        return canonical_shapes(self.config, self.formats) | numbers

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a canonical tensor is written in; quantised ones are meant in another than they are read."""
        return self._tiles[name][0].region.written

    def dtype_read(self, name: str) -> torch.dtype:
        """The dtype that a canonical tensor is read in."""
        return self._tiles[name][0].region.dtype

    def read(
        self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """A CPU tensor of ``dtype_read`` with rows and columns (half-open bounds, None for all) of ``name``."""
        shape = self.shapes()[name]
        rows = rows or (0, shape[0])
        size = [rows[1] - rows[0]]
        if len(shape) > 1:
            columns = columns or (0, shape[1])
            size.append(columns[1] - columns[0])
        out = torch.empty(size, dtype=self.dtype_read(name))
        for block in self.blocks(name, rows, columns, out):
            block.read()
        return out

    def blocks(
        self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None, out: torch.Tensor
    ) -> Iterator[Block]:
        """The reads, each of at most ``BLOCK_BYTES``, that fill ``out`` with rows and columns of ``name``.

        ``out`` is of any device and floating dtype, [rows, columns] or [rows] for a vector.
        """
        out_RC = out if out.dim() == 2 else out.unsqueeze(1)
        for tile in self._tiles[name]:
            yield from _tile_blocks(tile, rows, columns or (0, 1), out_RC)

    def order(self, block: Block) -> tuple[int, int]:
        """Sort key under which blocks are read from the disk in one direction."""
        return self._order[id(block.region.file)], block.position


def open_checkpoint(folder: str | Path, format: str | None = None) -> CheckpointReader:
    """Recognises the checkpoint in ``folder`` and checks that it is whole, without reading any weights.

    Args:
        format: which checkpoint to take where the folder holds several, as the writer's formats are called.

    ValueError, in one sentence that names files, tensors, found and wanted, for a folder that is missing, ambiguous
    or damaged, for missing, extra or misshapen tensors, and for a tensor that two files hold.
    """
    found = recognise(folder, format)
    files: list[ByteFile] = []
    try:
        indices = []
        for paths in found.files:
            files.append(ByteFile(paths))
            indices.append(read_index(files[-1], _dtypes(found)))
        if found.layouts:
            formats = found.layouts[0].matrix_formats
            return CheckpointReader(found, files, place_ranks(found, indices), found.weights, formats)
        return CheckpointReader(found, files, *place(found, indices))
    except BaseException:
        for file in files:
            file.close()
        raise


def _dtypes(found: Found) -> dict[str, torch.dtype]:
    """Dtypes that its tensors may have beside floating ones."""
    if found.method is not None:
        return FOREIGN_DTYPES
    packed = any(not weights.is_plain for layout in found.layouts[:1] for weights in layout.matrix_formats.values())
    return PACKED_DTYPES if packed else {}


def _tile_blocks(tile: Tile, rows: tuple[int, int], columns: tuple[int, int], out_RC: torch.Tensor) -> Iterator[Block]:
    """What of ``out_RC`` = canonical[rows, columns] this tile fills, in stored orientation and cut to blocks."""
    slab = tile.slab
    row_from, row_to = _inside(slab.rows, rows)
    column_from, column_to = _inside(slab.columns, columns)
    if row_from >= row_to or column_from >= column_to:
        return
    first = slab.rows[row_from] - rows[0]
    left = slab.columns[column_from] - columns[0]
    last = slab.rows[row_to - 1] - rows[0] + 1
    out = out_RC[first : last : slab.rows.step, left : left + column_to - column_from]
    if slab.transposed:
        out, row_from, column_from = out.T, column_from, row_from
    region, height = tile.region, out.shape[0]
    whole_rows = out.shape[1] * region.dtype.itemsize == region.pitch
    step = max(1, BLOCK_BYTES // (region.pitch if not whole_rows else out.shape[1] * region.dtype.itemsize))
    for start in range(0, height, step):
        part = out[start : start + step]
        yield Block(region, tile.row + row_from + start, tile.column + column_from, part)


def _inside(held: range, wanted: tuple[int, int]) -> tuple[int, int]:
    """Bounds of the positions in ``held`` whose values lie in ``wanted``."""
    ahead = max(0, math.ceil((wanted[0] - held.start) / held.step))
    behind = min(len(held), math.ceil((wanted[1] - held.start) / held.step))
    return ahead, behind
