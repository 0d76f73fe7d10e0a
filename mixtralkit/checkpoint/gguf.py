"""llama.cpp's files of Mixtral: names, places and the model's parameters, without reading any weights.

Experts lie in one tensor a projection (``ffn_gate_exps``), in one for gate and up (``ffn_gate_up_exps``, gate first),
or in one an expert (``ffn_gate.0``, which current llama.cpp refuses). Query and key rows are in Mistral's order. A
model may be in several files, each with an index of its own tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mixtralkit.checkpoint.files import ByteFile, Region
from mixtralkit.checkpoint.foreign.base import Bounds, Linear, Made, Module
from mixtralkit.checkpoint.gguf_blocks import BLOCK_TYPES, BlockType
from mixtralkit.config import ModelConfig
from mixtralkit.json_file import shown
from mixtralkit.moe.weights import PLAIN, Int4

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_HEADER_BYTES = 256 << 20  # of keys, among them all words of a vocabulary
_AHEAD_BYTES = 1 << 20
MOST_NUMBERS = 1 << 24  # of an array, and tensors
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class BlockRegion(Region):
    """A tensor of blocks, seen as float32 numbers; ``pitch`` are the bytes of a row's blocks."""

    kind: BlockType | None = None

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.pitch

    def position(self, row: int, column: int) -> int:
        """Byte of the block that a number lies in."""
        return self.offset + row * self.pitch + column // self.kind.weights * self.kind.size

    def read_into(self, out: torch.Tensor, row: int, column: int) -> None:
        """Fills ``out`` from the blocks that it lies in, whole rows of them."""
        count, width = out.shape
        if not count or not width:
            return
        bytes_RB = torch.empty(count, self.pitch, dtype=torch.uint8)
        self.file.read_into(memoryview(bytes_RB.view(-1).numpy()), self.offset + row * self.pitch)
        first, last = column // self.kind.weights, -(-(column + width) // self.kind.weights)
        blocks = bytes_RB[:, first * self.kind.size : last * self.kind.size].reshape(-1, self.kind.size)
        numbers = self.kind.numbers(blocks).view(count, -1)
        out.copy_(numbers[:, column - first * self.kind.weights :][:, :width])


