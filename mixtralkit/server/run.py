"""Runs the server on rank 0, and the engine on every rank."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import numpy as np
import uvicorn

from mixtralkit.config import ServerOptions
from mixtralkit.engine.generation import Engine
from mixtralkit.server.app import make_app
from mixtralkit.server.ranks import RankWatch
from mixtralkit.server.service import Service

Load = Callable[[], tuple[Engine, Callable[[], None]]]  # the engine, and what is to be called behind its last step
_CLOSE_S = 2  # for connections that do not close by themselves


def serve_first(name: str, options: ServerOptions, load: Load) -> None:
    """Listens, loads, answers until a signal or a fault ends it.

    Raises:
        OSError: when the address cannot be listened to; nothing is loaded then.
        RuntimeError: when the engine could not be loaded or could not go on.
    """
    with _listen(options) as listener:
        address = listener.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        _say(f"listening on http://{host}:{address[1]}; {name} is loading")
        _run(_serve(name, options, load, listener))


def serve_other(options: ServerOptions, load: Load) -> None:
    """Follows rank 0 until it ends."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # rank 0 says when
    engine, close = load()

    def rows() -> str:
        if engine.expert_rows is None or engine.model.ranks_with_own_sequences == 1:
            return ""  # rank 0 has the same rows
        return json.dumps([engine.context.rank, *engine.expert_rows.read().tolist()])

    watch = RankWatch.start(engine.context, options.rank_timeout_s, _leave, rows)
    engine.warm_up()
    _keep_what_is_there()
    for _ in engine.serve(None):
        pass
    if watch is not None:
        watch.stop()
    close()


async def _serve(name: str, options: ServerOptions, load: Load, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    def loaded() -> Engine:
        engine, close = load()
        context = engine.context

        def dead(sentence: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the server with it
                loop.call_soon_threadsafe(service.fail, RuntimeError(sentence))

        watch = RankWatch.start(context, options.rank_timeout_s, dead)
        if watch is not None:

            def told() -> dict[int, np.ndarray]:
                lines = [json.loads(line) for line in watch.lines if line.startswith("[")]
                return {rank: np.array(sums) for rank, *sums in lines}

            service.others_rows = told

        def end() -> None:
            if watch is not None:
                watch.stop()
            close()

        service.thread.at_end = end
        engine.warm_up()
        _keep_what_is_there()
        _say(f"{name} is ready")
        return engine

    service = Service(name, options, loaded)
    config = uvicorn.Config(
        make_app(service), lifespan="off", log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=_CLOSE_S,
    )  # fmt: skip
    service.start()
    await _Server(config, service).serve(sockets=[listener])
    if service.error is not None:
        raise service.error if isinstance(service.error, Exception) else RuntimeError(str(service.error))


class _Server(uvicorn.Server):
    """Ends when the service has; signals drain it first."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        ending = asyncio.ensure_future(self._end())
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._service.drain)
        try:
            yield
        finally:
            ending.cancel()

    async def _end(self) -> None:
        await self._service.ended.wait()
        self.should_exit = True


def _run(work: object) -> None:
    try:
        from uvloop import run
    except ImportError:
        from asyncio import run
    run(work)


def _listen(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"host and port ({options.host}, {options.port}): {error.strerror or error}") from None


def _leave(sentence: str) -> None:
    _say(f"error: {sentence}")
    os._exit(1)  # the engine's thread may wait for that rank for ever


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _keep_what_is_there() -> None:
    """Python's collector never looks again at what loading has made, which takes it as long as several steps."""
    gc.collect()
    gc.freeze()
