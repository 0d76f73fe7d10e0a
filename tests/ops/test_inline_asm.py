"""What the inline assembly of the kernels gives, instruction by instruction: no machine without a GPU runs it."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from mixtralkit.ops.experts import triton_packed_row, triton_words
from mixtralkit.ops.linear import triton as linear

BYTES_4N = torch.stack([torch.arange(256).roll(shift) for shift in (0, 1, 77, 200)])  # each value in each place
WORDS_N = (BYTES_4N << torch.tensor([[0], [8], [16], [24]])).sum(0)


def _bf16(words_N: torch.Tensor) -> torch.Tensor:
    """The two numbers of each word, [2, N]."""
    return torch.stack([words_N & 0xFFFF, words_N >> 16]).to(torch.uint16).view(torch.bfloat16)


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    low, high = (_bf16(a).double() * _bf16(b).double() + _bf16(c).double()).bfloat16().view(torch.uint16).long()
    return high << 16 | low


def _halves(words_N: torch.Tensor) -> torch.Tensor:
    """The two float16 of each word, [2, N]."""
    return torch.stack([words_N & 0xFFFF, words_N >> 16]).to(torch.uint16).view(torch.float16)


def _fma_f16(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    sum_2N = _halves(a).double() * _halves(b).double() + (0.0 if c is None else _halves(c).double())
    low, high = sum_2N.half().view(torch.uint16).long()
    return high << 16 | low


def _prmt(a: torch.Tensor, b: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    places = [int(which) >> shift & 15 for shift in (0, 4, 8, 12)]
    assert max(places) < 8, "no sign is repeated"
    bytes_8 = [word >> shift & 255 for word in (a, b) for shift in (0, 8, 16, 24)]
    return sum(bytes_8[place] << 8 * i for i, place in enumerate(places))


def _lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, what: torch.Tensor) -> torch.Tensor:
    assert int(what) == 0xEA, "of 0xf0, 0xcc and 0xaa it is (a & b) | c"
    return a & b | c


DOES = {
    "mov.b32": lambda a: a, "mov.u32": lambda a: a, "add.u32": lambda a, b: a + b, "lop3.b32": _lop3,
    "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, count: a >> count, "shl.b32": lambda a, count: a << count & 0xFFFFFFFF,
    "prmt.b32": _prmt, "fma.rn.bf16x2": _fma, "fma.rn.f16x2": _fma_f16, "mul.rn.f16x2": _fma_f16,
    "xor.b32": lambda a, b: a ^ b,
}  # fmt: skip


def run_asm(text: str, outputs: int, *words: torch.Tensor, kind=_bf16) -> torch.Tensor:
    """The numbers of the output registers, two each, [2 · outputs, N]; as PTX's manual describes the instructions."""
    word, registers = words[0], {f"${outputs + i}": given for i, given in enumerate(words)}
    registers["%tid.x"] = torch.tensor(1023)
    for line in text.strip(" {}\n").split(";"):
        name, *operands = re.split(r"[ ,]+", line.strip())
        if not name or name == ".reg":
            continue
        to, *read = operands
        values = [torch.tensor(int(x, 0)) if x[0].isdigit() else registers[x] for x in read]
        registers[to] = DOES[name](*(value.expand_as(word) if name.startswith("fma") else value for value in values))
    return torch.cat([kind(registers[f"${i}"]) for i in range(outputs)])


def asm_of(kernel, which: int) -> str:
    return re.findall(r'inline_asm_elementwise\(\s*"""(.*?)"""', inspect.getsource(kernel.fn), re.S)[which]


@pytest.mark.parametrize(("which", "dtype"), [(0, torch.float8_e4m3fn), (1, torch.int8)])
def test_every_byte_becomes_its_number(which, dtype):
    found_4N = run_asm(asm_of(linear.numbers_of, which), 2, WORDS_N)
    wanted_4N = BYTES_4N.to(torch.uint8).view(dtype).float()
    is_number = ~wanted_4N.isnan()  # no weight is NaN: the loader refuses it
    assert is_number.sum() >= 4 * 254
    assert found_4N.float()[is_number].equal(wanted_4N[is_number])


def test_every_word_of_four_bits_becomes_numbers():
    found_42N = run_asm(asm_of(triton_words.weights_of, 0), 4, WORDS_N).float().unflatten(0, (4, 2))
    words_2N = torch.stack([WORDS_N & 0xFFFF, WORDS_N >> 16])
    for i, found_2N in enumerate(found_42N):
        assert found_2N.equal(((words_2N >> 4 * i & 15).float() - 8) / 128)


@pytest.mark.parametrize(("which", "dtype"), [(1, torch.int8), (2, torch.float8_e4m3fn)])
def test_every_word_of_two_bytes_becomes_numbers(which, dtype):
    found_22N = run_asm(asm_of(triton_words.weights_of, which), 2, WORDS_N).float().unflatten(0, (2, 2))
    wanted_22N = BYTES_4N.to(torch.uint8).view(dtype).float().unflatten(0, (2, 2)).transpose(0, 1)
    is_number = ~wanted_22N.isnan()
    assert found_22N[is_number].equal(wanted_22N[is_number])


@pytest.mark.parametrize(
    ("kernel", "which", "outputs", "pairs"),
    [("_four_bits", 0, 1, 4), ("_four_bits_apart", 0, 2, 4), ("_eight_bits", 0, 1, 2), ("_eight_bits", 1, 1, 2)],
)
def test_words_times_pairs_of_float16(kernel, which, outputs, pairs):
    """Every value in every place, beside a pair of which each number is a power of two, the other pairs being 0."""
    asm = asm_of(getattr(triton_packed_row, kernel), which)
    for pair in range(pairs):
        x_2 = (
            torch.tensor([2.0**13, 2.0**12]) if kernel != "_eight_bits" or which == 0 else torch.tensor([256.0, 128.0])
        )
        low, high = x_2.half().view(torch.uint16).long()
        x = [torch.where(torch.tensor(pair == i), high << 16 | low, 0).expand_as(WORDS_N) for i in range(pairs)]
        found_2N = run_asm(asm, outputs, WORDS_N, *x, kind=_halves).float().unflatten(0, (outputs, 2)).sum(0)
        halves_2N = torch.stack([WORDS_N & 0xFFFF, WORDS_N >> 16])
        if pairs == 4:
            wanted_2N = (halves_2N >> 4 * pair & 15) * 2.0**-24 * (16 if pair % 2 else 1)
        else:
            bytes_2N = halves_2N >> 8 * pair & 255
            of_int8 = (bytes_2N ^ 128) * 2.0**-24
            wanted_2N = of_int8 if which == 0 else bytes_2N.to(torch.uint8).view(torch.float8_e4m3fn).float() / 256
        is_number = ~wanted_2N.isnan()
        assert found_2N[is_number].equal((wanted_2N * x_2[:, None])[is_number])
