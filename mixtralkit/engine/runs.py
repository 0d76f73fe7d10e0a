"""What an engine is asked for, and what it says of itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from mixtralkit.engine.requests import Abort, Request, StreamEvent
from mixtralkit.engine.scheduler import Sequence
from mixtralkit.engine.step_plan import News, Took
from mixtralkit.moe.tiers import TierCounts


class Arrivals(Protocol):
    """Where a serving engine's requests come from."""

    def poll(self, wait: bool) -> list[Request | Abort] | None:
        """What has come since, in order; None for good once nothing comes any more.

        Asked on rank 0 before each step. With ``wait``, for there is nothing to do, it may block, but no longer than
        about a second, for the other ranks must hear that this one lives.
        """


@dataclass(frozen=True)
class EngineSnapshot:
    """What an engine does, for metrics.

    Attributes:
        running, waiting: sequences with a slot, and without.
        pages, pages_used, page_size: the cache's pages over all ranks, those that sequences hold, and their positions.
        pages_reusable: free ones that hold a known beginning.
        prefix_queries, prefix_hits: prompt tokens looked up, and those of them that were known.
        preemptions: sequences that lost their pages to others and began again.
        prompt_tokens, generation_tokens: prompt tokens of requests that began, and tokens sampled.
        steps: launched so far; step_s: seconds between the last two that were taken.
        busy_since: ``time.monotonic()`` when the turn at hand began; None between turns and while nothing is to do.
        tiers: what became of experts in host memory, of rank 0; noughts where there are none.
    """

    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    page_size: int = 0
    pages_reusable: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    busy_since: float | None = None
    tiers: TierCounts = field(default_factory=TierCounts)


@dataclass
class Told:
    """What a turn of a serving engine gave, before it is text (``tell.Teller``): requests that began with their keys
    and most tokens, the step's tokens, and what else happened."""

    began: list[tuple[int, Request, int]] = field(default_factory=list)
    took: Took = field(default_factory=Took)
    news: News = field(default_factory=News)

    def __bool__(self) -> bool:
        took = self.took
        return bool(self.began or took.keys or took.scored or took.routed or self.news.ends or self.news.cached)


@dataclass(eq=False)
class Run:
    """One call's requests and what came of them.

    On rank 0 ``sequences`` are those that have begun and not ended, by key, and ``begun`` the last turn's requests.
    ``requests`` are still to come: all at once unless they are taken as there is room (``is_lazy``). ``arrivals`` are
    those of an engine that ``serves``: its ``events`` are what each turn ``told``, and tell errors instead of raising.
    """

    number: int
    requests: Iterator[Request] | None = None
    is_lazy: bool = False
    should_stop: Callable[[], bool] | None = None
    arrivals: Arrivals | None = None
    serves: bool = False
    numbers_from: int = 0
    thread: int = 0
    sequences: dict[int, Sequence] = field(default_factory=dict)
    events: deque[StreamEvent | Told] = field(default_factory=deque)
    told: Told = field(default_factory=Told)
    begun: deque[Request] = field(default_factory=deque)
    stops: bool = False
    exhausted: bool = False
    ended: bool = False
    error: Exception | None = None
