"""Files are written whole or not at all, and in the place of a file that is there only where somebody says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``path`` at the end; nothing is left where that fails.

    Devices and pipes are written themselves. ValueError that names ``path`` where it cannot be written.
    """
    path = Path(path)
    try:
        is_special = path.exists() and not path.is_file()
        unfinished = path if is_special else path.resolve().with_name(f"{path.resolve().name}.unfinished")
        try:
            yield unfinished
            if not is_special:
                unfinished.replace(path.resolve())
        finally:
            if not is_special:
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None


def check_free(path: Path | None, overwrite: bool) -> None:
    """ValueError where an ordinary file is at ``path`` and may not be replaced; before anything costly is done."""
    if path is not None and not overwrite and path.is_file():
        raise ValueError(f"{path}: is there already; name another file, or replace it with --overwrite")


def save_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """A picture of matplotlib's, of the kind that the name says; PNG where it says none."""
    with writing(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi, format=Path(path).suffix[1:] or "png")
