"""What every format of weights says, the plain one, and matrices in any format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SIZES = {"int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Part:
    """A tensor that holds some of a matrix [O, K]: one number for ``rows`` · ``columns`` of its weights.

    Attributes:
        name: behind the matrix's name.
        dtype: by torch's name; None is that of the model.
        rows: None for all of the matrix's.
        columns: None for all of them.
    """

    name: str
    dtype: str | None
    rows: int | None = 1
    columns: int | None = 1

    def itemsize(self, plain: int) -> int:
        return plain if self.dtype is None else _SIZES[self.dtype]

    def cut_rows(self, rows: tuple[int, int]) -> tuple[int, int]:
        """Where rows of the matrix lie in the part."""
        return (0, 1) if self.rows is None else (rows[0] // self.rows, -(-rows[1] // self.rows))

    def cut_columns(self, columns: tuple[int, int]) -> tuple[int, int]:
        """Where columns lie."""
        return (0, 1) if self.columns is None else (columns[0] // self.columns, columns[1] // self.columns)


class ExpertWeights:
    """A format of weights, of experts first of all; made and kept for matrices [O, K], of an output's weights in a row.

    Attributes:
        name: what options and files call it.
        parts: the tensors that hold a matrix.
        unit: of so many columns a matrix is made up to a multiple with zeros; it can be cut between units.
        height: rows that share a number; None for all. A matrix can be rounded and cut in such blocks of rows.
        cpu_type: number by which the compiled CPU kernels know it; None without kernels.
    """

    name: str = "plain"
    parts: tuple[Part, ...] = (Part("weight", None),)
    unit: int = 1
    height: int | None = 1
    cpu_type: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether weights are numbers of the model's own dtype, one tensor a matrix."""
        return self.parts[0].dtype is None

    def whole(self, columns: int) -> int:
        """Columns that are kept of so many."""
        return -(-columns // self.unit) * self.unit

    def shape(self, part: Part, outputs: int, columns: int, stacked: int = 1) -> tuple[int, int]:
        """Of a part of ``stacked`` matrices [outputs, columns], one above the other."""
        return stacked * part.cut_rows((0, outputs))[1], part.cut_columns((0, self.whole(columns)))[1]

    def bounds(
        self, part: Part, rows: tuple[int, int], columns: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the part that belong to a rectangle of the matrix."""
        return part.cut_rows(rows), part.cut_columns((columns[0], self.whole(columns[1])))

    def bytes(self, outputs: int, columns: int, plain: int = 2) -> int:
        """Of a matrix; ``plain`` are those of a number in the model's dtype."""
        return sum(math.prod(self.shape(part, outputs, columns)) * part.itemsize(plain) for part in self.parts)

    def expert_bytes(self, dim: int, hidden: int, plain: int = 2) -> int:
        """Of an expert, or of a part of its hidden width."""
        return 2 * self.bytes(hidden, dim, plain) + self.bytes(dim, hidden, plain)

    def check_cut(self, what: str, size: int, bounds: tuple[int, int], option: str, use: str) -> None:
        """ValueError where a width ``size`` cannot be cut at ``bounds``, as columns, and as rows of another matrix."""
        step = max(self.unit, self.height or 1)
        if any(bound % step for bound in bounds if bound != size):
            raise ValueError(
                f"{what} ({size}) must be cut into multiples of {step} with {option} '{self.name}', not at "
                f"{bounds[0]} and {bounds[1]}; use {use} or another number of ranks"
            )

    def parameters(self, matrix: str) -> list[tuple[str, Part]]:
        """Names of a matrix's parameters: itself in the plain format."""
        return [(matrix if self.is_plain else f"{matrix}_{part.name}", part) for part in self.parts]

    def quantize(self, w_OK: torch.Tensor) -> PackedWeight:
        """Matrices [..., O, K], each weight at the nearest step. O counts whole blocks of ``height``, or to the end."""
        raise NotImplementedError(self.name)

    def dequantize(self, packed: PackedWeight) -> torch.Tensor:
        """The reference: float32 [..., O, K]."""
        raise NotImplementedError(self.name)


PLAIN = ExpertWeights()


@dataclass(frozen=True)
class PackedWeight:
    """Matrices [..., O, K] in some format.

    Attributes:
        columns: K.
        tensors: the format's parts, [..., rows of the part, columns of the part].
        stacked: of so many matrices one above the other, O / ``stacked`` rows each.
    """

    weights: ExpertWeights
    columns: int
    tensors: tuple[torch.Tensor, ...]
    stacked: int = 1

    @property
    def shape(self) -> torch.Size:
        import torch

        return torch.Size((*self.tensors[0].shape[:-1], self.columns))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, place: Any) -> PackedWeight:
        """Some of several matrices."""
        return PackedWeight(self.weights, self.columns, tuple(part[place] for part in self.tensors), self.stacked)

    def unstacked(self) -> tuple[PackedWeight, ...]:
        """The matrices of one [O, K] that lie one above the other."""
        parts = zip(*(tensor.chunk(self.stacked) for tensor in self.tensors), strict=True)
        return tuple(PackedWeight(self.weights, self.columns, part) for part in parts)

    def take(self, first: int, last: int) -> PackedWeight:
        """Rows of an unstacked matrix [O, K], in whole blocks."""
        cuts = [part.cut_rows((first, last)) for part in self.weights.parts]
        tensors = tuple(tensor[a:b] for tensor, (a, b) in zip(self.tensors, cuts, strict=True))
        return PackedWeight(self.weights, self.columns, tensors)

    def float(self) -> torch.Tensor:
        """The weights in float32, [..., O, K]."""
        if self.stacked == 1:
            return self.weights.dequantize(self)
        parts = tuple(tensor.unflatten(-2, (self.stacked, -1)) for tensor in self.tensors)
        return self.weights.dequantize(PackedWeight(self.weights, self.columns, parts)).flatten(-3, -2)
