"""Formats of expert weights that take fewer bits: what they hold, how they round, what they mean."""

from mixtralkit.moe.weights.int4 import Int4
from mixtralkit.moe.weights.int8 import Int8

__all__ = ["Int4", "Int8", "parse_format"]


def parse_format(text: str) -> Int8 | Int4:
    """``int8``, ``int4`` (groups of 32), ``int4:128``, and ``int4:32:zeros`` with zero points.

    Raises:
        ValueError: another name or group.
    """
    name, *rest = text.split(":")
    if name == "int8" and not rest:
        return Int8()
    if name == "int4" and len(rest) <= 2 and rest[:1] in ([], ["32"], ["128"]) and rest[1:] in ([], ["zeros"]):
        return Int4(int(rest[0]) if rest else 32, zero_points=len(rest) == 2)
    raise ValueError(f"quantize ({text!r}) must be int8, int4, int4:32 or int4:128, the last two maybe with ':zeros'")
