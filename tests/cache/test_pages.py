"""The pool of pages against a slow model that keeps whole texts."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixtralkit.cache.pages import PagePool

SIZE = 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)  # so few that beginnings are alike


class PoolAndModel(RuleBasedStateMachine):
    """Sequences come, tell what their full pages hold, and go; the model remembers all that each page ever held.

    ``texts`` are what a page is known to hold, with all that comes before it, as the model sees it.
    """

    @initialize(pages=st.integers(3, 9), collides=st.booleans())
    def make(self, pages, collides):
        self.pool = PagePool(pages, SIZE, (lambda key: 7) if collides else hash)
        self.collides = collides
        self.sequences: list[tuple[list[int], list[int]]] = []  # tokens, pages
        self.texts: dict[int, tuple[int, ...]] = {}

    @rule(tokens=TOKENS)
    def begin(self, tokens):
        known = self.pool.match(tokens)
        found = [page.page for page in known]
        for place, page in enumerate(found):  # hash and comparison: never a page that holds something else
            assert self.texts[page] == tuple(tokens[: SIZE * (place + 1)])
        assert len(found) * SIZE < len(tokens)
        if not self.collides:
            longest = 0
            while SIZE * (longest + 1) < len(tokens) and tuple(tokens[: SIZE * (longest + 1)]) in self.texts.values():
                longest += 1
            assert len(found) == longest
        need = -(-len(tokens) // SIZE) - len(found)
        if need > self.pool.free - sum(map(self.pool.is_free, found)):
            return
        self.pool.hold(found)
        blank = self.pool.free - self.pool.reusable
        taken = self.pool.take(need)
        assert len(set(taken) | set(found)) == len(taken) + len(found)
        assert sum(page in self.texts for page in taken) == max(0, need - blank)  # what is known goes last
        for page in taken:
            assert all(page not in pages for _, pages in self.sequences)
            self.texts.pop(page, None)
        pages, parent = found + taken, known[-1] if known else None
        for place in range(len(found), len(tokens) // SIZE):
            own = tuple(tokens[SIZE * place : SIZE * (place + 1)])
            parent = self.pool.know(pages[place], own, parent, 0)
            text = tuple(tokens[: SIZE * (place + 1)])
            if self.pool._known_as.get(pages[place]) is parent:
                self.texts[pages[place]] = text
        self.sequences.append((tokens, pages))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data):
        place = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(place)[1])

    @rule()
    def forget(self):
        self.pool.forget()
        self.texts.clear()

    @invariant()
    def held_pages_are_those_of_sequences(self):
        held = {page for _, pages in self.sequences for page in pages}
        assert self.pool.free == self.pool.pages - len(held)
        for page in range(self.pool.pages):
            assert self.pool.is_free(page) == (page not in held)

    def teardown(self):
        if hasattr(self, "pool"):
            for _, pages in self.sequences:
                self.pool.release(pages)
            assert self.pool.free == self.pool.pages


TestPoolAndModel = PoolAndModel.TestCase
TestPoolAndModel.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def known(pool: PagePool, tokens: list[int]) -> list[int]:
    """Takes pages for the tokens, all full, says so, and lets them go."""
    pages, parent = pool.take(len(tokens) // SIZE), None
    for place, page in enumerate(pages):
        parent = pool.know(page, tuple(tokens[SIZE * place : SIZE * (place + 1)]), parent, 0)
    pool.release(pages)
    return pages


def test_at_least_one_token_is_left_to_compute():
    pool = PagePool(4, SIZE)
    known(pool, [1, 2, 3, 4])
    assert [len(pool.match([1, 2, 3, 4, 5][:n])) for n in range(1, 6)] == [0, 0, 1, 1, 2]


def test_the_least_recently_used_is_taken_first_and_a_beginning_after_what_follows_it():
    pool = PagePool(5, SIZE)
    first, second = known(pool, [1, 2, 3, 4]), known(pool, [5, 6, 7, 8])
    held = [page.page for page in pool.match([1, 2, 9])]  # used again
    pool.hold(held)
    pool.release(held)
    assert pool.take(5)[1:] == [first[1], second[1], second[0], first[0]]


def test_equal_names_are_not_equal_pages():
    """By its hash alone the second text would be read from the first one's page."""
    pool = PagePool(4, SIZE, hash_of=lambda key: 0)
    known(pool, [1, 2])
    assert pool.match([3, 4, 5]) == []
    assert len(pool.match([1, 2, 5])) == 1


def test_more_pages_than_are_free_is_an_error():
    with pytest.raises(AssertionError):
        PagePool(2, SIZE).take(3)
