"""GPTQ and AWQ: four bits a weight, eight in a word of 32, layers stored with their inputs as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mixtralkit.checkpoint.files import Region
from mixtralkit.checkpoint.foreign.base import Bounds, Linear, Make, Module, check_group, int4_linear, nibbles, piece
from mixtralkit.json_file import shown

_OF_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # column 8 c + i of AWQ is in bits 4 _OF_AWQ[i] of word c
_EIGHTS, _SEVENS, _ONES = -0x77777778, 0x77777777, 0x11111111  # the same nibble eight times, as int32


class Gptq:
    """``qweight`` int32 [K / 8, O], ``qzeros`` [K / g, O / 8], ``scales`` [K / g, O], ``g_idx`` [K].

    The first version of the format has each zero point less 1, ``gptq_v2`` has it as it is. Symmetric files say 8 in
    all of them, as 7 or as 8, whatever version they state, and need none here. One is added to whole words, so that a
    zero point of 0, which borrows from its neighbour in the first version, comes out right.
    """

    title = "GPTQ"
    marks = ("qweight",)
    ignored = ()

    def __init__(self, stated: Mapping[str, Any]) -> None:
        _check_bits("bits", stated.get("bits"))
        self.group = stated.get("group_size", -1)
        form = stated.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format ({shown(form)}) must be gptq or gptq_v2")
        self._less_one, self._symmetric = form == "gptq", bool(stated.get("sym", True))

    def linear(self, module: Module) -> Linear:
        outputs, inputs = module.shape
        qweight = module.take("qweight", [(-(-inputs // 8), outputs)], [torch.int32])
        group = check_group(self.group, inputs, f"{qweight.file}: {module.name}: group_size")
        qzeros = module.take("qzeros", [(inputs // group, -(-outputs // 8))], [torch.int32])
        scales = module.scales("scales", [(inputs // group, outputs)])
        index = module.take("g_idx", [(inputs,)], [torch.int32]) if "g_idx" in module.tensors else None
        _check_bias(module, outputs)

        def bits(rows: Bounds, columns: Bounds) -> torch.Tensor:
            first = columns[0] // 8
            found = nibbles(piece(qweight, (first, -(-columns[1] // 8)), rows).T)
            return found[:, columns[0] - 8 * first : columns[1] - 8 * first]

        zeros = None
        if not (self._symmetric and _says_eight(qzeros)):
            zeros = qzeros, _across(qzeros, None, _ONES if self._less_one else 0)
        return int4_linear(module, qweight, bits, scales, group, zeros, transposed=True, index=index)


class Awq:
    """``qweight`` int32 [K, O / 8], ``qzeros`` [K / g, O / 8], ``scales`` [K / g, O], in the order of ``gemm``.

    Its writer divides the norm in front of the experts by factors and multiplies w1 and w3 by them. The router reads
    the same norm and is multiplied too, so that a file is a model of its own, to be read whole.
    """

    title = "AWQ"
    marks = ("qweight",)
    ignored = ()

    def __init__(self, stated: Mapping[str, Any]) -> None:
        _check_bits("bits", stated.get("bits", stated.get("w_bit")))
        self.group = stated.get("group_size", stated.get("q_group_size", 128))
        version = str(stated.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(f"version ({shown(version)}) must be gemm")
        if stated.get("zero_point", True) is not True:
            raise ValueError(f"zero_point ({shown(stated['zero_point'])}) must be true")

    def linear(self, module: Module) -> Linear:
        outputs, inputs = module.shape
        qweight = module.take("qweight", [(inputs, -(-outputs // 8))], [torch.int32])
        group = check_group(self.group, inputs, f"{qweight.file}: {module.name}: group_size")
        qzeros = module.take("qzeros", [(inputs // group, -(-outputs // 8))], [torch.int32])
        scales = module.scales("scales", [(inputs // group, outputs)])
        _check_bias(module, outputs)
        zeros = qzeros, _across(qzeros, _OF_AWQ)
        return int4_linear(module, qweight, _across(qweight, _OF_AWQ), scales, group, zeros, transposed=True)


def _check_bits(key: str, bits: object) -> None:
    if bits != 4:
        raise ValueError(f"{key} ({shown(bits)}) must be 4")


def _check_bias(module: Module, outputs: int) -> None:
    """Some writers store zeros as the bias that no layer of a Mixtral has."""
    if "bias" in module.tensors:
        bias = module.take("bias", [(outputs,)], [torch.float16, torch.bfloat16, torch.float32])
        if piece(bias, (0, outputs)).any():
            raise module.error("bias", "numbers other than 0", "none, as in a Mixtral")


def _says_eight(qzeros: Region) -> bool:
    words = piece(qzeros, (0, qzeros.rows))
    return bool(words.eq(_EIGHTS).all() or words.eq(_SEVENS).all())


def _across(region: Region, order: Sequence[int] | None, more: int = 0) -> Make:
    """Rows and columns of the layer out of words [columns, rows / 8]."""

    def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
        first = rows[0] // 8
        words = piece(region, columns, (first, -(-rows[1] // 8))) + more
        return nibbles(words, order)[:, rows[0] - 8 * first : rows[1] - 8 * first].T

    return make
