"""Matrices on the way from one format to another: rounded while they load or are written, or numbers again.

A matrix is rounded a block of whole rows at a time, of at most ``BLOCK_BYTES`` where its format has scales for rows or
for 128 of them; a format with one scale a matrix takes the matrix whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from mixtralkit.checkpoint.files import Region
from mixtralkit.checkpoint.reader import BLOCK_BYTES, Block, CheckpointReader
from mixtralkit.checkpoint.weight_hash import WeightHash
from mixtralkit.config import ModelConfig
from mixtralkit.layout import Piece, RankLayout, canonical_shapes
from mixtralkit.moe.weights import PLAIN, ExpertWeights, PackedWeight, Part


class Source(Protocol):
    """Canonical tensors to write: a ``CheckpointReader`` is one."""

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None) -> torch.Tensor:
        """Rows and columns (None for all) on the CPU; a vector has no columns to choose from."""
        ...


def put_packed(
    parameters: Mapping[str, torch.Tensor], layout: RankLayout, piece: Piece, w_OK: torch.Tensor, first: int = 0
) -> None:
    """Rounds whole rows ``first`` … of the piece's source matrix and keeps what of them the piece has.

    Args:
        w_OK: any floating dtype and device; ``first`` is the start of a block of the format's height.
    """
    rows = max(piece.rows[0], first), min(piece.rows[1], first + len(w_OK))
    if rows[0] >= rows[1]:
        return
    packed = piece.weights.quantize(w_OK)
    for part, tensor, target in zip(piece.weights.parts, packed.tensors, layout.parts(piece), strict=True):
        a, b = part.cut_rows(rows)
        start = 0 if part.rows is None else part.cut_rows((first, first))[0]
        *slot, place = target.at
        at = place.start + a - target.rows[0]
        values = tensor[a - start : b - start, slice(*target.columns)]
        parameters[target.target][(*slot, slice(at, at + b - a))].copy_(values)


@dataclass(frozen=True)
class RoundedBlock:
    """One read as ``reader.Block`` is: whole rows of a matrix, which are rounded when they are there."""

    reader: CheckpointReader
    parameters: Mapping[str, torch.Tensor]
    layout: RankLayout
    piece: Piece
    rows: tuple[int, int]

    def _blocks(self, out_RK: torch.Tensor) -> Iterator[Block]:
        return self.reader.blocks(self.piece.source, self.rows, (0, out_RK.shape[1]), out_RK)

    @cached_property
    def _first(self) -> Block:
        return next(self._blocks(self._empty("meta")))

    def _empty(self, device: str) -> torch.Tensor:
        columns = self.reader.shapes()[self.piece.source][1]
        return torch.empty(
            self.rows[1] - self.rows[0], columns, dtype=self.reader.dtype_read(self.piece.source), device=device
        )

    @property
    def region(self) -> Region:
        return self._first.region

    @property
    def position(self) -> int:
        return self._first.position

    @property
    def nbytes(self) -> int:
        return self._empty("meta").nbytes

    def prefetch(self) -> None:
        self._first.prefetch()

    def read(self, scratch: torch.Tensor | None = None, weight_hash: WeightHash | None = None) -> None:
        """As ``Block.read``; rounds on the parameters' device."""
        w_RK = self._empty("cpu")
        for block in self._blocks(w_RK):
            block.read(scratch, weight_hash)
        target = self.parameters[self.layout.parts(self.piece)[0].target]
        put_packed(self.parameters, self.layout, self.piece, w_RK.to(target.device), self.rows[0])


def rows_read(piece: Piece, outputs: int) -> tuple[int, int]:
    """Rows of a matrix that are read to round a piece of it."""
    return (0, outputs) if piece.weights.height is None else piece.rows


def rounded_blocks(
    reader: CheckpointReader, parameters: Mapping[str, torch.Tensor], layout: RankLayout, piece: Piece
) -> Iterator[RoundedBlock]:
    """The reads that fill a piece in another format than the checkpoint's."""
    outputs, columns = reader.shapes()[piece.source]
    first, last = rows_read(piece, outputs)
    step = _rows_at_a_time(piece.weights, columns * reader.dtype_read(piece.source).itemsize) or outputs
    for start in range(first, last, step):
        yield RoundedBlock(reader, parameters, layout, piece, (start, min(start + step, last)))


def _rows_at_a_time(weights: ExpertWeights, row_bytes: int) -> int | None:
    """Whole blocks of rows of about ``BLOCK_BYTES``; None for all of a matrix."""
    height = weights.height
    return None if height is None else max(1, BLOCK_BYTES // (row_bytes * height)) * height


@dataclass(frozen=True)
class InFormat:
    """A source of canonical tensors (``writer.Source``) with matrices in other formats than they are there.

    From plain weights they are rounded, and to plain ones made numbers again, to be written in the embedding's dtype.
    ``held`` and ``wanted`` have the format of each (``layout.matrix_formats``).
    """

    source: Source
    config: ModelConfig
    held: Mapping[str, ExpertWeights]
    wanted: Mapping[str, ExpertWeights]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return canonical_shapes(self.config)

    def _formats(self, name: str) -> tuple[ExpertWeights, ExpertWeights]:
        """In which the matrix of a tensor's name is held, and wanted; both plain for any other tensor."""
        stem = name.rpartition(".")[0]
        return self.held.get(stem, PLAIN), self.wanted.get(stem, PLAIN)

    def _part(self, name: str) -> tuple[str, Part]:
        """The name before the part's, and the part of the wanted format."""
        stem, _, part = name.rpartition(".")
        return stem, next(one for one in self._formats(name)[1].parts if one.name == part)

    def dtype(self, name: str) -> torch.dtype:
        held, wanted = self._formats(name)
        if held == wanted:
            return self.source.dtype(name)
        _, part = self._part(name)
        return self.source.dtype("tok_embeddings.weight") if part.dtype is None else getattr(torch, part.dtype)

    def read(self, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None) -> torch.Tensor:
        held, wanted = self._formats(name)
        if held == wanted:
            return self.source.read(name, rows, columns)
        stem, part = self._part(name)
        outputs, inputs = self._shapes[f"{stem}.weight"]
        rows = rows or part.cut_rows((0, outputs))
        height = (wanted if held.is_plain else held).height or outputs
        scale = part.rows or outputs  # rows of the matrix for one of the part
        first, last = rows[0] * scale // height * height, min(-(-rows[1] * scale // height) * height, outputs)
        step = max(1, BLOCK_BYTES // (4 * inputs * height)) * height
        found = []
        for start in range(first, last, step):
            stop = min(start + step, last)
            tensor = self._make(stem, part, (start, stop), inputs)
            begin = part.cut_rows((start, stop))[0]
            found.append(tensor[max(0, rows[0] - begin) : max(0, rows[1] - begin)])
        whole = torch.cat(found)
        return whole if columns is None else whole[:, slice(*columns)]

    def _make(self, stem: str, part: Part, rows: tuple[int, int], inputs: int) -> torch.Tensor:
        """The part, of whole rows of the matrix."""
        held, wanted = self._formats(f"{stem}.{part.name}")
        if held.is_plain:
            packed = wanted.quantize(self.source.read(f"{stem}.weight", rows, None))
            return packed.tensors[wanted.parts.index(part)]
        tensors = [self.source.read(f"{stem}.{p.name}", p.cut_rows(rows), None) for p in held.parts]
        return PackedWeight(held, inputs, tuple(tensors)).float()
