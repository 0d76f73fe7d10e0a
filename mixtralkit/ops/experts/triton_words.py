"""Packed weights as kernels multiply them: words of 16 bits that become numbers in registers.

**Order of columns.** A word holds four weights of four bits or two of eight, and is as wide as the numbers that they
become, so what a thread reads is what it multiplies. Of sixteen words a product takes the first weights, then the
second ones and so on. Sixteen words of ``Int4`` are 64 columns packed so that this is their order. Of eight bits they
are 32 columns: the even ones come first, and rows that they are multiplied with are arranged so too (``column_of``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mixtralkit.moe.weights import Int4, PackedWeight
from mixtralkit.ops.linear.triton import is_compiled, numbers_of

INT4, INT8, FP8 = 0, 1, 2


@dataclass(frozen=True)
class Operand:
    """Packed matrices as the kernels take them.

    Attributes:
        data: words of 16 bits.
        kind: of a word's weights: ``INT4``, ``INT8`` or ``FP8``.
        group: columns of a scale; 0 where an output's are one.
        height: outputs of a scale; 0 where a matrix has one.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    columns: int
    kind: int
    group: int
    height: int

    @classmethod
    def of(cls, packed: PackedWeight) -> Operand:
        data, scales, *zeros = packed.tensors
        part = packed.weights.parts[1]
        kind = INT4 if isinstance(packed.weights, Int4) else INT8 if data.dtype == torch.int8 else FP8
        group = part.columns or 0
        group = 0 if group == 1 or group >= packed.columns else group
        words, zero = data.view(torch.int16), zeros[0] if zeros else None
        return cls(words, scales, zero, packed.columns, kind, group, part.rows or 0)

    @property
    def word(self) -> int:
        """Weights of a word."""
        return 4 if self.kind == INT4 else 2

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.data, self.scales, self.zeros

    @property
    def turned(self) -> bool:
        """Whether rows are multiplied in an order that is not their columns'."""
        return self.kind != INT4

    def constants(self, columns: int) -> dict[str, int]:
        """``columns`` of a tile, at most those of four groups."""
        block = max(min(columns, 4 * self.group or columns), self.group, 64)
        while self.columns % block:
            block //= 2
        return {**self.numbers, "BLOCK_K": block}

    @property
    def numbers(self) -> dict[str, int]:
        """What says how words become numbers."""
        asm = self.data.is_cuda or is_compiled()
        return {"KIND": self.kind, "GROUP": self.group, "HEIGHT": self.height, "ASM": asm}


@triton.jit
def column_of(place):
    """The column of eight bits that stands at a place: of 32 the even ones come first."""
    return place // 32 * 32 + place % 16 * 2 + place % 32 // 16


@triton.jit
def place_of(column, TURNED: tl.constexpr):
    """Where a column stands."""
    return column // 32 * 32 + column % 2 * 16 + column % 32 // 2 if TURNED else column


