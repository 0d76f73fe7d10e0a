"""Which sequences run in a step, and which of their tokens. Plain bookkeeping, the same on every rank."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mixtralkit.engine.requests import Request, Sequence
from mixtralkit.engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Positions ``start`` … ``stop``-1 of a sequence, to be run in one step.

    The rows after the first ``scored`` ones need no logits, but for the last when the next token ``is_sampled``.
    """

    sequence: Sequence
    start: int
    stop: int
    scored: int
    is_sampled: bool

    @property
    def values(self) -> int:
        """How many numbers a rank tells the others about this piece."""
        return self.scored + 2 * self.is_sampled


class Batcher:
    """Queues requests, gives them slots as these come free, and cuts prompts to the step's budget.

    Args:
        slots: sequences that run at a time on each rank that owns sequences.
        ranks: ranks that own sequences: the world size under attention ``dp``, else 1.
        prefill_budget: prompt tokens of a step on each of these ranks.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        tokenizer: Tokenizer,
        slots: int,
        ranks: int,
        prefill_budget: int,
        max_seq_len: int,
    ) -> None:
        self.waiting = deque(requests)
        self.running: list[Sequence] = []
        self._tokenizer, self._budget, self._max_seq_len = tokenizer, prefill_budget, max_seq_len
        self._free = [list(range(slots)) for _ in range(ranks)]

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def only_decodes(self) -> bool:
        """Whether every running sequence's prompt is in the cache, so that each waits for one token."""
        return all(s.cached >= len(s.request.prompt) for s in self.running)

    @property
    def has_free_slot(self) -> bool:
        return any(self._free)

    def admit(self) -> None:
        """Lets waiting requests into free slots, each on the rank that has most of them free."""
        while self.waiting:
            rank = max(range(len(self._free)), key=lambda r: len(self._free[r]))
            if not self._free[rank]:
                return
            request = self.waiting.popleft()
            limit = min(request.max_gen_len, self._max_seq_len - len(request.prompt))
            self.running.append(Sequence(request, rank, heapq.heappop(self._free[rank]), limit, self._tokenizer))

    def release(self, sequence: Sequence) -> None:
        """Frees the slot of a sequence that ended."""
        self.running.remove(sequence)
        heapq.heappush(self._free[sequence.rank], sequence.slot)

    def plan(self) -> list[list[Piece]]:
        """The pieces of the next step by owning rank: every running sequence's next token, and what the budget allows
        of the prompts, in order of arrival."""
        pieces: list[list[Piece]] = [[] for _ in self._free]
        budgets = [self._budget] * len(self._free)
        for sequence in self.running:
            stop = sequence.length
            if sequence.cached < len(sequence.request.prompt):
                stop = min(stop, sequence.cached + budgets[sequence.rank])
                budgets[sequence.rank] -= stop - sequence.cached
            if stop > sequence.cached:
                pieces[sequence.rank].append(_piece(sequence, stop))
        for own in pieces:
            own.sort(key=lambda piece: piece.sequence.slot)  # slots in order attend without a copy
        return pieces


def _piece(sequence: Sequence, stop: int) -> Piece:
    start, prompt = sequence.cached, len(sequence.request.prompt)
    scored = max(0, min(stop, prompt - 1) - start) if sequence.request.prompt_logprobs else 0
    return Piece(sequence, start, stop, scored, is_sampled=stop == sequence.length and sequence.limit > 0)
