"""What rank 0 tells the others: the next step, and what came of the one before."""

from __future__ import annotations

import msgspec

from mixtralkit.engine.requests import Top
from mixtralkit.engine.sampler import Asked, SamplingOptions


class Rows(msgspec.Struct, array_like=True):
    """The sequences of an owner that go on by one token, a row each.

    ``sources`` are the rows of the step launched before whose token comes first here, still on the device; -1 where it
    is one of ``tokens``. ``positions`` are where that token stands.
    """

    slots: list[int] = []
    sources: list[int] = []
    tokens: list[int] = []
    positions: list[int] = []


class Chunk(msgspec.Struct, array_like=True):
    """Positions ``start`` … of a sequence, to be computed in one step.

    The rows after the first ``skipped`` ones need log-probabilities, of the ``targets`` that follow them; the last row
    its next token where it ``is_sampled``. The first ``again`` are computed anew, since the sequence was preempted.
    """

    slot: int
    start: int
    ids: tuple[int, ...]
    is_sampled: bool
    skipped: int = 0
    targets: tuple[int, ...] = ()
    again: int = 0


class Arrival(msgspec.Struct, array_like=True):
    """A sequence that takes a slot of an owner: what decides its draws, its number for observers, what it asks."""

    owner: int
    slot: int
    number: int
    sampling: SamplingOptions
    drawn_by: tuple[int, int]
    asked: Asked | None = None


class StepPlan(msgspec.Struct, array_like=True):
    """One step, of every owner of sequences: all ranks under attention ``dp``, one that stands for all otherwise.

    Attributes:
        number: counts the steps.
        rows: None where they are those of the step before, each with the token that it sampled.
        chunks: of prompts, or of what a preempted sequence had; none is a decode step.
        arrivals: sequences with a slot since the last step.
        tables: (slot, which pages of the sequence from here on, pages) that have changed.
        draws: some row is not greedy. tops: how many of the likeliest tokens are told with each. routed: the experts
            of the rows are told.
        asks: some row's logits are changed. masks: (slot, bits of the tokens that a grammar allows next) of rows.
    """

    number: int
    rows: list[Rows] | None
    chunks: list[list[Chunk]]
    arrivals: list[Arrival]
    tables: list[list[tuple[int, int, list[int]]]]
    draws: bool
    tops: int = 0
    asks: bool = False
    masks: list[list[tuple[int, bytes]]] = []
    routed: bool = False

    @property
    def has_chunks(self) -> bool:
        return any(self.chunks)


class Took(msgspec.Struct, array_like=True):
    """What the oldest step in flight gave, sequences by their keys.

    Attributes:
        scored: log-probabilities of prompt tokens, and the likeliest in their places.
        routed: int16 experts [tokens, L, K] of the next positions, as bytes; they go before the tokens sampled.
        keys, tokens, logprobs, tops: what was sampled.
    """

    scored: list[tuple[int, list[float], list[Top]]] = []
    routed: list[tuple[int, bytes]] = []
    keys: list[int] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    tops: list[Top] = []


class News(msgspec.Struct, array_like=True):
    """What else happened in a turn; behind what the step gave.

    Attributes:
        began: (run, key) of each request that was taken from the requests of a run, in that order.
        ends: (key, reason, error) of those that end for another reason than their tokens and texts.
        cached: (key, prompt tokens that were in the cache).
        ended_runs: runs that are over; failed_runs: those that an error ended, and its words.
    """

    began: list[tuple[int, int]] = []
    ends: list[tuple[int, str, str | None]] = []
    cached: list[tuple[int, int]] = []
    ended_runs: list[int] = []
    failed_runs: list[tuple[int, str]] = []


class Message(msgspec.Struct, array_like=True):
    """From rank 0 to all, once in each turn of its loop.

    Attributes:
        took: the oldest step in flight has been taken, and gave this to those that all ranks read.
        surplus: slots in the newest step in flight, by owner, whose sequences had ended before it began.
        plan: the step to launch, None for none.
        failed: words of the error that ends all.
    """

    news: News = msgspec.field(default_factory=News)
    took: Took | None = None
    surplus: list[list[int]] = []
    plan: StepPlan | None = None
    failed: str | None = None
