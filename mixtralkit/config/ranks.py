"""What ``torchrun`` says of this process in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping


def rank_of(environ: Mapping[str, str] | None = None) -> int:
    """The rank that the environment gives this process, before any group exists; 0 without ``torchrun``."""
    return environ_int(os.environ if environ is None else environ, "RANK", 0)


def environ_int(environ: Mapping[str, str], name: str, default: int) -> int:
    """A variable that is a whole number; ValueError for any other text."""
    text = environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"{name} ({text!r}) must be a whole number")
    return int(text)


def main_address(environ: Mapping[str, str] | None = None) -> str:
    """The machine of rank 0, as the others reach it."""
    return (os.environ if environ is None else environ).get("MASTER_ADDR", "127.0.0.1")
