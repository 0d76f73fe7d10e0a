"""Writes a checkpoint of any format, a block at a time: the whole model is never in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from mixtralkit.checkpoint.carried import carried_files
from mixtralkit.checkpoint.discover import OURS_JSON, checkpoint_files
from mixtralkit.checkpoint.files import ByteFile, Region
from mixtralkit.checkpoint.formats import DEFAULT_SHARDS, FORMATS, RankFiles, side_files, weight_files
from mixtralkit.checkpoint.index import PACKED_DTYPES, SAFETENSORS_DTYPES, read_index
from mixtralkit.checkpoint.names import Slab, Stored
from mixtralkit.checkpoint.quantising import InFormat, Source
from mixtralkit.checkpoint.reader import BLOCK_BYTES, CheckpointReader
from mixtralkit.checkpoint.unfinished import Unfinished
from mixtralkit.config import DTYPES, ModelConfig, parse_dtype
from mixtralkit.json_file import read_bytes
from mixtralkit.layout import canonical_shapes
from mixtralkit.moe.weights import PLAIN

__all__ = ["FORMATS", "RankFiles", "save_checkpoint"]

_SIDE_NAMES = ("params.json", "config.json", "model.safetensors.index.json", OURS_JSON)
_COPY_BYTES = 64 << 20


@dataclass(frozen=True)
class _InMemory:
    """Tensors at hand, on any device, as a source."""

    tensors: Mapping[str, torch.Tensor]

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None) -> torch.Tensor:
        part = self.tensors[name].detach()[slice(*rows or (None,))]
        return (part[:, slice(*columns)] if columns and part.dim() > 1 else part).cpu()


def save_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor] | CheckpointReader,
    format: str = "mistral",
    shards: int | None = None,
    dtype: str | torch.dtype | None = None,
    ranks: RankFiles | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Writes ``tensors`` (canonical names and shapes, see ``layout.canonical_shapes``) to ``folder``.

    Args:
        format: one of ``FORMATS``.
        shards: number of files, for the formats that have several.
        dtype: stored dtype; None keeps that of each tensor.
        ranks: how ``format="mixtralkit"`` is cut, and the formats of its matrices; one rank, and plain, when None.
            Other formats are plain.
        tokenizer: a ``tokenizer.model`` to copy; None takes the one beside a reader's files, if there is one. Other
            side files of a reader go along byte for byte (``carried.carried_files``).
        overwrite: replaces a checkpoint that is in ``folder``; other files there stay.
        progress: draws a bar.

    Returns the files written. Nothing of them is in ``folder`` before all are whole. Where a call with a reader is
    stopped, the same call goes on behind its last whole tensor. ValueError for a model that the format cannot hold and
    for a folder that is in use; OSError when the disk is full.
    """
    folder, ranks = Path(folder), ranks or RankFiles()
    dtype = None if dtype is None else parse_dtype(dtype)
    source = tensors if isinstance(tensors, CheckpointReader) else _checked(config, tensors)
    wanted = ranks.formats(config)
    held = tensors.formats_for(wanted) if isinstance(tensors, CheckpointReader) else dict.fromkeys(wanted, PLAIN)
    for name, new in wanted.items():
        option, own = "quantize" if ".experts." in name else "quantize_attention", held[name]
        if not new.is_plain and format != "mixtralkit":
            raise ValueError(f"{option} ({new.name!r}) needs format 'mixtralkit', not {format!r}")
        if not (own.is_plain or new.is_plain) and own != new:
            raise ValueError(f"{option} ({new.name!r}) must be {own.name!r}, in which the checkpoint is")
    if held != wanted:
        source = InFormat(source, config, held, wanted)
    files = weight_files(format, config, shards, ranks)
    old = _old_files(folder, overwrite)
    main = dtype or source.dtype("tok_embeddings.weight")
    side = side_files(format, config, _dtype_name(main), files, main.itemsize, ranks)
    beside = {name: text.encode() for name, text in side.items()}
    if isinstance(tensors, CheckpointReader):
        beside, notes = carried_files(tensors.found, side, _dtype_name(main))
        for note in notes:
            warnings.warn(note, stacklevel=2)
    if tokenizer is not None:
        beside["tokenizer.model"] = read_bytes(tokenizer)
    beside = {name: content for name, content in beside.items() if _may_write(folder / name, content, overwrite)}
    writer = _FileWriter(source, dtype)
    call = None
    if isinstance(tensors, CheckpointReader):
        stats = [(path, path.stat()) for paths in tensors.found.files for path in paths]
        read = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        call = repr((format, files, dtype, [weights.name for weights in wanted.values()], read))
    unfinished = Unfinished(folder, call)
    try:
        _write_all(unfinished, files, writer, progress)
        if format == "mistral-split":
            unfinished.forget()
            _split(unfinished.path / "consolidated.00.pth", shards or DEFAULT_SHARDS[format])
        for name, content in beside.items():
            (unfinished.path / name).write_bytes(content)
        return _move(unfinished, folder, old)
    except OSError as error:
        unfinished.discard()
        raise _disk_error(folder, error) from None
    except Exception:
        unfinished.discard()
        raise


def _may_write(path: Path, content: bytes, overwrite: bool) -> bool:
    """Side files that are there stay, but to overwrite them; a warning where they differ from what would be written."""
    if overwrite or not path.exists():
        return True
    if not path.is_file() or path.read_bytes() != content:
        warnings.warn(f"{path} is there already and stays as it is", stacklevel=3)
    return False


