"""Parts of a routing trace that is being recorded: a file for each rank, whole up to its last step at any moment."""

from __future__ import annotations

import glob
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np

from mixtralkit.json_file import check_ordinary, conform, parse_json

_MOST_HEADER_BYTES = 1 << 20


def part_of(path: str | Path, rank: int) -> Path:
    """Where ``rank`` writes while the trace at ``path`` is being recorded."""
    return Path(f"{path}.rank{rank}.part")


def parts_of(path: str | Path) -> list[Path]:
    """The parts there are of the trace at ``path``."""
    return sorted(Path(found) for found in glob.glob(f"{glob.escape(str(path))}.rank*.part"))


def check_replaceable(path: str | Path) -> None:
    """ValueError where something is at ``path`` that a file must not take the place of, such as a device."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: is no ordinary file, so no trace can take its place")


def check_unused(path: str | Path) -> None:
    """ValueError where a stopped run left parts of a trace at ``path``, which must not be mixed with another run's, or
    where no trace can be."""
    check_replaceable(path)
    left = parts_of(path)
    if left:
        raise ValueError(f"{left[0]}: a stopped run left it, with its routing; move it away or remove it")


class PartWriter:
    """Appends steps to a new part; each is with the operating system when ``add`` returns.

    A part is a line of JSON, then for every step: int32 the number of its spans; int32 sequence, first position and
    tokens of each span; int16 experts [L, T, K]; float16 weights [L, T, K]. Cheap to write, for it happens in decoding.

    Args:
        meta: JSON values, kept in the trace.
    """

    def __init__(
        self, path: Path, num_experts: int, num_layers: int, top_k: int, meta: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        header = {"num_experts": num_experts, "num_layers": num_layers, "top_k": top_k, "meta": dict(meta or {})}
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
        self._write(json.dumps(header).encode() + b"\n")

    def add(self, spans: Sequence[int], experts_LTK: np.ndarray, weights_LTK: np.ndarray) -> None:
        """Appends a step: ``spans`` sequence, first position, tokens, sequence, …; int16 experts and float16 weights.

        OSError, one sentence, when it cannot be written; the steps before it stay.
        """
        head = array("i", (len(spans) // 3, *spans))
        self._write(b"".join((head, experts_LTK, weights_LTK)))

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._file, data)
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            raise OSError(f"{self.path}: routing could not be written ({error.strerror})") from None

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_parts(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """The arrays of a trace file from its parts, by sequence and position; a step cut off at the end is left out."""
    header, steps = None, []
    for path in paths:
        check_ordinary(path)
        with open(path, "rb") as file:
            found = _header(file)
            if found is None:
                raise ValueError(f"{path.name} does not begin as a part of a trace does")
            if header is not None and found != header:
                raise ValueError(f"{path.name} is of another run than {paths[0].name}")
            header = found
            steps += _steps(file.read(), header["num_layers"], header["top_k"])
    shape = (0, header["num_layers"], header["top_k"])
    steps.append((np.zeros((2, 0), np.int32), np.zeros(shape, np.int16), np.zeros(shape, np.float16)))
    columns = np.concatenate([step[0] for step in steps], axis=1)
    experts, weights = (np.concatenate([step[i] for step in steps]) for i in (1, 2))
    order = np.lexsort(columns[::-1])
    return {
        "experts": experts[order],
        "weights": weights[order],
        "sequence": columns[0][order],
        "position": columns[1][order],
        "num_experts": np.array(header["num_experts"]),
        "meta": np.array(json.dumps(header["meta"])),
    }


class _Header(msgspec.Struct):
    num_experts: Annotated[int, msgspec.Meta(ge=1, le=32768)]
    num_layers: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    top_k: Annotated[int, msgspec.Meta(ge=1, le=512)]
    meta: dict[str, Any]


def _header(file: BinaryIO) -> dict[str, Any] | None:
    try:
        return msgspec.to_builtins(conform(parse_json(file.readline(_MOST_HEADER_BYTES)), _Header))
    except ValueError:
        return None


def _steps(data: bytes, num_layers: int, top_k: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each whole step (sequence, position) int32 [2, T], experts and weights [T, L, K]."""
    at = 0
    while at + 4 <= len(data):
        num_spans = int(np.frombuffer(data, np.int32, 1, at)[0])
        body = at + 4 + 12 * num_spans
        if num_spans < 0:
            raise ValueError(f"a step has {num_spans} spans")
        if body > len(data):
            return
        sequence, first, length = np.frombuffer(data, np.int32, 3 * num_spans, at + 4).reshape(-1, 3).T
        if length.min(initial=0) < 0:
            raise ValueError(f"a step has {length.min()} tokens of a sequence")
        tokens = int(length.sum(dtype=np.int64))
        numbers = num_layers * tokens * top_k
        at = body + 4 * numbers
        if at > len(data):
            return
        within = np.arange(tokens, dtype=np.int32) - np.repeat(length.cumsum() - length, length)
        columns = np.stack([np.repeat(sequence, length), np.repeat(first, length) + within])
        experts_LTK = np.frombuffer(data, np.int16, numbers, body).reshape(num_layers, tokens, top_k)
        weights_LTK = np.frombuffer(data, np.float16, numbers, body + 2 * numbers).reshape(experts_LTK.shape)
        yield columns.astype(np.int32), experts_LTK.swapaxes(0, 1), weights_LTK.swapaxes(0, 1)
