"""A checkpoint folder of any format as canonical tensors, of which any rows and columns can be read alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mixtralkit.checkpoint.discover import INDEX_JSON, SHARDED_PTH, Found, recognise
from mixtralkit.checkpoint.files import ByteFile, Region
from mixtralkit.checkpoint.foreign import InOurTerms, in_our_terms
from mixtralkit.checkpoint.index import FOREIGN_DTYPES, PACKED_DTYPES, read_index
from mixtralkit.checkpoint.names import STYLES, Slab, Stored, rank_tensors, stored_tensors
from mixtralkit.checkpoint.quantised import method_of_tensors, unstated
from mixtralkit.checkpoint.weight_hash import WeightHash
from mixtralkit.layout import canonical_shapes, expert_of
from mixtralkit.moe.weights import PLAIN, ExpertWeights

BLOCK_BYTES = 16 << 20
MOST_LISTED = 8
MOST_COMPARED_BYTES = 1 << 20  # repeated tensors up to this size, norms and gates, must be alike in every file
_DERIVED = (
    "rope.freqs",
    "rotary_emb.inv_freq",
    "rope_freqs.weight",
)  # tables that some tools store though the model computes them


@dataclass(frozen=True)
class Tile:
    """Where a slab of a canonical tensor lies: its first stored element is at ``row``, ``column`` of ``region``."""

    slab: Slab
    region: Region
    row: int
    column: int = 0


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
    """

    def __init__(
        self,
        found: Found,
        files: Sequence[ByteFile],
        tiles: dict[str, tuple[Tile, ...]],
        weights: ExpertWeights = PLAIN,
    ) -> None:
        self.folder, self.kind, self.config, self.found = found.folder, found.kind, found.config, found
        self.weights, self._files, self._tiles = weights, tuple(files), tiles
        self._order = {id(file): i for i, file in enumerate(self._files)}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file descriptors back; nothing can be read any more."""
        for file in self._files:
            file.close()

    @cached_property
    def formats_LE(self) -> list[list[ExpertWeights]]:
        """The format of each expert."""
        return _formats(self.found, self.weights)

    def formats_for(self, wanted_LE: Sequence[Sequence[ExpertWeights]]) -> list[list[ExpertWeights]]:
        """In which each expert is read for the wanted format: as it is held, or as numbers where these can be had too.

        They can of those in fewer bits that others made, and cannot of our own, which are rounded once.
        """
        pairs_LE = (zip(*row, strict=True) for row in zip(self.formats_LE, wanted_LE, strict=True))
        return [[own if own == new or self.found.layouts else PLAIN for own, new in row] for row in pairs_LE]

    def format_of(self, source: str) -> ExpertWeights:
        """The format of the expert of a canonical name."""
        layer, expert = expert_of(source)
        return self.formats_LE[layer][expert]

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
        """Canonical names and shapes, in the order of the model; experts' as they are held, and then as numbers."""
        numbers = {name: shape for name, shape in canonical_shapes(self.config).items() if name in self._tiles}
        return canonical_shapes(self.config, self.formats_LE) | numbers

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
            return CheckpointReader(found, files, _place_ranks(found, indices), found.weights)
        return CheckpointReader(found, files, *_place(found, indices))
    except BaseException:
        for file in files:
            file.close()
        raise


def _dtypes(found: Found) -> dict[str, torch.dtype]:
    """Dtypes that its tensors may have beside floating ones."""
    if found.method is not None:
        return FOREIGN_DTYPES
    return PACKED_DTYPES if found.layouts and found.layouts[0].formats != (PLAIN,) else {}


_Tiles = dict[str, tuple[Tile, ...]]


