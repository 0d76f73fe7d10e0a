"""What one forward step works on: any set of sequences, each at any position, flattened without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """One sequence's tokens of a step: rows ``start:stop`` of the flattened tokens.

    ``slot`` is the sequence's place in the KV cache, ``position`` that of its first token of this step, ``sequence``
    a number to know it by when its slot has another one.
    """

    slot: int
    position: int
    start: int
    stop: int
    sequence: int


@dataclass(frozen=True)
class StepBatch:
    """Tokens of a step: ``(s0 t0)(s0 t1)(s0 t2)(s1 t0)…``, all int64 [T], and the spans that cut them."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    spans: tuple[Span, ...]

    @classmethod
    def build(
        cls,
        pieces: Sequence[tuple[int, int, Sequence[int]]],
        device: torch.device | str,
        sequences: Sequence[int] | None = None,
    ) -> StepBatch:
        """From (slot, position of the first token, token ids) of each sequence; no sequence is an empty step.

        ``sequences`` are their numbers; None takes the slots.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        for i, (slot, position, ids) in enumerate(pieces):
            number = slot if sequences is None else sequences[i]
            spans.append(Span(slot, position, len(tokens), len(tokens) + len(ids), number))
            tokens.extend(ids)
            positions.extend(range(position, position + len(ids)))
            slots.extend([slot] * len(ids))
        columns = torch.tensor([tokens, positions, slots], dtype=torch.int64).to(device, non_blocking=True)
        return cls(columns[0], columns[1], columns[2], tuple(spans))

    @property
    def is_decode(self) -> bool:
        """True when every sequence has exactly one token."""
        return all(span.stop - span.start == 1 for span in self.spans)

    @property
    def last_rows_B(self) -> torch.Tensor:
        """Row of each sequence's last token, on the device."""
        return torch.tensor([span.stop - 1 for span in self.spans], dtype=torch.int64).to(self.tokens_T.device)
