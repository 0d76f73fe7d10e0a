"""The engine's thread, the one that makes text of its tokens, and the way between them and the event loop.

::

    event loop   submit, abort ──► inbox ──► poll             engine's thread
                 Answers ◄── call_soon_threadsafe ◄── events ◄── tokens of a step
                                            text's thread (ends by stop texts ──► inbox)

Only ``poll`` and ``run`` are called in the engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Abort, Request, StreamEvent
from mixtralkit.engine.runs import EngineSnapshot, Told
from mixtralkit.engine.tell import Teller
from mixtralkit.server.errors import ApiError

_POLL_S = 1.0  # the engine tells the other ranks so often that it lives
_RATE_OVER_S = 30.0
_LONGEST_RETRY_S = 60


class Answers:
    """The events of the answers to one request, as they come.

    Attributes:
        started_s: when they were asked for, by ``time.perf_counter``.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.started_s = time.perf_counter()
        self._index = {request.id: index for index, request in enumerate(requests)}
        self.open_ids = set(self._index)
        self._come: list[tuple[int, StreamEvent, float]] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    def take(self, event: StreamEvent, at_s: float) -> None:
        """One more event, which the engine gave at ``at_s``."""
        self._come.append((self._index[event.id], event, at_s))
        if event.finish_reason is not None:
            self.open_ids.discard(event.id)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """Nothing more will come."""
        self._error = error
        self.open_ids.clear()
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, StreamEvent, float]]]:
        """Everything that has come since, as (number of the answer, event, when); ends with the last answer's end.

        Raises:
            ApiError: when the engine, or an answer, cannot go on.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            come, self._come = self._come, []
            if come:
                yield come
            if self._error is not None:
                raise self._error
            if not self.open_ids and not self._come:
                return


class EngineThread(threading.Thread):
    """Loads a model and answers until it is closed, or cannot go on.

    Args:
        load: gives the engine; called in the thread.
        on_ready: called on the event loop with what ``load`` gave.
        on_end: called on the event loop with the error that ended the thread, None after ``close``.

    Attributes:
        at_end: called in the thread behind the engine's last step.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        on_ready: Callable[[Engine], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._load, self._on_ready, self._on_end = load, on_ready, on_end
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Request | Abort] = deque()
        self._news = threading.Condition()
        self._told: queue.SimpleQueue[tuple[Told, float] | None] = queue.SimpleQueue()
        self._closing = False
        self._open: dict[int, Answers] = {}
        self._ids = itertools.count()
        self._ends_s: deque[float] = deque(maxlen=1000)
        self.engine: Engine | None = None
        self.at_end: Callable[[], None] = lambda: None

    # in the engine's thread

    def run(self) -> None:
        error: BaseException | None = None
        try:
            engine = self._load()
            self._tell(self._is_ready, engine)
            text = threading.Thread(target=self._make_text, args=(engine.teller(),), name="detokenize", daemon=True)
            text.start()
            try:
                for told in engine.tokens(self):
                    self._told.put((told, time.perf_counter()))
            finally:
                self._told.put(None)
                text.join()  # what it still has to say comes before the end
            self.at_end()
        except BaseException as caught:
            error = caught
        self._tell(self._on_end, error)

    def poll(self, wait: bool) -> list[Request | Abort] | None:
        """What has come since; None when nothing will any more."""
        with self._news:
            if wait and not self._inbox and not self._closing:
                self._news.wait(_POLL_S)
            come = list(self._inbox)
            self._inbox.clear()
            return None if self._closing and not come else come

    def _make_text(self, teller: Teller) -> None:
        """In a thread of its own: the engine's tokens become events, and it hears which of them end an answer."""
        try:
            while (item := self._told.get()) is not None:
                told, at_s = item
                events = teller.events(told)
                self._put([Abort(e.id, untold=True) for e in events if e.finish_reason == "stop" or e.cause])
                if events:
                    self._tell(self._deliver, events, at_s)
        except Exception as error:
            self._tell(self._on_end, error)

    def _tell(self, function: Callable[..., None], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *values)

    # on the event loop

    def next_id(self) -> int:
        """An id that no other request has."""
        return next(self._ids)

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Hands the requests to the engine."""
        answers = Answers(requests)
        self._open.update(dict.fromkeys(answers.open_ids, answers))
        self._put(requests)
        return answers

    def abort(self, answers: Answers) -> None:
        """Ends what is still open of the answers; nothing more comes of them."""
        left = [id for id in answers.open_ids if self._open.pop(id, None) is not None]
        self._put([Abort(id) for id in left])

    def abort_all(self) -> None:
        """Ends every answer as aborted."""
        self._put([Abort(id) for id in self._open])

    def close(self) -> None:
        """Takes nothing more; the thread ends when all answers have."""
        with self._news:
            self._closing = True
            self._news.notify()

    def fail(self, error: ApiError) -> None:
        """Gives every open answer the error."""
        answers, self._open = set(self._open.values()), {}
        for each in answers:
            each.fail(error)

    @property
    def open_requests(self) -> int:
        """Answers that have not ended."""
        return len(self._open)

    @property
    def snapshot(self) -> EngineSnapshot | None:
        """The engine's; None before it is there."""
        return None if self.engine is None else self.engine.snapshot()

    @property
    def waiting(self) -> int:
        """Answers that have not begun."""
        snapshot = self.snapshot
        return len(self._inbox) + (0 if snapshot is None else snapshot.waiting)

    @property
    def retry_after_s(self) -> int:
        """Whole seconds in which the queue would empty at the pace of the last answers."""
        now = time.perf_counter()
        recent = sum(now - at < _RATE_OVER_S for at in self._ends_s)
        wait_s = self.waiting * _RATE_OVER_S / recent if recent else _LONGEST_RETRY_S / 6
        return min(max(1, math.ceil(wait_s)), _LONGEST_RETRY_S)

    def _put(self, items: Sequence[Request | Abort]) -> None:
        if items:
            with self._news:
                self._inbox.extend(items)
                self._news.notify()

    def _is_ready(self, engine: Engine) -> None:
        self.engine = engine
        self._on_ready(engine)

    def _deliver(self, events: Sequence[StreamEvent], at_s: float) -> None:
        for event in events:
            answers = self._open.get(event.id)
            if event.finish_reason is not None:
                self._open.pop(event.id, None)
                self._ends_s.append(at_s)
            if answers is not None:
                answers.take(event, at_s)