def _place(found: Found, indices: Sequence[dict[str, Region]]) -> tuple[_Tiles, ExpertWeights]:
    """Tiles of every canonical tensor from the tensors of all files, by their names and shapes; the experts' format.

    Where that is not plain, there are tiles of their numbers too.
    """
    known = {name: stored for style in STYLES for name, stored in stored_tensors(style, found.config).items()}
    regions: dict[str, list[Region]] = {}
    for index in indices:
        for name, region in index.items():
            regions.setdefault(name, []).append(region)
    _check_index(found, regions)
    if found.method is None:
        method = method_of_tensors(name for name in regions if name not in known)
        if method:
            raise ValueError(f"{found.folder}: {unstated(method)}")
        return _by_name(found, known, regions, len(indices)), PLAIN
    twice = next((parts for parts in regions.values() if len(parts) > 1), None)
    if twice:
        raise ValueError(f"{found.folder}: {twice[0].name} is in two files, {twice[0].file} and {twice[1].file}")
    ours = in_our_terms(found.method, known, {name: parts[0] for name, parts in regions.items()})
    if ours.why:
        warnings.warn(_takes_memory(found, ours), stacklevel=3)
    numbers = _by_name(found, known, {name: [region] for name, region in ours.numbers.items()}, 1)
    if ours.weights.is_plain:
        return numbers, PLAIN
    parts = {
        f"{name.removesuffix('weight')}{part.name}": stored.part(part, ours.weights)
        for name, stored in known.items() if name.endswith("weight") and ".experts." in stored.slabs[0].source
        for part in ours.weights.parts
    }  # fmt: skip
    tensors = {name: [region] for name, region in ours.tensors.items()}
    return numbers | _by_name(found, known | parts, tensors, 1, ours.weights), ours.weights


def _takes_memory(found: Found, ours: InOurTerms) -> str:
    experts = [shape for name, shape in canonical_shapes(found.config).items() if ".experts." in name]
    size = 2 * sum(map(math.prod, experts)) / 1e9
    return (
        f"{found.folder}: experts quantised by {found.method.title} become numbers, {size:,.1f} GB of memory in "
        f"16 bits, because {ours.why}; quantize rounds them to fewer bits"
    )


def _by_name(
    found: Found,
    known: Mapping[str, Stored],
    regions: Mapping[str, Sequence[Region]],
    files: int,
    weights: ExpertWeights = PLAIN,
) -> _Tiles:
    extra, misshapen, tiles = [], [], []
    for name, parts in regions.items():
        if name not in known:
            extra += [f"{name} {_shape(parts[0].shape)} in {parts[0].file}"] if not name.endswith(_DERIVED) else []
            continue
        _check_repeated(found, name, known[name], parts, files)
        placed = _put_together(known[name], parts)
        if placed is None:
            shapes = " + ".join(dict.fromkeys(_shape(part.shape) for part in parts))
            misshapen.append(f"{name} in {parts[0].file}: found {shapes}, wanted {_shape(known[name].shape)}")
        else:
            tiles += placed
    broken = {slab.source for name in regions if name in known for slab in known[name].slabs} if misshapen else set()
    return _complete(found, tiles, extra, misshapen, broken, weights)


def _check_index(found: Found, regions: Mapping[str, Sequence[Region]]) -> None:
    """ValueError unless every tensor of the index lies in the file that it names."""
    for name, file in found.weight_map.items():
        parts = regions.get(name, ())
        if not any(part.file.paths[0].name == file for part in parts):
            where = f"it is in {parts[0].file.paths[0].name}" if parts else "no file has it"
            raise ValueError(f"{found.folder}: {name} is not in {file}, where {INDEX_JSON} has it; {where}")


def _check_repeated(found: Found, name: str, stored: Stored, parts: Sequence[Region], files: int) -> None:
    """ValueError for a whole tensor in two files where the format does not repeat it.

    Model-parallel shards repeat norms and gates, alike in all; shards of whole experts repeat all else, in each.
    """
    whole = [part for part in parts if part.shape == stored.shape]
    if len(whole) < 2:
        return
    may_repeat = found.kind == SHARDED_PTH and ".experts." not in name
    if may_repeat and len(whole) == len(parts) == files:
        first = whole[0]
        size = first.end - first.offset
        if size > MOST_COMPARED_BYTES:
            return
        content = first.file.read(first.offset, size)
        different = [part for part in whole[1:] if part.file.read(part.offset, size) != content]
        if not different:
            return
        raise ValueError(f"{found.folder}: {name} differs between {whole[0].file} and {different[0].file}")
    raise ValueError(f"{found.folder}: {name} is in two files, {whole[0].file} and {whole[1].file}")


