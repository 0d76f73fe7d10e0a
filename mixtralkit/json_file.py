"""Files from outside as checked values: an ordinary file of bounded size, its JSON, and a type that it must have.

What is wrong is one sentence that names the file, the key, what stands there and the rule.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")

MOST_JSON_BYTES = 512 << 20
_KINDS = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISCHR: "device", stat.S_ISBLK: "device",
          stat.S_ISSOCK: "socket"}  # fmt: skip
_RULES = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "object": "an object",
    "array": "a list", "null": "null",
}  # fmt: skip

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


def check_ordinary(path: str | Path) -> int:
    """The size of an ordinary file, in bytes; ValueError for anything else, which may never end."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(status.st_mode)), "special file")
        raise ValueError(f"{path}: is a {kind}, not an ordinary file")
    return status.st_size


def read_bytes(path: str | Path, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """The content of an ordinary file of at most ``most_bytes``; ValueError names it."""
    size = check_ordinary(path)
    if size > most_bytes:
        raise ValueError(f"{path}: has {size:,} bytes, more than the {most_bytes:,} that such a file may have")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer and not the file itself; fetch it with git lfs pull")
    return content


def read_text(path: str | Path, most_bytes: int = MOST_JSON_BYTES) -> str:
    """UTF-8 text of an ordinary file, without a byte order mark; ValueError names it."""
    try:
        return read_bytes(path, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def parse_json(text: str | bytes) -> Any:
    """JSON with finite numbers; ValueError says what it is not."""
    try:
        return json.loads(text, parse_constant=_not_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("is not JSON that can be read (nested too deep)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None


def load_json(path: str | Path, parse: Callable[[Any], T]) -> T:
    """``parse`` of the file's content; ValueError with the path for an unreadable file, bad JSON or a bad value."""
    with naming(path):
        return parse(parse_json(read_text(path)))


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors in a file's content are ValueErrors that begin with its path, once."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{path}: is nested too deep") from None
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(f"{path}: ") else f"{path}: {said}") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds; ValueError names it."""
    return load_json(path, lambda content: conform(content, dict))


def read_as(path: str | Path, kind: type[T]) -> T:
    """A JSON file as ``kind``, see ``conform``."""
    return load_json(path, lambda content: conform(content, kind))


def conform(content: Any, kind: type[T], name: str = "") -> T:
    """``content`` as ``kind``, a type that ``msgspec.convert`` knows; keys that it does not have are left out.

    ValueError names the key (below ``name``), what stands there, and the rule.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_sentence(content, str(error), name)) from None
    except RecursionError:
        raise ValueError(f"{name or 'it'} is nested too deep") from None


def check_finite(content: Any, name: str = "it") -> None:
    """ValueError where an infinite or undefined number stands anywhere in ``content``, for formats that have them."""
    if isinstance(content, float) and not math.isfinite(content):
        raise ValueError(f"{name} ({content}) must be a finite number")
    parts = content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else ()
    for key, value in parts:
        check_finite(value, str(key))


def shown(value: Any, most: int = 60) -> str:
    """A value as errors show it, cut to ``most`` characters."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"{'-' * (value < 0)}a whole number of {int(math.log10(abs(value))) + 1} digits"
    if isinstance(value, Mapping | list | tuple) and len(value) > 8:
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"has the number {text[:40]}, which is not finite")
    return number


def _not_finite(text: str) -> float:
    raise ValueError(f"has the number {text}, which is not finite")


def _sentence(content: Any, said: str, name: str) -> str:
    """msgspec's message in our words."""
    text, _, path = said.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    where = name + path if path.startswith("[") else ".".join(part for part in (name, path) if part)
    lacking = re.fullmatch(r"Object missing required field `(.*)`", text)
    if lacking:
        return f"{where or 'it'} lacks {lacking[1]}"
    wanted = re.match(r"Expected `([^`]*)`([^,]*)", text.replace(" of length ", " of "))
    if wanted is None:
        return f"{where or 'it'}: {text}"
    kinds = [_RULES.get(kind.strip(), kind.strip()) for kind in wanted[1].split("|")]
    rule = " or ".join(dict.fromkeys(kinds)) + wanted[2].rstrip()
    return f"{where or 'it'} ({shown(_at(content, path))}) must be {rule}"


def _at(content: Any, path: str) -> Any:
    """What stands at msgspec's path, as far as it says: ``[...]`` is some value of an object or list."""
    for key, place in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        try:
            content = content[int(place) if place.isdigit() else key or place]
        except (LookupError, TypeError):
            return content
    return content
