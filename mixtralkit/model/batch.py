"""What one forward step works on: any set of sequences, each at any position, flattened without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from mixtralkit.moe.layer import StepRows

if TYPE_CHECKING:
    from mixtralkit.model.attention import Attend


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

    @property
    def end(self) -> int:
        """How many tokens the sequence has after the step."""
        return self.position + self.stop - self.start


@dataclass(frozen=True)
class ForwardBatch:
    """Tokens of a step: ``(s0 t0)(s0 t1)(s0 t2)(s1 t0)…``. Prefill, mixed steps and decode are only different batches.

    Attributes:
        tokens_T, positions_T, slots_T: int64 token, its position, and its sequence's place in the cache; slot -1 is a
            row that only fills the shape.
        spans: the sequences on the host, as their rows follow one another; empty where only the device knows them,
            and every row is a sequence's one token.
        rows: what the MoE layers know of the rows.
        attend: what the rows attend to, ``attention.CachedAttention`` or ``FreshAttention``.
        wanted_N: int64 rows whose logits are asked for, in that order; None for all rows.
        observed: somebody looks at the layers' reports.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    spans: tuple[Span, ...] = ()
    rows: StepRows = field(default_factory=StepRows)
    attend: Attend | None = None
    wanted_N: torch.Tensor | None = None
    observed: bool = False

    @classmethod
    def build(
        cls,
        pieces: Sequence[tuple[int, int, Sequence[int]]],
        device: torch.device | str,
        sequences: Sequence[int] | None = None,
        rows_per_rank: int | None = None,
    ) -> ForwardBatch:
        """From (slot, position of the first token, token ids) of each sequence; no sequence is an empty step.

        Args:
            sequences: their numbers; None takes the slots.
            rows_per_rank: the most tokens of any rank in this step, where all ranks know that.
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
        return cls(*columns, tuple(spans), StepRows(rows_per_rank))

    @classmethod
    def of_rows(
        cls, tokens_B: torch.Tensor, positions_B: torch.Tensor, slots_B: torch.Tensor, rows_per_rank: int
    ) -> ForwardBatch:
        """A decode step that is on the device alone: one token a sequence, slot -1 in rows that fill the shape."""
        return cls(tokens_B, positions_B, slots_B, rows=StepRows(rows_per_rank, decode=True, valid_T=slots_B))

    def __len__(self) -> int:
        return len(self.tokens_T)

    @property
    def is_decode(self) -> bool:
        """True when every sequence has exactly one token."""
        return all(span.stop - span.start == 1 for span in self.spans)

    @property
    def last_rows_B(self) -> torch.Tensor:
        """Row of each sequence's last token, on the device."""
        return torch.tensor([span.stop - 1 for span in self.spans], dtype=torch.int64).to(self.tokens_T.device)

    def masked(self, valid_T: torch.Tensor) -> ForwardBatch:
        """A decode step of which only the rows with ``valid_T`` of at least 0 are on this rank."""
        slots_T = self.slots_T.masked_fill(valid_T < 0, -1)
        return replace(self, slots_T=slots_T, rows=replace(self.rows, valid_T=slots_T))

    def take(self, rows_N: torch.Tensor) -> ForwardBatch:
        """Some rows of a decode step, as they stand on this rank."""
        tokens_N, positions_N, slots_N = (t[rows_N] for t in (self.tokens_T, self.positions_T, self.slots_T))
        rows = replace(self.rows, valid_T=slots_N)
        return replace(self, tokens_T=tokens_N, positions_T=positions_N, slots_T=slots_N, rows=rows)