def _put_together(stored: Stored, parts: Sequence[Region]) -> list[Tile] | None:
    """Tiles of a tensor that is whole in every file, or cut over the files by rows or columns; None if neither."""
    if all(part.shape == stored.shape for part in parts):
        return _tiles(stored, parts[0])
    rank = len(stored.shape)
    if len(stored.slabs) > 1 or any(len(part.shape) != rank for part in parts):
        return None
    (slab,) = stored.slabs
    if all(part.columns == slab.width for part in parts):
        times, rest = divmod(sum(part.rows for part in parts), slab.height)
        if rest or not times or len(parts) % times or (times > 1 and len({part.rows for part in parts}) > 1):
            return None
        tiles, row = [], 0
        for part in parts[::times]:  # with fewer key-value heads than shards, neighbours hold the same rows
            tiles += _tiles(stored.cut_rows(range(row, row + part.rows)), part)
            row += part.rows
        return tiles
    if all(part.rows == slab.height for part in parts) and sum(part.columns for part in parts) == slab.width:
        tiles, column = [], 0
        for part in parts:
            tiles += _tiles(stored.cut_columns(range(column, column + part.columns)), part)
            column += part.columns
        return tiles
    return None


def _place_ranks(found: Found, indices: Sequence[dict[str, Region]]) -> _Tiles:
    """Tiles of every canonical tensor from the rank-ready files of our own format."""
    extra, misshapen, missing, tiles = [], [], [], []
    for layout, index, (path,) in zip(found.layouts, indices, found.files, strict=True):
        wanted = rank_tensors(layout)
        extra += [f"{name} {_shape(region.shape)} in {path}" for name, region in index.items() if name not in wanted]
        for name, stored in wanted.items():
            region = index.get(name)
            if region is None:
                missing.append(f"{name} {_shape(stored.shape)} in {path}")
            elif region.shape != stored.shape:
                misshapen.append(f"{name} in {path}: found {_shape(region.shape)}, wanted {_shape(stored.shape)}")
            else:
                tiles += _tiles(stored, region)
    if extra or misshapen or missing:
        raise _incomplete(found, missing, extra, misshapen)
    return _complete(found, tiles, [], [], set(), found.weights)


def _tiles(stored: Stored, region: Region) -> list[Tile]:
    tiles, row = [], 0
    for slab in stored.slabs:
        tiles.append(Tile(slab, region, row))
        row += slab.height
    return tiles


def _formats(found: Found, weights: ExpertWeights) -> list[list[ExpertWeights]]:
    """Of each expert: as our own files say, or ``weights``."""
    if found.layouts:
        return found.layouts[0].formats_LE
    return [[weights] * found.config.num_experts] * found.config.n_layers


def _complete(
    found: Found, tiles: Sequence[Tile], extra: list[str], misshapen: list[str], broken: set[str],
    weights: ExpertWeights,
) -> _Tiles:  # fmt: skip
    """Tiles by canonical name, each slab once; ValueError unless they fill every canonical tensor."""
    shapes = canonical_shapes(found.config, _formats(found, weights))
    by_name: dict[str, dict[Slab, Tile]] = {name: {} for name in shapes}
    for tile in tiles:
        by_name[tile.slab.source].setdefault(_untransposed(tile.slab), tile)
    missing = []
    for name, shape in shapes.items():
        covered = sum(len(slab.rows) * len(slab.columns) for slab in by_name[name])
        if covered > math.prod(shape):
            misshapen.append(f"{name}: stored twice, as {' and '.join(_sources(by_name[name].values()))}")
        elif covered < math.prod(shape) and name not in broken:
            missing.append(f"{name} {_shape(shape)}")
    if missing or extra or misshapen:
        raise _incomplete(found, missing, extra, misshapen)
    return {name: tuple(parts.values()) for name, parts in by_name.items()}


def _shape(shape: tuple[int, ...]) -> str:
    return str(list(shape))


def _untransposed(slab: Slab) -> Slab:
    return Slab(slab.source, slab.rows, slab.columns)


def _sources(tiles: Iterator[Tile]) -> list[str]:
    return list(dict.fromkeys(tile.region.name for tile in tiles))


def _incomplete(found: Found, missing: list[str], extra: list[str], misshapen: list[str]) -> ValueError:
    parts = []
    for title, items in (("missing", missing), ("not part of the model", extra), ("misshapen", misshapen)):
        if items:
            more = f" and {len(items) - MOST_LISTED} more" if len(items) > MOST_LISTED else ""
            parts.append(f"{len(items)} {title}: {', '.join(items[:MOST_LISTED])}{more}")
    return ValueError(f"{found.folder}: the tensors do not fit the model: {'; '.join(parts)}")


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
