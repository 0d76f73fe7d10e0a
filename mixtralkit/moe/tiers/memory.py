"""Memory of experts, in the host and in the GPU's places, and what is copied from one to the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mixtralkit.checkpoint.mapped import MappedLayers
from mixtralkit.moe.weights import ExpertWeights
from mixtralkit.ops.cpu.memory import ask_for_large_pages

ALIGNED = 64  # bytes that a tensor in a block starts at a multiple of


class Move(NamedTuple):
    """A rectangle of bytes: addresses of its first one, bytes of a row, rows, and bytes from row to row."""

    target: int
    source: int
    width: int
    height: int = 1
    target_pitch: int = 0
    source_pitch: int = 0

    @property
    def nbytes(self) -> int:
        return self.width * self.height


class Clearing(NamedTuple):
    """A rectangle of bytes that become zero: as in ``Move``."""

    target: int
    width: int
    height: int
    target_pitch: int


Empty = Callable[[int, str], Sequence[torch.Tensor]]  # (experts, device): the format's tensors, ``ExpertStore._empty``


class HostExperts:
    """A layer's experts of this rank in host memory, one contiguous block each.

    Attributes:
        tensors: the format's parts of w13, then of w2, [S, …] each: views of the blocks.
    """

    def __init__(self, empty: Empty, experts: int, pinned: bool) -> None:
        """``pinned``: so that a GPU copies from it by itself.

        Raises:
            RuntimeError: the system does not let so much memory be pinned.
        """
        like, starts, size = empty(1, "meta"), [], 0
        for part in like:
            starts.append(size)
            size += -(-part.nbytes // ALIGNED) * ALIGNED
        self._pinned = pinned and experts > 0
        self.blocks = torch.empty(experts, size, dtype=torch.uint8)
        ask_for_large_pages((self.blocks,))  # before they are pinned, when pages are as they will stay
        if self._pinned:
            _pin(self.blocks)
        self.tensors = tuple(
            self.blocks[:, start : start + part.nbytes].view(part.dtype).unflatten(1, part.shape[1:])
            for start, part in zip(starts, like, strict=True)
        )

    def check(self) -> None:
        """Nothing changes it."""

    def __del__(self) -> None:
        if getattr(self, "_pinned", False):
            with contextlib.suppress(Exception):  # the device may be gone before its memory
                torch.cuda.cudart().cudaHostUnregister(self.blocks.data_ptr())


class MappedExperts:
    """As ``HostExperts``, but in the checkpoint's file, of which the system keeps in memory what it has room for."""

    def __init__(self, mapped: MappedLayers, layer: int) -> None:
        self.tensors, self.check = mapped.tensors(layer), mapped.check


def _pin(memory: torch.Tensor) -> None:
    """Pins memory where it is: torch's own pinned memory comes in powers of two, which experts are not."""
    failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if failed:
        raise RuntimeError(
            f"host memory: {memory.nbytes / 1e9:.3g} GB for experts could not be pinned (CUDA error {failed})"
        )


class Geometry:
    """Where experts lie in memory: the bytes of a part of their hidden width, here and there."""

    def __init__(self, weights: ExpertWeights, hidden: int, tensors: Sequence[torch.Tensor]) -> None:
        """``tensors`` [N, …]: the parts of w13, then of w2."""
        self.weights, self.hidden = weights, hidden
        self._first_moves: dict[tuple[Geometry, tuple[int, int] | None], list[tuple[Move, int, int]]] = {}
        self._of = [
            (part.data_ptr(), part.stride(0) * part.element_size(), part.shape[1], part.stride(1) * part.element_size())
            for part in tensors
        ]
        assert all(part[0].is_contiguous() for part in tensors if len(part))

    def moves(self, place: int, other: Geometry, slot: int, first: int = 0) -> list[Move]:
        """What brings columns ``first`` … of the hidden width of ``other``'s expert ``slot`` to ``place`` here.

        ``first`` is a multiple of the format's unit and height. With another than 0 the part of w13 in front is not
        touched, and what scales w2 comes whole.
        """
        return self._moves(place, other, slot, (first, self.hidden) if first else None)

    def rest(self, place: int, other: Geometry, slot: int, first: int) -> list[Move]:
        """What ``moves`` has left out."""
        return self._moves(place, other, slot, (0, first))

    def silence(self, place: int, last: int) -> list[Clearing]:
        """What makes the first ``last`` hidden columns of an expert here zero: all that w1 and w3 have of them."""
        parts = zip(self.weights.parts, self._of, strict=False)  # w13's come first
        return [
            Clearing(start + place * pitch, part.cut_rows((0, last))[1] * row, 2, rows // 2 * row)
            for part, (start, pitch, rows, row) in parts if part.rows is not None
        ]  # fmt: skip

    def _moves(self, place: int, other: Geometry, slot: int, columns: tuple[int, int] | None) -> list[Move]:
        if (other, columns) not in self._first_moves:
            self._first_moves[other, columns] = self._moves_of_first(other, columns)
        return [
            Move(target + place * mine, source + slot * theirs, *rest)
            for (target, source, *rest), mine, theirs in self._first_moves[other, columns]
        ]

    def _moves_of_first(self, other: Geometry, columns: tuple[int, int] | None) -> list[tuple[Move, int, int]]:
        """From slot 0 to place 0, and the bytes from a place and from a slot to the next."""
        found, parts = [], self.weights.parts
        for i, ((target, place_pitch, rows, row), theirs) in enumerate(zip(self._of, other._of, strict=True)):
            (source, slot_pitch), part, move = theirs[:2], parts[i % len(parts)], None
            if columns is not None and i < len(parts) and part.rows is not None:
                start, end = (n * row for n in part.cut_rows(columns))
                half = rows // 2 * row
                move = Move(target + start, source + start, end - start, 2, half, half)
            elif columns is not None and i == len(parts):
                whole = part.cut_columns((0, self._whole))[1]
                start, end = (row * n // whole for n in part.cut_columns(columns))
                end = row if columns[1] == self.hidden else end
                move = Move(target + start, source + start, end - start, rows, row, row)
            elif columns is None or columns[0] > 0:
                move = Move(target, source, rows * row)
            if move is not None:
                found.append((move, place_pitch, slot_pitch))
        return found

    @property
    def _whole(self) -> int:
        return self.weights.whole(self.hidden)


def in_pieces(moves: Sequence[Move], most: int) -> list[Move]:
    """The same bytes in moves of at most so many."""
    found = []
    for move in moves:
        step = max(1, most // move.width)
        for row in range(0, move.height, step):
            target, source = move.target + row * move.target_pitch, move.source + row * move.source_pitch
            if move.width <= most:
                found.append(move._replace(target=target, source=source, height=min(step, move.height - row)))
                continue
            for start in range(0, move.width, most):
                found.append(Move(target + start, source + start, min(most, move.width - start)))
    return found
