"""Which sequences run in a step, and which of their tokens: plain bookkeeping of rank 0, which decides for all.

::

    waiting ──admit: a slot, pages for all it has──► prompt in chunks ──► a token a step ──► ended
       ▲                                                                      │
       └───────────── preempted, last come first, when pages are short ◄──────┘

A step's decodes come first; prompts get what the budget leaves. Plans run one step ahead of what is known: a sequence
may have a token in flight (``unread``), which the next step finds on the device.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from mixtralkit.cache.pages import KnownPage, PagePool
from mixtralkit.engine.grammar import Grammar
from mixtralkit.engine.requests import Progress
from mixtralkit.engine.step_plan import Arrival, Chunk, Rows, StepPlan

MANY_BEGIN = 8  # times as many sequences may decode as begin for prompts to have the whole budget


@dataclass(eq=False)
class Sequence:
    """An answer's place: its slot and pages on the rank that owns it, and how far it is computed.

    Attributes:
        key: counts arrivals; the last come is preempted first.
        number: what observers know it by.
        run: what it belongs to, for whoever added it.
        computed: positions whose keys and values are in the cache once all launched steps have ended; seen: the most
            that ever were.
        unread: a token of it was sampled in the newest step, in ``row``, which is in flight.
        prefilling: less is computed than all but its last token.
        scored: prompt tokens whose log-probabilities were asked for in a launched step.
        stops: it gets no more steps (``Scheduler.stop``).
        mask: bits of the tokens that may come next, where a grammar says so. Then no step can run ahead of its tokens.
        until: while less is computed, it goes on by a token without a look at anything else.
        most_pages: that its longest answer takes.
    """

    key: int
    answer: Progress
    number: int
    run: object = None
    owner: int = -1
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    known: list[KnownPage] = field(default_factory=list)
    computed: int = 0
    seen: int = 0
    unread: bool = False
    row: int = -1
    prefilling: bool = True
    scored: int = 1
    stops: bool = False
    grammar: Grammar | None = None
    mask: bytes | None = None
    until: int = 0
    most_pages: int = 0

    @property
    def longest(self) -> int:
        """Most tokens that it may have."""
        return len(self.answer.request.prompt) + self.answer.limit

    @property
    def goes_on(self) -> bool:
        """Whether another token may come behind those that are launched."""
        return not self.stops and len(self.answer.tokens) + self.unread < self.answer.limit


@dataclass(frozen=True)
class Planned:
    """A step as rank 0 knows it: the plan, and whose its values are.

    ``sampled`` are the sequences with a next token and ``scored`` those with scores of prompt tokens, by owner, in the
    order of the values; ``ending`` those at their ends with this step though nothing is sampled; ``slots`` all that
    take part, where they are in this step; ``cached`` those that begin with pages that were known; ``routed`` those
    whose experts are told: the first of their rows, its position, how many rows.
    """

    plan: StepPlan
    sampled: list[list[Sequence]]
    scored: list[list[tuple[Sequence, int]]]
    ending: list[Sequence]
    slots: list[list[tuple[int, Sequence]]]
    cached: list[Sequence]
    routed: list[list[tuple[Sequence, int, int, int]]]

    @property
    def surplus(self) -> list[list[int]]:
        """Slots whose sequences had ended before the step began, by owner: what it makes of them is thrown away."""
        return [[slot for slot, sequence in own if sequence.answer.ended] for own in self.slots]


class _Owner:
    """The slots and pages of a rank that owns sequences."""

    def __init__(self, number: int, slots: int, pool: PagePool) -> None:
        self.number, self.pool = number, pool
        self.slots = list(range(slots))
        self.running: list[Sequence] = []  # in order of arrival


class Scheduler:
    """Queues sequences, gives them slots and pages, and plans steps.

    Args:
        owners: ranks that own sequences: the world size under attention ``dp``, else 1.
        slots, pages, page_size: of each of them.
        prefill_budget: most prompt tokens of a step on each.
        mixed_budget: most of them while few begin beside those that decode, which such a step keeps waiting.
        prefix_reuse: pages whose tokens are known are not computed again.
    """

    def __init__(
        self, owners: int, slots: int, pages: int, page_size: int, prefill_budget: int,
        mixed_budget: int | None = None, prefix_reuse: bool = True,
    ) -> None:  # fmt: skip
        self.page_size, self.prefix_reuse = page_size, prefix_reuse
        self.prefill_budget, self.mixed_budget = prefill_budget, mixed_budget or prefill_budget
        self.waiting: deque[Sequence] = deque()
        self.owners = [_Owner(number, slots, PagePool(pages, page_size)) for number in range(owners)]
        self.step = 0
        self.prefix_queries = self.prefix_hits = self.preemptions = 0
        self._leaving: deque[tuple[int, PagePool, list[int]]] = deque()
        self._ended_steps = 0
        self._last: list[list[Sequence]] | None = None  # rows of the newest step, where it was a decode step
        self._newest: list[list[Sequence]] = [[] for _ in self.owners]
        # of the newest step's rows: which slots are whose, what they want, whether grammars bound some
        self._slots: list[list[tuple[int, Sequence]]] = []
        self._wanted: dict[str, bool | int] = {}
        self._bound = self._many_begin = False

    @property
    def running(self) -> list[Sequence]:
        return [sequence for owner in self.owners for sequence in owner.running]

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or any(owner.running for owner in self.owners)

    @property
    def in_flight(self) -> int:
        """Steps that were planned and have not ended."""
        return self.step - self._ended_steps

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that fits the pool (``longest``)."""
        self.waiting.append(sequence)

    def stop(self, sequence: Sequence) -> None:
        """It gets no more steps."""
        sequence.stops, sequence.until = True, 0

    def leave(self, sequence: Sequence) -> None:
        """Takes out a sequence that has ended, wherever it is; its slot is free at once, its pages behind the step that
        is in flight."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._give_back(sequence)

    def step_ended(self) -> None:
        """The oldest step in flight has ended: nothing reads what was given up while it was the newest."""
        self._ended_steps += 1
        if not self.in_flight:
            self._last = None  # its tokens are known, and given with the next rows
            for own in self._newest:
                for sequence in own:
                    sequence.unread = False
        while self._leaving and self._leaving[0][0] <= self._ended_steps:
            _, pool, pages = self._leaving.popleft()
            pool.release(pages)

    def forget_prefixes(self) -> None:
        """Computes all prompts anew from now on."""
        for owner in self.owners:
            owner.pool.forget()
            for sequence in owner.running:
                sequence.known.clear()

    def forget_rows(self) -> None:
        """The next step finds no rows of another on the device. No step may be in flight."""
        self._last = None

    def plan(self) -> Planned | None:
        """The next step; None where there is nothing to compute before more is known."""
        made = _Making(self.step + 1, len(self.owners))
        for owner in self.owners:
            made.is_short[owner.number] = self._decodes(owner, made)
        most = self._most_tokens(made)
        budgets = [max(1, min(most, self.prefill_budget - len(own))) for own in made.decodes]
        for owner, prefilling in zip(self.owners, made.prefilling, strict=True):
            for sequence in prefilling:
                if sequence.slot >= 0 and not sequence.stops and budgets[owner.number] > 0:
                    budgets[owner.number] -= self._chunk(sequence, made, budgets[owner.number])
        self._admit(made, budgets)
        self._many_begin &= any(made.chunks)
        if not any(made.decodes) and not any(made.chunks):
            assert not any(made.tables)
            return None
        self.step += 1
        return self._planned(made)

    def _most_tokens(self, made: _Making) -> int:
        """Prompt tokens that a rank may run in this step.

        Once many wait for their first token chunks are large, as prompts need for their speed, until all of them have
        it. Requests that come one by one keep those that decode waiting no longer than they must.
        """
        places = sum(len(owner.slots) for owner in self.owners)
        begin = min(len(self.waiting), places) + sum(map(len, made.prefilling))
        if begin * MANY_BEGIN >= sum(map(len, made.decodes)):
            self._many_begin = True
        return self.prefill_budget if self._many_begin else self.mixed_budget

    def _decodes(self, owner: _Owner, made: _Making) -> bool:
        """Every sequence that has its prompt in the cache goes on by one token; whether pages were short."""
        is_short, decodes = False, made.decodes[owner.number]
        for sequence in list(owner.running):
            if sequence.computed < sequence.until:
                sequence.computed += 1
                decodes.append(sequence)
                continue
            if sequence.slot >= 0 and sequence.prefilling:
                made.prefilling[owner.number].append(sequence)
            if sequence.slot < 0 or sequence.prefilling or not sequence.goes_on:
                continue
            if sequence.unread and sequence.mask is not None:
                continue
            if sequence.computed == len(sequence.pages) * self.page_size:
                if not self._make_room(owner, sequence):
                    is_short = True
                    continue
                self._extend(owner, sequence, 1, made)
            decodes.append(sequence)
            sequence.computed += 1
            if sequence.mask is None and not sequence.stops:
                sequence.until = min(len(sequence.pages) * self.page_size, sequence.longest - 1)
        return is_short

    def _make_room(self, owner: _Owner, sequence: Sequence) -> bool:
        """Whether there is a page for one more of the sequence's tokens; preempts where there is none.

        What a preempted sequence leaves is free behind the steps in flight, so that the sequence may miss a step.
        """
        if owner.pool.free:
            return True
        if any(pool is owner.pool for _, pool, _ in self._leaving):
            return False
        while not owner.pool.free and not any(pool is owner.pool for _, pool, _ in self._leaving):
            last = owner.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return owner.pool.free > 0

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's slot and pages; it waits for others, and is computed again from its tokens."""
        self.preemptions += 1
        self._give_back(sequence)
        sequence.seen = max(sequence.seen, sequence.computed)
        sequence.computed, sequence.until, sequence.prefilling = 0, 0, True
        keys = [s.key for s in self.waiting]
        self.waiting.insert(bisect.bisect(keys, sequence.key), sequence)

    def _admit(self, made: _Making, budgets: list[int]) -> None:
        """Lets waiting sequences in, in their order, each on the owner that is left with most free pages; they begin
        in this step.

        One whose beginning is being computed in this very step waits for the next, which finds it known.
        """
        held_back: list[Sequence] = []
        while self.waiting and any(budget > 0 for budget in budgets):
            sequence = self.waiting[0]
            if sequence.unread:  # its last token is not known yet
                break
            found = [self._places_on(owner, sequence, made, budgets) for owner in self.owners]
            if any(known and known[-1].step == made.step for _, known in filter(None, found)):
                held_back.append(self.waiting.popleft())
                continue
            places = [(left, -number) for number, place in enumerate(found) if place for left in (place[0],)]
            if not places:
                break
            owner = self.owners[-max(places)[1]]
            self._begin(owner, self.waiting.popleft(), found[owner.number][1], made)
            budgets[owner.number] -= self._chunk(sequence, made, budgets[owner.number])
        self.waiting.extendleft(reversed(held_back))

    def _places_on(
        self, owner: _Owner, sequence: Sequence, made: _Making, budgets: list[int]
    ) -> tuple[int, list[KnownPage]] | None:
        """Free pages that the owner would be left with, and those of the sequence's that it knows; None where it has no
        room. A page for each sequence that runs and may need one more stays free."""
        if not owner.slots or made.is_short[owner.number] or budgets[owner.number] < 1:
            return None
        answer = sequence.answer
        known: list[KnownPage] = []
        request = answer.request
        lacks = request.prompt_logprobs and sequence.scored < len(request.prompt)  # what only computing tells
        lacks |= request.routed_experts and answer.routed < answer.length - 1
        if self.prefix_reuse and not lacks:
            known = owner.pool.match(answer.ids(0, answer.length))
        taken = sum(owner.pool.is_free(page.page) for page in known)
        left = owner.pool.free - taken - (self._pages_of(answer.length) - len(known))
        growing = sum(len(s.pages) < s.most_pages for s in owner.running)
        return None if left < growing else (left, known)

    def _begin(self, owner: _Owner, sequence: Sequence, known: list[KnownPage], made: _Making) -> None:
        answer = sequence.answer
        owner.pool.hold([page.page for page in known])
        sequence.owner, sequence.slot = owner.number, heapq.heappop(owner.slots)
        sequence.pages, sequence.known = [], list(known)
        sequence.most_pages = self._pages_of(sequence.longest)
        sequence.computed = len(known) * self.page_size
        sequence.scored = max(sequence.scored, 1)
        if not answer.tokens:
            answer.cached_tokens = sequence.computed
            made.cached += [sequence] if known else []
        if self.prefix_reuse:
            self.prefix_queries += answer.length
            self.prefix_hits += sequence.computed
        self._extend(owner, sequence, self._pages_of(answer.length) - len(known), made, [page.page for page in known])
        bisect.insort(owner.running, sequence, key=lambda s: s.key)
        request = answer.request
        made.arrivals.append(
            Arrival(owner.number, sequence.slot, sequence.number, request.sampling, request.drawn_by, answer.asked)
        )

    def _chunk(self, sequence: Sequence, made: _Making, budget: int) -> int:
        """Plans as much of what a sequence has as the budget allows; how many tokens these are."""
        answer, start = sequence.answer, sequence.computed
        stop = min(answer.length, start + budget)
        prompt, owner = answer.request.prompt, sequence.owner
        skipped, targets = 0, ()
        if answer.request.prompt_logprobs and sequence.scored <= stop:
            first = max(start + 1, sequence.scored)  # the first token that a row of the chunk predicts
            targets = prompt[first : stop + 1]
            if targets:
                made.scored[owner].append((sequence, len(targets)))
                skipped, sequence.scored = first - 1 - start, first + len(targets)
        is_sampled = stop == answer.length and sequence.goes_on
        ids = answer.ids(start, stop)
        made.chunks[owner].append(
            Chunk(sequence.slot, start, ids, is_sampled, skipped, targets, max(0, min(stop, sequence.seen) - start))
        )
        sequence.seen = max(sequence.seen, stop)
        made.chunked[owner].append(sequence)
        if is_sampled:
            made.finishing[owner].append(sequence)
        elif stop == answer.length:
            made.ending.append(sequence)
            sequence.stops = True
        sequence.computed, sequence.prefilling = stop, stop < answer.length
        self._know(sequence, stop, made.step)
        return stop - start

    def _extend(
        self, owner: _Owner, sequence: Sequence, count: int, made: _Making, known: list[int] | None = None
    ) -> None:
        pages = [*(known or []), *owner.pool.take(count)]
        made.tables[owner.number].append((sequence.slot, len(sequence.pages), pages))
        sequence.pages += pages

    def _know(self, sequence: Sequence, stop: int, step: int) -> None:
        """Tells the pool which full pages hold the first ``stop`` tokens, by ``step`` at the latest."""
        if not self.prefix_reuse:
            return
        pool, size = self.owners[sequence.owner].pool, self.page_size
        for place in range(len(sequence.known), stop // size):
            tokens = sequence.answer.ids(place * size, (place + 1) * size)
            parent = sequence.known[-1] if sequence.known else None
            sequence.known.append(pool.know(sequence.pages[place], tokens, parent, step))

    def _give_back(self, sequence: Sequence) -> None:
        owner = self.owners[sequence.owner]
        self._know(sequence, min(sequence.computed, sequence.answer.length), 0)
        owner.running.remove(sequence)
        heapq.heappush(owner.slots, sequence.slot)
        if self.in_flight:
            self._leaving.append((self.step, owner.pool, sequence.pages))
        else:
            owner.pool.release(sequence.pages)
        sequence.slot, sequence.owner, sequence.pages, sequence.known = -1, -1, [], []

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _planned(self, made: _Making) -> Planned:
        is_decode = not any(made.chunks)
        if is_decode and self._last == made.decodes:  # the same sequences, each in the same row
            rows, sampled = None, self._last
        else:
            rows = [Rows(*_rows(own)) for own in made.decodes]
            sampled = self._in_rows(made)
        plan = StepPlan(
            self.step, rows, made.chunks, made.arrivals, made.tables,
            masks=[[(s.slot, s.mask) for s in own if s.mask is not None] for own in sampled] if self._bound else [],
            **self._wanted,
        )  # fmt: skip
        routed = [
            list(_routed(*own)) if plan.routed else []
            for own in zip(made.decodes, self._slots, made.chunks, strict=True)
        ]
        self._last = sampled if is_decode else None
        return Planned(plan, sampled, made.scored, made.ending, self._slots, made.cached, routed)

    def _in_rows(self, made: _Making) -> list[list[Sequence]]:
        """Gives the sampled sequences of a step, which it returns, their rows; keeps what holds for these."""
        sampled = [[*own, *more] for own, more in zip(made.decodes, made.finishing, strict=True)]
        for own in self._newest:
            for sequence in own:
                sequence.unread = False
        for own in sampled:
            for row, sequence in enumerate(own):
                sequence.row, sequence.unread = row, True
        self._newest = sampled
        ran = [[*own, *more] for own, more in zip(made.decodes, made.chunked, strict=True)]
        self._slots = [[(sequence.slot, sequence) for sequence in own] for own in ran]
        self._wanted = self._wants(made, sampled, ran)
        self._bound = any(s.mask is not None for own in sampled for s in own)
        return sampled

    @staticmethod
    def _wants(made: _Making, sampled: list[list[Sequence]], ran: list[list[Sequence]]) -> dict[str, bool | int]:
        """What a step has to give besides tokens; the same for the same rows."""
        running = [s.answer.request for own in sampled for s in own]
        told = [*running, *(s.answer.request for own in made.scored for s, _ in own)]
        return {
            "draws": any(r.sampling.temperature > 0 for r in running),
            "tops": max((r.top_logprobs for r in told), default=0),
            "asks": any(r.asks for r in running),
            "routed": any(s.answer.request.routed_experts for own in ran for s in own),
        }


class _Making:
    """A plan that is being made; lists by owner."""

    def __init__(self, step: int, owners: int) -> None:
        self.step = step

        def lists() -> list[list]:
            return [[] for _ in range(owners)]

        self.decodes, self.finishing, self.chunks, self.chunked = (lists() for _ in range(4))
        self.prefilling, self.scored, self.tables = (lists() for _ in range(3))
        self.is_short = [False] * owners
        self.arrivals: list[Arrival] = []
        self.ending: list[Sequence] = []
        self.cached: list[Sequence] = []


def _rows(sequences: list[Sequence]) -> Iterator[list[int]]:
    """Columns of ``Rows``."""
    yield [s.slot for s in sequences]
    yield [s.row if s.unread else -1 for s in sequences]
    yield [0 if s.unread else s.answer.tokens[-1] for s in sequences]
    yield [s.computed - 1 for s in sequences]


def _routed(
    decodes: list[Sequence], slots: list[tuple[int, Sequence]], chunks: list[Chunk]
) -> Iterator[tuple[Sequence, int, int, int]]:
    """As ``Planned.routed``; the rows of a step are those that decode, then the chunks."""
    spans = [(s.computed - 1, 1) for s in decodes] + [(chunk.start, len(chunk.ids)) for chunk in chunks]
    row = 0
    for (_, sequence), (position, count) in zip(slots, spans, strict=True):
        if sequence.answer.request.routed_experts:
            yield sequence, row, position, count
        row += count
