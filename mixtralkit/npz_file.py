"""Arrays from a ``.npy`` or ``.npz`` of anybody's: an ordinary file, plain arrays, and no more than it can hold."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mixtralkit.json_file import check_ordinary

_MOST_UNPACKED = 200  # times its own size that an archive may unpack to; routing packs about five times


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays by name, ``""`` in a ``.npy``; ValueError, without the path, for anything else."""
    size = check_ordinary(path)
    try:
        with open(path, "rb") as file:
            _check_claims(file, size)
            content = np.load(file, allow_pickle=False)
            arrays = {"": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content}
        if any(array.size and not array.dtype.itemsize for array in arrays.values()):
            raise ValueError  # elements of no bytes: any number of them fits any file
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from None
    except Exception:  # what a damaged archive or header raises differs from one to the next
        arrays = {"": None}
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError("is not a whole .npy or .npz file of plain arrays")
    return arrays


def _check_claims(file: BinaryIO, size: int) -> None:
    """ValueError where an archive says that it unpacks to far more than it holds, before anything is unpacked."""
    if file.read(2) == b"PK":
        claimed = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
        if claimed > max(_MOST_UNPACKED * size, 1 << 20):
            raise ValueError("unpacks to far more than it holds")
    file.seek(0)
