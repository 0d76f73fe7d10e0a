"""Reading a value from a JSON file, so that what is wrong names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load_json(path: str | Path, parse: Callable[[Any], T]) -> T:
    """``parse`` of the file's content; ValueError with the path for an unreadable file, bad JSON or a bad value."""
    try:
        return parse(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
