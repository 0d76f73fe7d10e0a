"""An engine without a model, whose steps a test lets go one by one, and the application over it in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
from msgspec.structs import replace

from mixtralkit.config import ParallelConfig, ServerOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.requests import Abort, Completion, Request, StreamEvent, Token
from mixtralkit.engine.runs import EngineSnapshot
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.planning.plan import contiguous
from mixtralkit.planning.replicas import ReplicaTable
from mixtralkit.server.app import make_app
from mixtralkit.server.service import Service
from tests.server.process import CKPTS


class Slots:
    """Answers ``max_gen_len`` times the token ``a``, a token a step, in ``slots`` slots."""

    def __init__(self, slots: int = 2, max_seq_len: int = 64) -> None:
        self.tokenizer = Tokenizer(CKPTS / "tokenizer.model")
        self.context = RankContext()
        shape = {"n_layers": 2, "num_experts": 4, "vocab_size": self.tokenizer.n_words}
        params = SimpleNamespace(max_seq_len=max_seq_len, max_batch_size=slots, **shape)
        plan, parallel = contiguous(2, 4, 1), ParallelConfig("tp", "ep")
        tables = [SimpleNamespace(replicas=ReplicaTable.of(plan, layer, True)) for layer in range(2)]
        self.model = SimpleNamespace(
            params=params, layout=SimpleNamespace(plan=plan, parallel=parallel), ranks_with_own_sequences=1,
            store=SimpleNamespace(tables=tables),
        )  # fmt: skip
        self.expert_rows = self.plan_manager = None
        self.steps = threading.Semaphore(0)
        self.runs_freely = True
        self.fault: Exception | None = None
        self.aborted: list[int] = []
        self.running: dict[int, tuple[Request, int]] = {}
        self.waiting: list[Request] = []
        self._a = self.tokenizer.id_of("a")

    def check(self, request: Request) -> None:
        """Takes all."""

    def snapshot(self) -> EngineSnapshot:
        """Of what runs and waits; the rest is nought."""
        return EngineSnapshot(running=len(self.running), waiting=len(self.waiting), pages=8)

    def teller(self) -> Any:
        """Its tokens are events."""
        return SimpleNamespace(events=lambda told: told)

    def tokens(self, arrivals: Any) -> Iterator[list[StreamEvent]]:
        """As the real one, but with text."""
        closed = False
        while self.running or self.waiting or not closed:
            come = [] if closed else arrivals.poll(not self.running and not self.waiting)
            closed = come is None or closed
            if self.fault is not None:
                raise self.fault
            gone = [item.id for item in come or () if isinstance(item, Abort)]
            self.waiting += [item for item in come or () if isinstance(item, Request)]
            ended = [self._end(id) for id in gone if id in self.running or any(r.id == id for r in self.waiting)]
            if ended:
                yield ended
            while self.waiting and len(self.running) < self.model.params.max_batch_size:
                request = self.waiting.pop(0)
                self.running[request.id] = request, 0
            if self.running and (self.runs_freely or self.steps.acquire(timeout=0.02)):
                yield [self._step(id) for id in list(self.running)]

    def _end(self, id: int) -> StreamEvent:
        self.aborted.append(id)
        self.running.pop(id, None)
        self.waiting = [request for request in self.waiting if request.id != id]
        return StreamEvent(id, "", "aborted", Completion(id, [], [], None, "", "aborted"))

    def _step(self, id: int) -> StreamEvent:
        request, count = self.running[id]
        count += 1
        self.running[id] = request, count
        event = StreamEvent(id, "a", tokens=(Token(self._a, -1.0, "a"),))
        if count < request.max_gen_len:
            return event
        del self.running[id]
        whole = Completion(id, [self._a] * count, [-1.0] * count, None, "a" * count, "length", ["a"] * count)
        return replace(event, finish_reason="length", completion=whole)


@asynccontextmanager
async def application(
    engine: Any, load: Callable[[], Any] | None = None, **options: Any
) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    """A service, started and ready unless ``load`` is given, and a client of it."""
    service = Service("double", ServerOptions(**options), load or (lambda: engine))
    transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        service.start()
        while load is None and service.state == "loading":
            await asyncio.sleep(0.005)
        yield service, client
        if service.state == "ready":
            service.state = "draining"
        service.thread.close()
        service.thread.abort_all()


def run(work: Callable[[Service, httpx.AsyncClient], Awaitable[Any]], engine: Any = None, **options: Any) -> Any:
    """Runs ``work`` with an application over ``engine``; gives what it gives."""

    async def main() -> Any:
        async with application(engine or Slots(), **options) as (service, client):
            return await work(service, client)

    return asyncio.run(main())
