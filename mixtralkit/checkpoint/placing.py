"""Which rectangles of which files make each canonical tensor, found by names and shapes, or what does not fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mixtralkit.checkpoint.discover import INDEX_JSON, SHARDED_PTH, Found
from mixtralkit.checkpoint.files import Region
from mixtralkit.checkpoint.foreign import InOurTerms, in_our_terms
from mixtralkit.checkpoint.names import STYLES, Slab, Stored, rank_tensors, stored_tensors
from mixtralkit.checkpoint.quantised import method_of_tensors, unstated
from mixtralkit.layout import canonical_shapes
from mixtralkit.moe.weights import PLAIN, ExpertWeights

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


Tiles = dict[str, tuple[Tile, ...]]  # by canonical name


def place(found: Found, indices: Sequence[dict[str, Region]]) -> tuple[Tiles, ExpertWeights, dict[str, ExpertWeights]]:
    """Tiles of every canonical tensor from the tensors of all files, by their names and shapes; the experts' format.

    The last is the format of each matrix that has another than the plain one: of these there are tiles of their numbers
    too.
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
        return _by_name(found, known, regions, len(indices)), PLAIN, {}
    twice = next((parts for parts in regions.values() if len(parts) > 1), None)
    if twice:
        raise ValueError(f"{found.folder}: {twice[0].name} is in two files, {twice[0].file} and {twice[1].file}")
    ours = in_our_terms(found.method, known, {name: parts[0] for name, parts in regions.items()})
    if ours.why:
        warnings.warn(_takes_memory(found, ours), stacklevel=3)
    numbers = _by_name(found, known, {name: [region] for name, region in ours.numbers.items()}, 1)
    parts, formats = {}, {}
    for name, weights in ours.formats.items():
        stored = known[f"{name}.weight"]
        parts |= {f"{name}.{part.name}": stored.part(part, weights) for part in weights.parts}
        formats |= {slab.source.removesuffix(".weight"): weights for slab in stored.slabs}
    tensors = {name: [region] for name, region in ours.tensors.items()}
    return numbers | _by_name(found, known | parts, tensors, 1, formats), ours.weights, formats


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
    formats: Mapping[str, ExpertWeights] | None = None,
) -> Tiles:
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
    return _complete(found, tiles, extra, misshapen, broken, formats)


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


def place_ranks(found: Found, indices: Sequence[dict[str, Region]]) -> Tiles:
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
    return _complete(found, tiles, [], [], set(), found.layouts[0].matrix_formats)


def _tiles(stored: Stored, region: Region) -> list[Tile]:
    tiles, row = [], 0
    for slab in stored.slabs:
        tiles.append(Tile(slab, region, row))
        row += slab.height
    return tiles


def _complete(
    found: Found, tiles: Sequence[Tile], extra: list[str], misshapen: list[str], broken: set[str],
    formats: Mapping[str, ExpertWeights] | None,
) -> Tiles:  # fmt: skip
    """Tiles by canonical name, each slab once; ValueError unless they fill every canonical tensor."""
    shapes = canonical_shapes(found.config, formats)
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
