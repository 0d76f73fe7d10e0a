"""What the server is and may do: loading, ready, draining, failed; who may come in; how it ends."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np

from mixtralkit.config import ServerOptions
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.server.asking import Asked, Asking
from mixtralkit.server.engine_thread import Answers, EngineThread
from mixtralkit.server.errors import ApiError, bad
from mixtralkit.server.live import Loads
from mixtralkit.server.metrics import Metrics

T = TypeVar("T")
State = Literal["loading", "ready", "draining", "ended", "failed"]
_LAST_WORDS_S = 1.0  # in which open streams are told that they end
_DEADLINE_S = 5.0  # after which a server that cannot go on ends whatever still runs
_TICK_S = 0.25
_LOOK_S = 1.0


class Service:
    """The served model.

    Args:
        name: what requests call the model.
        load: gives the engine; called in the engine's thread.
    """

    def __init__(self, name: str, options: ServerOptions, load: Callable[[], Engine]) -> None:
        self.name, self.options = name, options
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.metrics = Metrics(self)
        self.ended = asyncio.Event()  # when the process may leave
        self.asking: Asking | None = None
        self.loads = Loads(1, 0, 0)
        self.others_rows: Callable[[], dict[int, np.ndarray]] = dict  # sums of ranks with sequences of their own
        self._text_work = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="text")
        self.thread = EngineThread(load, self._ready, self._end)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begins to load."""
        self.thread.start()
        self._spawn(self._watch())

    @property
    def engine(self) -> Engine:
        """The engine, once there is one."""
        assert self.thread.engine is not None
        return self.thread.engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.engine.tokenizer

    def check_ready(self) -> None:
        """ApiError 503 unless requests may come in."""
        words = {
            "loading": "the model is still loading", "draining": "the server is shutting down",
            "ended": "the server is shutting down", "failed": "the model cannot go on",
        }  # fmt: skip
        if self.state in words:
            raise ApiError(503, words[self.state], code=self.state, retry_after_s=None if self.error else 1)

    def check_model(self, model: str | None) -> None:
        """ApiError 404 for another model's name."""
        if model not in (None, self.name):
            raise ApiError(404, f"model {model!r} is not served; this is {self.name!r}", "model", "model_not_found")

    async def off_loop(self, function: Callable[..., T], *values: Any) -> T:
        """Runs what takes time, such as tokenising, in a thread; an exception of its own becomes a 500."""
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._text_work, functools.partial(function, *values)
            )
        except (ApiError, asyncio.CancelledError):
            raise
        except Exception as error:
            print(f"error in a request: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise ApiError(500, f"the request could not be read: {error}") from None

    def submit(self, asked: Asked) -> Answers:
        """Hands requests to the engine; ApiError 429 where too many wait."""
        self.check_ready()
        count, room = len(asked.requests), self.engine.model.params.max_batch_size + self.options.max_waiting
        if count > room:
            raise bad(f"the request wants {count} answers; {room} have room (max_batch_size and max_waiting)", "n")
        if self.thread.open_requests + count > room:
            self.metrics.refused.inc()
            words = f"{self.thread.waiting} answers wait already; at most {self.options.max_waiting} may (max_waiting)"
            raise ApiError(429, words, retry_after_s=self.thread.retry_after_s)
        return self.thread.submit(asked.requests)

    def drain(self) -> None:
        """Takes nothing new, lets what runs end within ``drain_s``, then ends; a second call ends at once."""
        if self.state == "loading":
            os._exit(0)  # no request is lost, and a thread that loads cannot be stopped
        if self.state == "draining":
            self.thread.abort_all()
        elif self.state == "ready":
            self.state = "draining"
            self._spawn(self._drain())

    def fail(self, error: BaseException) -> None:
        """The engine cannot go on: every open answer is told so, and the process ends with an error."""
        if self.state in ("failed", "ended"):
            return
        self.state, self.error = "failed", error
        deadline = threading.Timer(_DEADLINE_S, os._exit, (1,))
        deadline.daemon = True
        deadline.start()
        self.thread.fail(ApiError(503, f"the model cannot go on: {error}", code="failed"))
        self._spawn(self._leave(_LAST_WORDS_S))

    def _ready(self, engine: Engine) -> None:
        options = self.options
        self.asking = Asking(engine, engine.tokenizer, options.max_prompts, options.max_n, self.thread.next_id)
        shape = engine.model.params
        self.loads = Loads(engine.model.ranks_with_own_sequences, shape.n_layers, shape.num_experts)
        if self.state == "loading":
            self.state = "ready"
            self._spawn(self._look())

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self.fail(error)
        elif self.state == "draining":
            self.state = "ended"
            self._spawn(self._leave(0.0))
        else:
            self.fail(RuntimeError("the engine ended by itself"))

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.options.drain_s
        while self.thread.open_requests and loop.time() < until:
            await asyncio.sleep(0.02)
        self.thread.abort_all()
        self.thread.close()

    async def _leave(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.ended.set()

    async def _watch(self) -> None:
        """Fails when a step takes so long that the device, or another rank, must be stuck."""
        while self.state != "ended":
            await asyncio.sleep(_TICK_S)
            snapshot = self.thread.snapshot
            self.metrics.tick(snapshot)
            since = None if snapshot is None else snapshot.busy_since
            if since is not None and asyncio.get_running_loop().time() - since > self.options.step_timeout_s:
                self.fail(RuntimeError(f"a step has run for more than {self.options.step_timeout_s:g} s"))

    async def _look(self) -> None:
        """Takes the experts' loads."""
        while self.state in ("ready", "draining"):
            await asyncio.sleep(_LOOK_S)
            own = self.engine.expert_rows
            if own is not None:
                self.loads.take({0: own.read(), **self.others_rows()})

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
