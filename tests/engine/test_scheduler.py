"""The scheduler's bookkeeping, played through without a model."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtralkit.engine.requests import Answer, Request
from mixtralkit.engine.scheduler import Planned, Scheduler, Sequence
from tests.engine.parts import make_tokenizer

MAX_SEQ_LEN = 24
SIZES = st.lists(st.tuples(st.integers(1, MAX_SEQ_LEN), st.integers(0, 6), st.booleans()), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@dataclass
class Device:
    """What a device with pages would hold: which token of which text stands where, step by step.

    The next token of a text is a function of the whole text, so a wrong page or position gives a wrong answer.
    """

    scheduler: Scheduler
    tables: list[dict[int, dict[int, int]]] = field(default_factory=list)
    memory: list[dict[tuple[int, int], int]] = field(default_factory=list)
    last: list[list[int]] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    computed: int = 0

    def __post_init__(self):
        owners = len(self.scheduler.owners)
        self.tables = [{} for _ in range(owners)]
        self.memory = [{} for _ in range(owners)]
        self.last, self.slots, self.positions = ([[] for _ in range(owners)] for _ in range(3))

    def run(self, planned: Planned) -> list[list[int]]:
        """The tokens that the step samples, by owner."""
        plan, size = planned.plan, self.scheduler.page_size
        for owner, entries in enumerate(plan.tables):
            for slot, at, pages in entries:
                self.tables[owner].setdefault(slot, {}).update({at + i: page for i, page in enumerate(pages)})
        if plan.rows is None:
            self.positions = [[p + 1 for p in own] for own in self.positions]
            inputs = [list(own) for own in self.last]
        else:
            self.slots = [list(own.slots) for own in plan.rows]
            self.positions = [list(own.positions) for own in plan.rows]
            inputs = [
                [
                    self.last[o][source] if source >= 0 else token
                    for source, token in zip(own.sources, own.tokens, strict=True)
                ]
                for o, own in enumerate(plan.rows)
            ]
        found = []
        for owner, memory in enumerate(self.memory):
            work = list(
                zip(self.slots[owner], self.positions[owner], [[token] for token in inputs[owner]], strict=True)
            )
            sampled = [True] * len(work)
            work += [(c.slot, c.start, c.ids) for c in plan.chunks[owner]]
            sampled += [c.is_sampled for c in plan.chunks[owner]]
            places = [(self.tables[owner][slot][(start + i) // size], (start + i) % size)
                      for slot, start, ids in work for i in range(len(ids))]  # fmt: skip
            assert len(places) == len(set(places)), "two rows write to one place"
            for place, token in zip(places, (token for _, _, ids in work for token in ids), strict=True):
                memory[place] = token
            self.computed += len(places)
            text = [
                [memory[self.tables[owner][slot][p // size], p % size] for p in range(start + len(ids))]
                for slot, start, ids in work
            ]
            found.append([following(own) for own, is_sampled in zip(text, sampled, strict=True) if is_sampled])
        self.last = found
        return found


def following(text: list[int]) -> int:
    return 3 + sum((i + 1) * token for i, token in enumerate(text)) % 50


def alone(prompt: tuple[int, ...], limit: int) -> list[int]:
    text = list(prompt)
    for _ in range(limit):
        text.append(following(text))
    return text[len(prompt) :]


def play(scheduler: Scheduler, sequences: list[Sequence], rng: random.Random, aborts: float = 0.0) -> Device:
    """Runs the sequences, which arrive at random times, a step ahead as the engine does; checks every plan."""
    device, flights, coming = Device(scheduler), deque(), deque(sequences)
    for _ in range(3000):
        if len(flights) == 2:
            take(scheduler, flights)
        while coming and (rng.random() < 0.5 or not scheduler.has_work):
            scheduler.add(coming.popleft())
        alive = [s for s in [*scheduler.running, *scheduler.waiting] if not s.answer.ended]
        if alive and rng.random() < aborts:
            gone = rng.choice(alive)
            gone.answer.finish("aborted")
            scheduler.leave(gone)
        planned = scheduler.plan()
        if planned is not None:
            check_budget(scheduler, planned)
            flights.append((planned, device.run(planned)))
        elif flights:
            take(scheduler, flights)
        elif not coming and not scheduler.has_work:
            break
    assert not scheduler.has_work, "nothing waits for ever"
    return device


def take(scheduler: Scheduler, flights: deque) -> None:
    planned, found = flights.popleft()
    scheduler.step_ended()
    for own, tokens in zip(planned.sampled, found, strict=True):
        for sequence, token in zip(own, tokens, strict=True):
            if not sequence.answer.ended:
                sequence.answer.accept(token, -1.0)
                if sequence.answer.ended:
                    scheduler.leave(sequence)
    for sequence in planned.ending:
        if not sequence.answer.ended:
            sequence.answer.finish("length")
            scheduler.leave(sequence)


def check_budget(scheduler: Scheduler, planned: Planned) -> None:
    for own in planned.plan.chunks:
        assert sum(len(chunk.ids) for chunk in own) <= scheduler.prefill_budget
    for own in planned.slots:
        assert len({slot for slot, _ in own}) == len(own)


def sequences_of(tokenizer, sizes, prompts) -> list[Sequence]:
    made = []
    for i, ((_, length, scored), prompt) in enumerate(zip(sizes, prompts, strict=True)):
        limit = min(length, MAX_SEQ_LEN - len(prompt))
        request = Request(i, prompt, length, prompt_logprobs=scored)
        made.append(Sequence(i, Answer(request, limit, tokenizer), i))
    return made


@given(SIZES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(6, 30), st.booleans(),
       st.integers(0, 10**6))  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_every_answer_is_that_of_a_sequence_alone(tokenizer, sizes, slots, ranks, budget, pages, reuse, seed):
    """With pools so small that sequences are preempted, prompts that begin alike, and any order of arrival."""
    rng = random.Random(seed)
    common = tuple(rng.randrange(3, 53) for _ in range(MAX_SEQ_LEN))
    prompts = []
    for length, _, _ in sizes:
        same = rng.randint(0, length)
        prompts.append(common[:same] + tuple(rng.randrange(3, 53) for _ in range(length - same)))
    scheduler = Scheduler(ranks, slots, pages, 4, budget, max(1, budget // 2), reuse)
    sequences = sequences_of(tokenizer, sizes, prompts)
    device = play(scheduler, sequences, rng)
    for sequence in sequences:
        answer = sequence.answer
        assert answer.tokens == alone(answer.request.prompt, answer.limit)
        wanted = len(answer.request.prompt) if answer.request.prompt_logprobs else 1
        assert sequence.scored == wanted
    for owner in scheduler.owners:
        assert owner.pool.free == pages
        assert sorted(owner.slots) == list(range(slots))
    if not reuse:
        assert scheduler.prefix_hits == 0
    most = sum(len(s.answer.request.prompt) + max(0, s.answer.limit - 1) for s in sequences)
    if not scheduler.preemptions:
        assert device.computed == most - scheduler.prefix_hits


@given(SIZES, st.integers(1, 4), st.integers(6, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_aborts_at_any_time_leave_no_page_behind(tokenizer, sizes, slots, pages, seed):
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(3, 53) for _ in range(length)) for length, _, _ in sizes]
    scheduler = Scheduler(2, slots, pages, 4, 8)
    sequences = sequences_of(tokenizer, sizes, prompts)
    play(scheduler, sequences, rng, aborts=0.2)
    for sequence in sequences:
        own = sequence.answer.tokens
        assert own == alone(sequence.answer.request.prompt, len(own))
    assert all(owner.pool.free == pages for owner in scheduler.owners)


def waiting(tokenizer, prompts, limit=4) -> list[Sequence]:
    return [
        Sequence(i, Answer(Request(i, tuple(prompt), limit), limit, tokenizer), i) for i, prompt in enumerate(prompts)
    ]


def test_requests_spread_over_the_ranks_and_wait_for_slots(tokenizer):
    scheduler = Scheduler(3, 2, 8, 4, 100)
    for sequence in waiting(tokenizer, [(5,)] * 7):
        scheduler.add(sequence)
    first = scheduler.plan()
    assert [(new.owner, new.slot) for new in first.plan.arrivals] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert len(scheduler.waiting) == 1
    gone = scheduler.owners[1].running[0]
    gone.answer.finish("aborted")
    scheduler.leave(gone)
    assert [(new.owner, new.slot) for new in scheduler.plan().plan.arrivals] == [(1, 0)]


def test_pages_are_given_back_behind_the_step_in_flight(tokenizer):
    scheduler = Scheduler(1, 4, 8, 4, 100)
    sequence, other = waiting(tokenizer, [(5,) * 8, (6,) * 8])
    scheduler.add(sequence)
    scheduler.add(other)
    scheduler.plan()
    scheduler.plan()  # takes a third page for each
    sequence.answer.finish("aborted")
    scheduler.leave(sequence)
    assert scheduler.owners[0].pool.free == 8 - 6
    scheduler.step_ended()
    assert scheduler.owners[0].pool.free == 8 - 6  # the second step still writes to them
    scheduler.step_ended()
    assert scheduler.owners[0].pool.free == 8 - 3


def test_the_last_come_is_preempted_and_begins_again_before_others(tokenizer):
    scheduler = Scheduler(1, 3, 5, 4, 100, prefix_reuse=False)
    first, second, third = waiting(tokenizer, [(5,) * 8, (6,) * 7, (7,) * 9])
    for sequence in (first, second, third):
        scheduler.add(sequence)
    assert [new.number for new in scheduler.plan().plan.arrivals] == [0, 1]  # a page for each to grow is kept, not two
    scheduler.plan()
    assert len(first.pages) == 3
    scheduler.plan()
    assert second.slot < 0
    assert list(scheduler.waiting) == [second, third]
    assert scheduler.preemptions == 1


def test_a_beginning_that_is_being_computed_is_waited_for_and_shared(tokenizer):
    scheduler = Scheduler(1, 8, 40, 4, 100)
    for sequence in waiting(tokenizer, [(*range(3, 23), 30 + i) for i in range(4)] + [(9, 9)]):
        scheduler.add(sequence)
    first, second = scheduler.plan(), scheduler.plan()
    assert [len(chunk.ids) for chunk in first.plan.chunks[0]] == [21, 2]
    assert [len(chunk.ids) for chunk in second.plan.chunks[0]] == [1, 1, 1]
    assert scheduler.prefix_hits == 60
    assert [s.answer.cached_tokens for s in second.cached] == [20, 20, 20]


def test_prompts_have_the_whole_budget_while_many_begin(tokenizer):
    """The last prompts of many once had the small budget, though those beside them had waited for the others' too."""
    scheduler = Scheduler(1, 10, 100, 4, 20, 5)
    for sequence in waiting(tokenizer, [(5 + i,) for i in range(8)] + [(7,) * 30], limit=9):
        scheduler.add(sequence)
    plans = [scheduler.plan().plan for _ in range(4)]
    assert [sum(len(chunk.ids) for chunk in plan.chunks[0]) for plan in plans] == [20, 12, 6, 0]
    assert [len(plan.rows[0].slots) for plan in plans] == [0, 8, 8, 9]
    # one begins beside nine, which wait for 5 tokens a step; another has no slot yet and counts for nothing
    for sequence in waiting(tokenizer, [(8,) * 12, (9,) * 12], limit=9):
        sequence.key += 9
        scheduler.add(sequence)
    plans = [scheduler.plan().plan for _ in range(4)]
    assert [sum(len(chunk.ids) for chunk in plan.chunks[0]) for plan in plans] == [5, 5, 2, 0]
    scheduler = Scheduler(1, 10, 100, 4, 20, 5)
    for sequence in waiting(tokenizer, [(5,) * 20, (6,) * 20, (7,) * 30], limit=9):
        scheduler.add(sequence)
    plans = [scheduler.plan().plan for _ in range(5)]
    # decodes come first in the budget
    assert [sum(len(chunk.ids) for chunk in plan.chunks[0]) for plan in plans] == [20, 19, 19, 12, 0]
