"""GPTQ and AWQ: four bits a weight, eight in a word of 32, or eight bits; layers stored with their inputs as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mixtralkit.checkpoint.files import Region
from mixtralkit.checkpoint.foreign.base import Bounds, Linear, Make, Module, check_group, int4_linear, nibbles, piece
from mixtralkit.json_file import shown

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ: bits 4 i and up of word c are column 8 c + _ORDER[i]
_OF_AWQ = tuple(map(_ORDER.index, range(8)))  # column 8 c + i is in bits 4 _OF_AWQ[i] and up
_LOW = 0x0F0F0F0F  # the even ones of a word's eight numbers
_EIGHTS, _SEVENS, _ONES = -0x77777778, 0x77777777, 0x11111111  # the same nibble eight times, as int32


class Gptq:
    """``qweight`` int32 [K / 8, O], ``qzeros`` [K / g, O / 8], ``scales`` [K / g, O], ``g_idx`` [K].

    Of eight bits four are in a word, and no format here has their groups.

    The first version of the format has each zero point less 1, ``gptq_v2`` has it as it is. Symmetric files say 8 in
    all of them, as 7 or as 8, whatever version they state, and need none here. One is added to whole words, so that a
    zero point of 0, which borrows from its neighbour in the first version, comes out right.
    """

    title = "GPTQ"
    marks = ("qweight",)
    ignored = ()

    def __init__(self, stated: Mapping[str, Any]) -> None:
        self.bits = stated.get("bits")
        if self.bits not in (4, 8):
            raise ValueError(f"bits ({shown(self.bits)}) must be 4 or 8")
        self.group = stated.get("group_size", -1)
        form = stated.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format ({shown(form)}) must be gptq or gptq_v2")
        self._less_one, self._symmetric = form == "gptq", bool(stated.get("sym", True))

    def linear(self, module: Module) -> Linear:
        outputs, inputs = module.shape
        in_word = 32 // self.bits
        qweight = module.take("qweight", [(-(-inputs // in_word), outputs)], [torch.int32])
        group = check_group(self.group, inputs, f"{qweight.file}: {module.name}: group_size")
        qzeros = module.take("qzeros", [(inputs // group, -(-outputs // in_word))], [torch.int32])
        scales = module.scales("scales", [(inputs // group, outputs)])
        index = module.take("g_idx", [(inputs,)], [torch.int32]) if "g_idx" in module.tensors else None
        _check_bias(module, outputs)
        if self.bits == 8:
            return self._in_bytes(module, qweight, qzeros, scales, group, index)

        def pairs(rows: Bounds, columns: Bounds) -> torch.Tensor:
            first = columns[0] // 8
            found = piece(qweight, (first, -(-columns[1] // 8)), rows).T.contiguous().view(torch.uint8)
            return found[:, columns[0] // 2 - 4 * first : columns[1] // 2 - 4 * first]

        zeros = None
        if not (self._symmetric and _says_eight(qzeros)):
            zeros = qzeros, _zeros(qzeros, range(8), _ONES if self._less_one else 0)
        return int4_linear(module, qweight, pairs, scales, group, zeros, transposed=True, index=index)

    def _in_bytes(
        self, module: Module, qweight: Region, qzeros: Region, scales: Region, group: int, index: Region | None
    ) -> Linear:
        groups, more = scales.rows, 0x01010101 if self._less_one else 0
        group_K = torch.arange(module.shape[1]) // group if index is None else piece(index, (0, index.rows)).flatten()
        if group_K.amin() < 0 or group_K.amax() >= groups:
            raise module.error("g_idx", f"groups {group_K.amin()} to {group_K.amax()}", f"0 to {groups - 1}")

        def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
            first, of_K = columns[0] // 4, group_K[slice(*columns)].long()
            q_OK = piece(qweight, (first, -(-columns[1] // 4)), rows).T.contiguous().view(torch.uint8)
            q_OK = q_OK[:, columns[0] - 4 * first : columns[1] - 4 * first].float()
            words = piece(qzeros, (0, groups), (rows[0] // 4, -(-rows[1] // 4))) + more
            zeros_OG = words.view(torch.uint8)[:, rows[0] % 4 :][:, : rows[1] - rows[0]].T.float()
            return (q_OK - zeros_OG[:, of_K]) * piece(scales, (0, groups), rows).T.float()[:, of_K]

        return Linear.plain(module, qweight, make, "groups of 8 bits have no format here", is_across=True)


class Awq:
    """``qweight`` int32 [K, O / 8], ``qzeros`` [K / g, O / 8], ``scales`` [K / g, O], in the order of ``gemm``.

    Its writer divides the norm in front of the experts by factors and multiplies w1 and w3 by them. The router reads
    the same norm and is multiplied too, so that a file is a model of its own, to be read whole.
    """

    title = "AWQ"
    marks = ("qweight",)
    ignored = ()

    def __init__(self, stated: Mapping[str, Any]) -> None:
        bits = stated.get("bits", stated.get("w_bit"))
        if bits != 4:
            raise ValueError(f"bits ({shown(bits)}) must be 4")
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
        zeros = qzeros, _zeros(qzeros, _OF_AWQ)

        def pairs(rows: Bounds, columns: Bounds) -> torch.Tensor:
            first, last = rows[0] // 8, -(-rows[1] // 8)
            words_CK = piece(qweight, columns, (first, last)).T.contiguous()
            one, next_one = words_CK.unflatten(1, (-1, 2)).unbind(2)  # of two inputs
            even = (one & _LOW) | (next_one & _LOW) << 4  # bytes are numbers 0, 2, 4, 6 of both
            odd = (one >> 4 & _LOW) | (next_one & ~_LOW)
            bytes_C8K = torch.empty(len(words_CK), 8, even.shape[1], dtype=torch.uint8)
            for parity, numbers in enumerate((even, odd)):
                for i in range(4):
                    bytes_C8K[:, _ORDER[2 * i + parity]] = numbers.view(torch.uint8).unflatten(1, (-1, 4))[..., i]
            return bytes_C8K.flatten(0, 1)[rows[0] - 8 * first : rows[1] - 8 * first]

        return int4_linear(module, qweight, pairs, scales, group, zeros, transposed=True)


def _check_bias(module: Module, outputs: int) -> None:
    """Some writers store zeros as the bias that no layer of a Mixtral has."""
    if "bias" in module.tensors:
        bias = module.take("bias", [(outputs,)], [torch.float16, torch.bfloat16, torch.float32])
        if piece(bias, (0, outputs)).any():
            raise module.error("bias", "numbers other than 0", "none, as in a Mixtral")


def _says_eight(qzeros: Region) -> bool:
    words = piece(qzeros, (0, qzeros.rows))
    return bool(words.eq(_EIGHTS).all() or words.eq(_SEVENS).all())


def _zeros(region: Region, order: Sequence[int], more: int = 0) -> Make:
    """Rows and groups out of words [groups, rows / 8], whose number i are bits 4 ``order[i]``, ``more`` being added."""

    def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
        first = rows[0] // 8
        words = piece(region, columns, (first, -(-rows[1] // 8))) + more
        found = nibbles(words.view(torch.uint8)).unflatten(1, (-1, 8))[..., list(order)].flatten(1)
        return found[:, rows[0] - 8 * first : rows[1] - 8 * first].T

    return make
