"""Tokens to text and events: on every rank for who reads a run, in a thread of its own behind a serving engine."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mixtralkit.engine.requests import Abort, Answer, Request, StreamEvent
from mixtralkit.engine.runs import Arrivals, Told
from mixtralkit.engine.step_plan import News, Took
from mixtralkit.engine.tokenizer import Tokenizer


class Teller:
    """Makes the events of answers out of their tokens; what was told of others, or of those that ended, is nothing.

    An exception in one answer is the ``error`` of its last event.

    Args:
        routes: layers and experts of a token, the shape of what ``Took.routed`` holds of each.
    """

    def __init__(self, tokenizer: Tokenizer, routes: tuple[int, int]) -> None:
        self._tokenizer, self._routes = tokenizer, routes
        self._answers: dict[int, Answer] = {}

    def __len__(self) -> int:
        """Answers that have begun and not ended."""
        return len(self._answers)

    def begin(self, key: int, answer: Answer) -> None:
        """From now on what is told of ``key`` is this answer's."""
        self._answers[key] = answer

    def drop(self, keys: Iterable[int]) -> None:
        """Nobody reads these any more."""
        for key in keys:
            self._answers.pop(key, None)

    def events(self, told: Told) -> list[StreamEvent]:
        """Of a turn of a serving engine."""
        for key, request, limit in told.began:
            self.begin(key, Answer(request, limit, self._tokenizer))
        return [event for _, event in (*self.of_step(told.took), *self.of_news(told.news))]

    def of_step(self, took: Took) -> list[tuple[int, StreamEvent]]:
        """Keys and events of what a step gave."""
        answers, found = self._answers, []
        for key, scores, tops in took.scored:
            if (answer := answers.get(key)) is not None:
                answer.prompt_logprobs += scores
                answer.prompt_top_logprobs += tops
        for key, routed in took.routed:
            if (answer := answers.get(key)) is not None:
                answer.experts.append(np.frombuffer(routed, np.int16).reshape(-1, *self._routes))
        for key, token, logprob, top in zip(took.keys, took.tokens, took.logprobs, took.tops, strict=True):
            if (answer := answers.get(key)) is None:
                continue
            try:
                event = answer.accept(token, logprob, top)
            except Exception as error:
                event = answer.end("error", str(error) or type(error).__name__, error)
            if event is not None:
                found.append((key, event))
                if answer.ended:
                    del answers[key]
        return found

    def of_news(self, news: News) -> list[tuple[int, StreamEvent]]:
        """Keys and events of what else happened."""
        for key, count in news.cached:
            if (answer := self._answers.get(key)) is not None:
                answer.cached_tokens = count
        ended = [(key, self._answers.pop(key, None), said) for key, *said in news.ends]
        return [(key, answer.end(*said)) for key, answer, said in ended if answer is not None]


class WithEnds:
    """Arrivals with those that the text has ended, which an engine does not know by itself.

    Attributes:
        ends: that are still to be told.
    """

    def __init__(self, arrivals: Arrivals | None, teller: Teller) -> None:
        self._arrivals, self._teller = arrivals, teller
        self.ends: list[Abort] = []

    def poll(self, wait: bool) -> list[Request | Abort] | None:
        """As ``Arrivals.poll``."""
        ends, self.ends = self.ends, []
        came = self._arrivals.poll(wait and not ends)
        return None if came is None and not ends and not self._teller else [*ends, *(came or ())]
