"""The pages of a rank's KV cache, on the host: whose they are, which are free, and which hold tokens that are known.

::

    taken by sequences ──release──► free, not known   ──take──► the next sequence's
                         └────────► free, but known   ──match─► a sequence that begins with the same tokens
                                    (the least recently used is taken first when the others are gone)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class KnownPage:
    """A full page whose tokens are known, and with them all that come before: those of ``parent``, None for none.

    ``step`` is the number of the step that computes it; steps that are launched later may read it.
    """

    page: int
    tokens: tuple[int, ...]
    parent: KnownPage | None
    key: Hashable
    step: int


class PagePool:
    """Pages 0 … ``pages``-1 of ``page_size`` positions, counted by who holds them."""

    def __init__(self, pages: int, page_size: int, hash_of: Callable[[Hashable], Hashable] = hash) -> None:
        """``hash_of`` a pair (key of the parent, tokens) names a known page; two pages may have one name."""
        self.pages, self.page_size, self._hash_of = pages, page_size, hash_of
        self._holders = [0] * pages
        self._blank = list(range(pages - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()  # known and free, least recently used first
        self._known: dict[Hashable, KnownPage] = {}
        self._known_as: dict[int, KnownPage] = {}

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._blank) + len(self._reusable)

    @property
    def reusable(self) -> int:
        """How many of the free ones are still known."""
        return len(self._reusable)

    def is_free(self, page: int) -> bool:
        return self._holders[page] == 0

    def take(self, count: int) -> list[int]:
        """Pages that nobody held, whose first holder is the caller. There must be as many."""
        assert count <= self.free
        taken = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._reusable.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of each of these, which ``match`` has found."""
        for page in pages:
            self._reusable.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each page of a sequence, in its order.

        Of a sequence's pages the last ones are used up first: what comes after a page is of no use without it.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if self._holders[page] == 0:
                if page in self._known_as:
                    self._reusable[page] = None
                else:
                    self._blank.append(page)

    def match(self, tokens: Sequence[int]) -> list[KnownPage]:
        """The known pages that hold the beginning of ``tokens``, as long as it goes on and never all of them: at least
        one token is left to compute."""
        found: list[KnownPage] = []
        size, parent = self.page_size, None
        for start in range(0, len(tokens) - size, size):  # the last page ends before the last token
            page = self._find(parent, tuple(tokens[start : start + size]))
            if page is None:
                break
            found.append(page)
            parent = page
        return found

    def know(self, page: int, tokens: tuple[int, ...], parent: KnownPage | None, step: int) -> KnownPage:
        """Says what a held page holds from ``step`` on; the page that was known to hold the same, if there is one."""
        assert len(tokens) == self.page_size
        assert self._holders[page] > 0
        known = self._find(parent, tokens)
        if known is not None:
            return known
        key = self._key(parent, tokens)
        other = self._known.get(key)
        known = KnownPage(page, tokens, parent, key, step)
        if other is None and page not in self._known_as:  # of two with one name the first stays
            self._known[key] = self._known_as[page] = known
        return known

    def forget(self) -> None:
        """No page is known any more."""
        self._blank += self._reusable
        self._reusable.clear()
        self._known.clear()
        self._known_as.clear()

    def _key(self, parent: KnownPage | None, tokens: tuple[int, ...]) -> Hashable:
        return self._hash_of((None if parent is None else parent.key, tokens))

    def _find(self, parent: KnownPage | None, tokens: tuple[int, ...]) -> KnownPage | None:
        """By its name, and then by what it holds: of the parent, which was found like this, it is enough that it is
        the same."""
        known = self._known.get(self._key(parent, tokens))
        return known if known is not None and known.tokens == tokens and known.parent is parent else None

    def _forget(self, page: int) -> None:
        known = self._known_as.pop(page)
        del self._known[known.key]
