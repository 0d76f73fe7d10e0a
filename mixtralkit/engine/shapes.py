"""Numbers of rows that steps are made up to, so that few graphs serve all, and what a step with chunks reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.engine.step_plan import Chunk, Rows

MOST_IN_GRAPH = 1536  # prompt tokens of a graph; from about there the device takes longer than the host's launches
PROMPT_TOKENS = (64, 256, 512, 768, 1024, MOST_IN_GRAPH)  # that steps with chunks are made for
FEW_BESIDE = 16  # rows that decode beside them; else there is room for all, which costs little where they are missing


def bucket_sizes(most: int) -> list[int]:
    """Numbers of rows that steps are made for, the last one ``most``: 1, 2, … 8, 12, 16, 24, 32, 48, 64, 96, 128, ….

    So few that capturing all takes seconds, and so many that most steps have few rows without a sequence. Up to eight
    rows there are none, for there every row has experts read that no other row needs.
    """
    sizes, power = [*range(1, 9), 12], 16
    while sizes[-1] < most:
        sizes += [power, power + power // 2]
        power *= 2
    return [size for size in sizes if size < most] + [most]


@dataclass(frozen=True)
class Shape:
    """A step with chunks: rows that decode, then ``tokens`` of ``spans`` prompts, and rows that are sampled."""

    rows: int
    tokens: int
    spans: int
    sampled: int


class Prompts:
    """What a step with chunks reads: ids, positions and slots of its rows, its prompts, the rows that are sampled.

    All as at first is a step without a sequence. One copy fills it.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, length = shape, shape.rows + shape.tokens
        self.packed = torch.zeros(3 * length + 4 * shape.spans + shape.sampled, dtype=torch.int64, device=device)
        rows, self.spans_S4, self.rows_N = self.packed.split([3 * length, 4 * shape.spans, shape.sampled])
        self.tokens_T, self.positions_T, self.slots_T = rows.view(3, length).unbind()
        self.spans_S4 = self.spans_S4.view(-1, 4)
        self.slots_T.fill_(-1)

    def columns(self, mine: Rows, chunks: Sequence[Chunk]) -> np.ndarray:
        """int64, what goes into ``packed`` for these rows and chunks."""
        shape = self.shape
        packed = np.zeros(len(self.packed), np.int64)
        length, spans = shape.rows + shape.tokens, 4 * shape.spans
        rows_3T = packed[: 3 * length].reshape(3, -1)
        rows_3T[2] = -1
        fill_rows(rows_3T[:, : len(mine.slots)], mine, ())
        fill_rows(rows_3T[:, shape.rows :], Rows(), chunks)
        told, sampled, start = [], list(range(len(mine.slots))), 0
        for chunk in chunks:
            told += [chunk.slot, chunk.start, len(chunk.ids), start]
            start += len(chunk.ids)
            sampled += [shape.rows + start - 1] if chunk.is_sampled else []
        packed[3 * length : 3 * length + len(told)] = told
        packed[3 * length + spans : 3 * length + spans + len(sampled)] = sampled
        return packed


def fill_rows(rows_3T: np.ndarray, mine: Rows, chunks: Sequence[Chunk]) -> None:
    """Writes the tokens, positions and slots of the rows that decode, and of the chunks behind them."""
    end = len(mine.slots)
    rows_3T[:, :end] = mine.tokens, mine.positions, mine.slots
    for chunk in chunks:
        start, end = end, end + len(chunk.ids)
        rows_3T[0, start:end] = chunk.ids
        rows_3T[1, start:end] = np.arange(chunk.start, chunk.start + len(chunk.ids))
        rows_3T[2, start:end] = chunk.slot


def sampled_of(mine: Rows, chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    """Slot and last position of the sequences that get a token, in the order of the step's answers."""
    ends = [(chunk.slot, chunk.start + len(chunk.ids) - 1) for chunk in chunks if chunk.is_sampled]
    return [*zip(mine.slots, mine.positions, strict=True), *ends]


def shape_of(rows: int, tokens: int, slots: int) -> Shape:
    """The one for so many rows that decode, of which there may be ``slots``, and at most ``MOST_IN_GRAPH`` tokens."""
    tokens = next(size for size in PROMPT_TOKENS if size >= tokens)
    rows = 0 if not rows else min(FEW_BESIDE, slots) if rows <= FEW_BESIDE else slots
    spans = max(4, tokens // 64)
    return Shape(rows, tokens, spans, min(rows + spans, slots))


def all_shapes(slots: int) -> list[Shape]:
    """Every one that ``shape_of`` gives, the largest first."""
    beside = sorted({0, min(FEW_BESIDE, slots), slots}, reverse=True)
    return [shape_of(rows, tokens, slots) for tokens in reversed(PROMPT_TOKENS) for rows in beside]
