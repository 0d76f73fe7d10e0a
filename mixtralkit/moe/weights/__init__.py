"""Formats of expert weights, a file each: what holds them, their bytes, how they round, what they mean.

``planning`` and ``layout`` ask a format for bytes and shapes, the loader and the writer round by it, the store keeps
its tensors, kernels and the reference read them. torch is imported only where numbers are made: names are options.
"""

from mixtralkit.moe.weights.base import PLAIN, ExpertWeights, PackedWeight, Part
from mixtralkit.moe.weights.fp8 import Fp8
from mixtralkit.moe.weights.int4 import Int4
from mixtralkit.moe.weights.int8 import Int8

__all__ = ["FORMATS", "PLAIN", "ExpertWeights", "Fp8", "Int4", "Int8", "PackedWeight", "Part", "parse_weights"]

_ALL = (
    Int8(), Int4(32), Int4(64), Int4(128), Int4(32, True), Int4(64, True), Int4(128, True),
    Fp8("channel"), Fp8("tensor"), Fp8("block"),
)  # fmt: skip
FORMATS: dict[str, ExpertWeights] = {"int4": Int4(32), "fp8": Fp8("channel")} | {one.name: one for one in _ALL}


def parse_weights(name: str | None) -> ExpertWeights:
    """The format of a name in ``FORMATS``; None is the plain one.

    Raises:
        ValueError: another name.
    """
    if name is None:
        return PLAIN
    if name not in FORMATS:
        raise ValueError(f"quantize ({name!r}) must be one of {', '.join(FORMATS)}")
    return FORMATS[name]