class GgufBlocks:
    """How llama.cpp quantises, as a method of ``foreign``: Q4_0 has the numbers of ours for 32 columns."""

    title = "GGUF"
    marks = ()
    ignored = ()

    def linear(self, module: Module) -> Linear:
        region = module.take("weight", [module.shape], [torch.float32])
        weights = Int4(32)
        if not isinstance(region, BlockRegion):  # quantised is something beside it that does not belong there
            return Linear(PLAIN, (region,), region)
        if region.kind.name != "Q4_0":
            return Linear(PLAIN, (region,), region, f"{region.kind.name} has no exact form here")
        columns = region.columns
        whole = weights.whole(columns)

        def blocks(rows: Bounds) -> torch.Tensor:
            bytes_RB = torch.empty(rows[1] - rows[0], region.pitch, dtype=torch.uint8)
            region.file.read_into(memoryview(bytes_RB.view(-1).numpy()), region.offset + rows[0] * region.pitch)
            return bytes_RB.unflatten(1, (-1, region.kind.size))

        def data(rows: Bounds, cut: Bounds) -> torch.Tensor:
            bytes_RG16 = F.pad(blocks(rows)[..., 2:], (0, 0, 0, (whole - columns) // 32), value=0x88)
            return bytes_RG16.unflatten(1, (-1, 2)).transpose(2, 3).flatten(1)[:, slice(*cut)]  # two blocks in turn

        def scales(rows: Bounds, cut: Bounds) -> torch.Tensor:
            halves = blocks(rows)[..., :2].contiguous().view(torch.float16).squeeze(-1)
            return F.pad(halves, (0, (whole - columns) // 32))[:, slice(*cut)]

        made = ((data, torch.uint8, whole // 2), (scales, torch.float16, whole // 32))
        parts = tuple(
            Made.of(f"{module.name}.{part.name}", (*region.shape[:-1], size), dtype, region, make)
            for part, (make, dtype, size) in zip(weights.parts, made, strict=True)
        )
        return Linear(weights, parts, region)


@dataclass(frozen=True)
class Header:
    """What stands in front of the weights.

    Attributes:
        keys: of the model and its vocabulary.
        tensors: (shape as stored, type, offset from ``start``) by name.
        start: byte of the first weights.
        alignment: of tensors, in bytes.
    """

    keys: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], int, int]]
    start: int
    alignment: int


class _Words:
    """Values one after the other, each within the file."""

    def __init__(self, file: ByteFile) -> None:
        self.file, self.at = file, 0
        self._ahead, self._from = b"", 0

    def take(self, size: int) -> bytes:
        if size > self.file.size - self.at or self.at + size > MOST_HEADER_BYTES:
            raise ValueError(f"{self.file}: truncated or damaged: its header goes on for {size:,} bytes at {self.at:,}")
        if self.at + size > self._from + len(self._ahead):
            self._from = self.at
            self._ahead = self.file.read(self.at, min(max(size, _AHEAD_BYTES), self.file.size - self.at))
        start = self.at - self._from
        self.at += size
        return self._ahead[start : start + size]

    def numbers(self, code: str, count: int = 1) -> tuple:
        return struct.unpack(f"<{count}{code}", self.take(struct.calcsize(f"<{code}") * count))

    def text(self) -> str:
        (size,) = self.numbers("Q")
        return self.take(size).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind != _ARRAY or depth > 2:
            raise ValueError(f"{self.file}: damaged: a value of type {kind}")
        inner, count = *self.numbers("I"), *self.numbers("Q")
        if count > MOST_NUMBERS:
            raise ValueError(f"{self.file}: damaged: an array of {count:,} values")
        if inner in _NUMBERS:
            return self.numbers(_NUMBERS[inner], count)
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_header(file: ByteFile) -> Header:
    """Keys and the index of tensors. ValueError, naming the file, for a damaged one."""
    words = _Words(file)
    if words.take(4) != MAGIC:
        raise ValueError(f"{file}: is not a GGUF file")
    (version,) = words.numbers("I")
    if version not in VERSIONS:
        raise ValueError(f"{file}: GGUF version ({version}) must be {' or '.join(map(str, VERSIONS))}")
    tensors, keys = words.numbers("Q", 2)
    if max(tensors, keys) > MOST_NUMBERS:
        raise ValueError(f"{file}: damaged: it claims {tensors:,} tensors and {keys:,} keys")
    found = {words.text(): words.value(*words.numbers("I")) for _ in range(keys)}
    index: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name, (dimensions,) = words.text(), words.numbers("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{file}: damaged: {shown(name)} has {dimensions} dimensions")
        if name in index:
            raise ValueError(f"{file}: {shown(name)} is there twice")
        shape = words.numbers("Q", dimensions)[::-1]  # theirs begin with the columns
        index[name] = (shape, *words.numbers("I"), *words.numbers("Q"))
    alignment = found.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"{file}: general.alignment ({shown(alignment)}) must be a number of bytes")
    return Header(found, index, -(-words.at // alignment) * alignment, alignment)


def read_gguf_index(file: ByteFile) -> dict[str, Region]:
    """Names and places of the tensors. ValueError, naming file and tensor, for types that are not read."""
    header, index = read_header(file), {}
    for name, (shape, number, offset) in header.tensors.items():
        start, columns = header.start + offset, shape[-1]
        if number in _PLAIN:
            dtype = _PLAIN[number]
            region = Region(file, name, shape, dtype, start, (columns if len(shape) > 1 else 1) * dtype.itemsize)
        elif number in BLOCK_TYPES:
            kind = BLOCK_TYPES[number]
            if columns % kind.weights or len(shape) < 2:
                raise ValueError(
                    f"{file}: {name}: rows of {columns} are no whole blocks of {kind.weights} ({kind.name})"
                )
            pitch = columns // kind.weights * kind.size
            region = BlockRegion(file, name, shape, torch.float32, start, pitch, kind)
        else:
            known = ", ".join(["F32", "F16", "BF16", *(kind.name for kind in BLOCK_TYPES.values())])
            raise ValueError(
                f"{file}: {name} is stored as {_OTHERS.get(number, f'type {number}')}; only {known} are read"
            )
        if region.end > file.size:
            raise ValueError(f"{file}: truncated: {name} ends at byte {region.end}, the file has {file.size}")
        index[name] = region
    _check_places(file, header, list(index.values()))
    return index


def _check_places(file: ByteFile, header: Header, regions: list[Region]) -> None:
    """ValueError for tensors that overlap or are not aligned, and for bytes that belong to none."""
    end, before = header.start, "the header"
    for region in sorted(regions, key=lambda region: region.offset):
        if region.offset < end or (region.offset - header.start) % header.alignment:
            raise ValueError(
                f"{file}: damaged: {region.name} begins at byte {region.offset}, wanted a multiple of "
                f"{header.alignment} bytes behind {before}, which ends at {end}"
            )
        end, before = region.end, region.name
    if file.size > end + -(end - header.start) % header.alignment:
        raise ValueError(f"{file}: padded or damaged: {before} ends at byte {end}, the file has {file.size}")


def model_of(file: ByteFile) -> ModelConfig:
    """The model that the keys of the first file say; ValueError naming file and key."""
    header = read_header(file)
    keys = header.keys
    if keys.get("general.architecture") != "llama" or not keys.get("llama.expert_count"):
        what = shown(keys.get("general.architecture"))
        raise ValueError(f"{file}: is a model of architecture {what} without experts, not a Mixtral")

    def number(key: str, default: Any = None, kind: type = int) -> Any:
        value = keys.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise ValueError(f"{file}: llama.{key} ({shown(value)}) must be {'a number' if kind is float else 'whole'}")
        return float(f"{value:.7g}") if kind is float else value  # they are float32 there

    scaling = keys.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{file}: llama.rope.scaling.type ({shown(scaling)}) is not followed")
    dim, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", dim // max(heads, 1))
    if number("rope.dimension_count", head_dim) != head_dim or number("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{file}: llama.rope.dimension_count and value_length must be the heads' width ({head_dim})")
    shape, *_ = header.tensors.get("token_embd.weight", ((len(keys.get("tokenizer.ggml.tokens", ())),),))
    try:
        return ModelConfig(
            dim=dim, n_layers=number("block_count"), head_dim=head_dim, hidden_dim=number("feed_forward_length"),
            n_heads=heads, n_kv_heads=number("attention.head_count_kv", heads), vocab_size=shape[0],
            norm_eps=number("attention.layer_norm_rms_epsilon", 1e-5, float),
            rope_theta=number("rope.freq_base", 1e4, float), max_seq_len=number("context_length"),
            num_experts=number("expert_count"), num_experts_per_tok=number("expert_used_count"),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from None
