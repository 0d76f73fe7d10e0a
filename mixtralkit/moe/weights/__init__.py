"""Formats of weights, a file each: what holds a matrix, its bytes, how it is rounded, what it means.

``planning`` and ``layout`` ask a format for bytes and shapes, the loader and the writer round by it, the store keeps
its tensors, kernels and the reference read them. torch is imported only where numbers are made: names are options.
"""

from mixtralkit.moe.weights.base import PLAIN, ExpertWeights, PackedWeight, Part
from mixtralkit.moe.weights.fp8 import Fp8
from mixtralkit.moe.weights.int4 import Int4
from mixtralkit.moe.weights.int8 import Int8

__all__ = [
    "ATTENTION_FORMATS", "FORMATS", "PLAIN", "ExpertWeights", "Fp8", "Int4", "Int8", "PackedWeight", "Part",
    "parse_weights",
]  # fmt: skip

_ALL = (
    Int8(), Int4(32), Int4(64), Int4(128), Int4(32, True), Int4(64, True), Int4(128, True),
    Fp8("channel"), Fp8("tensor"), Fp8("block"),
)  # fmt: skip
FORMATS: dict[str, ExpertWeights] = {"int4": Int4(32), "fp8": Fp8("channel")} | {one.name: one for one in _ALL}
ATTENTION_FORMATS = {name: FORMATS[name] for name in ("int8", "fp8", "fp8:channel")}  # a scale for each output


def parse_weights(name: str | None, option: str = "quantize") -> ExpertWeights:
    """The format of a name in ``FORMATS``, or ``ATTENTION_FORMATS`` for ``quantize_attention``; None is the plain one.

    Raises:
        ValueError: another name.
    """
    if name is None:
        return PLAIN
    formats = FORMATS if option == "quantize" else ATTENTION_FORMATS
    if name not in formats:
        raise ValueError(f"{option} ({name!r}) must be one of {', '.join(formats)}")
    return formats[name]