@triton.jit
def weights_of(words_OW, KIND: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four weights of every word less 8, over 128, or its two, in the rows' type, exact in any; a tuple.

    In bfloat16, two weights of a register's two words at a time. Of four bits: n below 256 in the last eight bits is
    n · 2^-133, so that a weight in any half of that byte is one product away, and only every other word is shifted;
    no power of two in bfloat16 makes more of it than n / 64. Of int8: a number below 128 is the last bits of 128's
    mantissa, less 128 or 256 by its sign; 128 twice, 0x43004300, is made of a register that ptxas knows nothing of,
    else it makes it anew for every word. The bits of e4m3 in the place of bfloat16's are 2^-120 of the number.
    """
    if KIND == 0:
        if ASM and DTYPE.is_bf16():
            a, b, c, d = tl.inline_asm_elementwise(
                """{
                .reg .b32 s, low, high, less;
                mov.b32 low, 0x7e807e80;
                mov.b32 high, 0x7c807c80;
                mov.b32 less, 0xbd80bd80;
                and.b32 s, $4, 0x000f000f;
                fma.rn.bf16x2 $0, s, low, less;
                and.b32 s, $4, 0x00f000f0;
                fma.rn.bf16x2 $1, s, high, less;
                shr.u32 $3, $4, 8;
                and.b32 s, $3, 0x000f000f;
                fma.rn.bf16x2 $2, s, low, less;
                and.b32 s, $3, 0x00f000f0;
                fma.rn.bf16x2 $3, s, high, less;
                }""",
                "=&r,=&r,=&r,=&r,r", [words_OW], is_pure=True, pack=2,
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            )  # fmt: skip
        else:
            w_OW = words_OW.to(tl.int32)
            a, b = (((w_OW & 15) - 8) / 128).to(DTYPE), (((w_OW >> 4 & 15) - 8) / 128).to(DTYPE)
            c, d = (((w_OW >> 8 & 15) - 8) / 128).to(DTYPE), (((w_OW >> 12 & 15) - 8) / 128).to(DTYPE)
        return a, b, c, d
    elif KIND == 1:
        if ASM and DTYPE.is_bf16():
            a, b = tl.inline_asm_elementwise(
                """{
                .reg .b32 s, l, less, m;
                mov.u32 m, %tid.x;
                shr.u32 m, m, 31;
                add.u32 m, m, 0x43004300;
                mov.b32 less, 0xbf80bf80;
                lop3.b32 l, $2, 0x007f007f, m, 0xea;
                lop3.b32 s, $2, 0x00800080, m, 0xea;
                fma.rn.bf16x2 $0, s, less, l;
                shr.u32 s, $2, 8;
                lop3.b32 l, s, 0x007f007f, m, 0xea;
                lop3.b32 s, s, 0x00800080, m, 0xea;
                fma.rn.bf16x2 $1, s, less, l;
                }""",
                "=&r,=&r,r", [words_OW], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            w_OW = words_OW.to(tl.int32)
            a, b = (w_OW << 24 >> 24).to(DTYPE), (w_OW >> 8).to(DTYPE)
        return a, b
    else:
        if ASM and DTYPE.is_bf16():
            a, b = tl.inline_asm_elementwise(
                """{
                .reg .b32 s, l, up, none;
                mov.b32 up, 0x7b807b80;
                mov.b32 none, 0x80008000;
                shl.b32 s, $2, 8;
                and.b32 s, s, 0x80008000;
                shl.b32 l, $2, 4;
                and.b32 l, l, 0x07f007f0;
                or.b32 l, l, s;
                fma.rn.bf16x2 $0, l, up, none;
                and.b32 s, $2, 0x80008000;
                shr.u32 l, $2, 4;
                and.b32 l, l, 0x07f007f0;
                or.b32 l, l, s;
                fma.rn.bf16x2 $1, l, up, none;
                }""",
                "=&r,=&r,r", [words_OW], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            w_OW = words_OW.to(tl.int32)
            a = numbers_of((w_OW & 255).to(tl.uint8), DTYPE, False)
            b = numbers_of((w_OW >> 8 & 255).to(tl.uint8), DTYPE, False)
        return a, b


@triton.jit
def in_order(a_OW, b_OW):
    """The first weights of sixteen words, then the second ones: [O, 2 · W]."""
    UNITS: tl.constexpr = a_OW.shape[1] // 16
    w_OUW2 = tl.reshape(tl.join(a_OW, b_OW), (a_OW.shape[0], UNITS, 16, 2))
    return tl.reshape(tl.permute(w_OUW2, (0, 1, 3, 2)), (a_OW.shape[0], UNITS * 32))


@triton.jit
def in_order4(a_OW, b_OW, c_OW, d_OW):
    """The first weights of sixteen words, then the second, third and fourth ones: [O, 4 · W], as columns stand."""
    UNITS: tl.constexpr = a_OW.shape[1] // 16
    w_OW22 = tl.join(tl.join(a_OW, c_OW), tl.join(b_OW, d_OW))
    w_OU22W = tl.permute(tl.reshape(w_OW22, (a_OW.shape[0], UNITS, 16, 2, 2)), (0, 1, 3, 4, 2))
    return tl.reshape(w_OU22W, (a_OW.shape[0], UNITS * 64))


@triton.jit
def packed_dot(
    data_O, scale_O, zero_O, x_R, has_R, first, last, columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    ASM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """float32 [O, R] of rows at ``x_R`` and packed weights at ``data_O``, over columns ``first`` … ``last`` - 1.

    ``scale_O`` and ``zero_O`` are of each output's first group; ``zero_O`` None for none. A tile has up to four groups.
    ``WHOLE``: see ``_add_parts``.
    """
    WORD: tl.constexpr = 4 if KIND == 0 else 2
    GROUPS: tl.constexpr = BLOCK_K // GROUP if GROUP else 1
    sum_OR = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
    group_1G = tl.arange(0, GROUPS)[None, :]
    if GROUP:  # scales are asked for a step before they are multiplied: nothing else brings them early
        next_OG = tl.load(scale_O[:, None] + first // GROUP + group_1G)
        if zero_O is not None:
            next_zero_OG = tl.load(zero_O[:, None] + first // GROUP + group_1G)
    for k in range(first, last, BLOCK_K):
        words_O = data_O + tl.multiple_of(k // WORD, 16)
        if GROUP:
            at = tl.minimum(k + BLOCK_K, last - BLOCK_K) // GROUP
            now_OG, zero_OG = next_OG.to(tl.float32), None
            next_OG = tl.load(scale_O[:, None] + at + group_1G)
            if zero_O is not None:
                zero_OG = next_zero_OG.to(tl.float32)
                next_zero_OG = tl.load(zero_O[:, None] + at + group_1G)
            sum_OR = _add_groups(sum_OR, words_O, now_OG, zero_OG, x_R + k, has_R, KIND, GROUPS, BLOCK_K, ASM, WHOLE)
        else:
            parts = weights_of(_words(words_O, BLOCK_K // WORD), KIND, x_R.dtype.element_ty, ASM)
            sum_OR = _add_parts(sum_OR, parts, None, x_R + k, has_R, WHOLE)
    if GROUP == 0:
        sum_OR *= tl.load(scale_O).to(tl.float32)[:, None]
    return sum_OR * 128 if KIND == 0 else sum_OR


@triton.jit
def _halves(x_OG):
    x_OHG = tl.reshape(x_OG, (x_OG.shape[0], 2, x_OG.shape[1] // 2))
    return tl.split(tl.permute(x_OHG, (0, 2, 1)))


@triton.jit
def _words(data_O, WORDS: tl.constexpr):
    return tl.load(data_O[:, None] + tl.arange(0, WORDS)[None, :], eviction_policy="evict_first")


@triton.jit
def _add_groups(
    sum_OR, data_O, scale_OG, zero_OG, x_R, has_R,
    KIND: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``sum_OR`` and what some groups of columns at ``x_R`` add to it, each times its scale."""
    WORD: tl.constexpr = 4 if KIND == 0 else 2
    if GROUPS == 1:
        parts = weights_of(_words(data_O, COLUMNS // WORD), KIND, x_R.dtype.element_ty, ASM)
        return _add_group(sum_OR, parts, scale_OG, zero_OG, x_R, has_R, WHOLE)
    elif COLUMNS == 64 and KIND == 0:  # two groups of 32, half of each word
        a_OW, b_OW, c_OW, d_OW = weights_of(_words(data_O, 16), KIND, x_R.dtype.element_ty, ASM)
        scales, zeros = _halves(scale_OG), (None, None) if zero_OG is None else _halves(zero_OG)
        sum_OR = _add_group(sum_OR, (a_OW, b_OW), scales[0], zeros[0], x_R, has_R, WHOLE)
        return _add_group(sum_OR, (c_OW, d_OW), scales[1], zeros[1], x_R + 32, has_R, WHOLE)
    else:
        scales, zeros = _halves(scale_OG), (None, None) if zero_OG is None else _halves(zero_OG)
        HALF: tl.constexpr = COLUMNS // 2
        for i in tl.static_range(2):
            at_O, at_R = data_O + i * (HALF // WORD), x_R + i * HALF
            sum_OR = _add_groups(sum_OR, at_O, scales[i], zeros[i], at_R, has_R, KIND, GROUPS // 2, HALF, ASM, WHOLE)
        return sum_OR


@triton.jit
def _add_group(sum_OR, parts, scale_O1, zero_O1, x_R, has_R, WHOLE: tl.constexpr):
    less_O1 = None if zero_O1 is None else (zero_O1 - 8) / 128
    add_OR = _add_parts(tl.zeros_like(sum_OR), parts, less_O1, x_R, has_R, WHOLE)
    return sum_OR + add_OR * tl.reshape(scale_O1, (sum_OR.shape[0],))[:, None]


@triton.jit
def _add_parts(sum_OR, parts, less_O1, x_R, has_R, WHOLE: tl.constexpr):
    """``sum_OR`` and the product of words' parts, as one or part by part.

    The latter loads words in the order in which mma.sync takes them, and rows so too; a warp group waits for every
    product that it begins.
    """
    PARTS: tl.constexpr = len(parts)
    WORDS: tl.constexpr = parts[0].shape[1]
    if WHOLE:
        w_OK = in_order4(*parts) if PARTS == 4 else in_order(*parts)
        return _add_part(sum_OR, w_OK, less_O1, x_R, tl.arange(0, WORDS * PARTS), has_R)
    else:
        word_W = tl.arange(0, WORDS)
        for i in tl.static_range(PARTS):
            column_W = word_W // 16 * (16 * PARTS) + i * 16 + word_W % 16
            sum_OR = _add_part(sum_OR, parts[i], less_O1, x_R, column_W, has_R)
        return sum_OR


@triton.jit
def _add_part(sum_OR, w_OK, less_O1, x_R, column_K, has_R):
    x_KR = tl.load(x_R[None, :] + column_K[:, None], has_R[None, :], 0.0)
    if less_O1 is not None:
        w_OK -= tl.reshape(less_O1, (w_OK.shape[0],)).to(w_OK.dtype)[:, None]
    return tl.dot(w_OK, x_KR, sum_OR, input_precision="ieee")


@triton.jit
def matrices_at(
    data, scales, zeros, matrix, row_O, outer, columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Where rows of a matrix begin: its weights, scales and zero points. ``matrix`` [O] counts whole matrices."""
    groups = columns // GROUP if GROUP else 1
    if HEIGHT:
        scale_O = (matrix * tl.cdiv(outer, HEIGHT) + row_O // HEIGHT) * groups
    else:
        scale_O = matrix + row_O * 0
    words = tl.multiple_of(columns // (4 if KIND == 0 else 2), 16)  # or they would be copied in pieces of 8 bytes
    data_O = data + (matrix * outer + row_O) * words
    return data_O, scales + scale_O, scale_O if zeros is None else zeros + scale_O