def _checked(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> _InMemory:
    wanted = canonical_shapes(config)
    wrong = [
        f"{name}: found {tuple(tensors[name].shape) if name in tensors else None}, wanted {wanted.get(name)}"
        for name in dict.fromkeys((*wanted, *tensors))
        if name not in tensors or tuple(tensors[name].shape) != wanted.get(name)
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit the model: {'; '.join(wrong[:8])}")
    return _InMemory(tensors)


def _old_files(folder: Path, overwrite: bool) -> list[Path]:
    """Makes the folder; the files of the checkpoint that is in it, which must not be there without ``overwrite``."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [path for paths in checkpoint_files(folder).values() for path in paths]
    old += [folder / name for name in _SIDE_NAMES if (folder / name).exists()]
    if old and not overwrite:
        raise ValueError(f"{folder}: already holds a checkpoint ({old[0].name}); choose another folder")
    return old


def _move(unfinished: Unfinished, folder: Path, old: list[Path]) -> list[Path]:
    for path in old:  # first, so that a stop in between leaves too few files and never a mixture of two models
        path.unlink()
    written = []
    for path in unfinished.finish():
        path.rename(folder / path.name)
        written.append(folder / path.name)
    unfinished.discard()
    return written


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(errno.ENOSPC, f"{folder}: the checkpoint needs {wanted:,} bytes, the disk has {free:,} left")


def _disk_error(folder: Path, error: OSError) -> OSError:
    if error.errno != errno.ENOSPC:
        return error
    return OSError(errno.ENOSPC, f"{folder}: the disk is full; nothing was written")


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name in DTYPES if parse_dtype(name) == dtype)


def _write_all(
    unfinished: Unfinished, files: Mapping[str, Mapping[str, Stored]], writer: _FileWriter, progress: bool
) -> None:
    sizes = [
        (writer.nbytes(stored), unfinished.has(file, name))
        for file, tensors in files.items() for name, stored in tensors.items()
    ]  # fmt: skip
    total, done = sum(size for size, _ in sizes), sum(size for size, is_done in sizes if is_done)
    _check_space(unfinished.path.parent, total - done)
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        for file, tensors in files.items():
            writer.write(unfinished, file, tensors, bar)


@dataclass(frozen=True)
class _FileWriter:
    """Writes one file at a time from ``source``; ``target_dtype`` of None keeps the source's."""

    source: Source
    target_dtype: torch.dtype | None

    def dtype(self, stored: Stored) -> torch.dtype:
        held = [self.source.dtype(slab.source) for slab in stored.slabs] or [torch.float32]
        if any(not slab.source.endswith(".weight") for slab in stored.slabs):  # of a format of fewer bits
            return held[0]
        return self.target_dtype or reduce(torch.promote_types, held)

    def nbytes(self, stored: Stored) -> int:
        return stored.numel * self.dtype(stored).itemsize

    def write(self, unfinished: Unfinished, name: str, tensors: Mapping[str, Stored], bar: tqdm) -> None:
        """First the file with all but the bytes of the tensors, then these in the places that its index names."""
        path = unfinished.path / name
        left = [tensor for tensor in tensors if not unfinished.has(name, tensor)]
        if len(left) == len(tensors):
            make = _make_safetensors if path.suffix == ".safetensors" else _make_torch
            make(path, {tensor: (stored.shape, self.dtype(stored)) for tensor, stored in tensors.items()})
        file = ByteFile((path,))
        try:
            index = read_index(file, PACKED_DTYPES)
        finally:
            file.close()
        with open(path, "r+b", buffering=0) as out:
            for tensor in left:
                self._fill(out.fileno(), index[tensor], tensors[tensor], bar)
                os.fdatasync(out.fileno())
                unfinished.add(name, tensor)
            os.fsync(out.fileno())

    def _fill(self, descriptor: int, region: Region, stored: Stored, bar: tqdm) -> None:
        row = 0
        for slab in stored.slabs:
            step = max(1, BLOCK_BYTES // (slab.width * region.dtype.itemsize))
            for start in range(0, slab.height, step):
                block = self._read(slab, range(start, min(start + step, slab.height))).to(region.dtype).contiguous()
                content = memoryview(block.view(-1).view(torch.uint8).numpy())
                _write_fully(descriptor, content, region.position(row + start, 0))
                bar.update(len(content))
            row += slab.height

    def _read(self, slab: Slab, stored_rows: range) -> torch.Tensor:
        """Rows of a slab as they are stored."""
        part = slice(stored_rows.start, stored_rows.stop)
        rows, columns = (slab.rows, slab.columns[part]) if slab.transposed else (slab.rows[part], slab.columns)
        block = self.source.read(slab.source, (rows[0], rows[-1] + 1), (columns.start, columns.stop))[:: rows.step]
        return block.T if slab.transposed else block


def _write_fully(descriptor: int, content: memoryview, offset: int) -> None:
    while len(content):
        done = os.pwrite(descriptor, content, offset)
        content, offset = content[done:], offset + done


def _make_safetensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    names = {dtype: name for name, dtype in (SAFETENSORS_DTYPES | PACKED_DTYPES).items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in tensors.items():
        size = dtype.itemsize
        for length in shape:
            size *= length
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _make_torch(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """A file of ``torch.save`` whose storages are holes in it; its checksums, which torch ignores, are not theirs."""
    with FakeTensorMode():
        content = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content, path)


def _split(path: Path, parts: int) -> None:
    """Cuts a file to ``NAME-split0`` …, from its end, so that the disk holds only one part twice."""
    size = path.stat().st_size
    if parts > size:
        raise ValueError(f"shards ({parts}) must be at most the bytes of the file ({size})")
    part_size = -(-size // parts)
    with open(path, "r+b") as whole:
        for i in reversed(range(1, parts)):
            whole.seek(i * part_size)
            with open(f"{path}-split{i}", "wb") as part:
                shutil.copyfileobj(whole, part, _COPY_BYTES)
            whole.truncate(min(size, i * part_size))
    path.rename(f"{path}-split0")
