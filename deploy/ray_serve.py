"""Replicas of ``mixtralkit serve`` behind one address, on Ray Serve.

    pip install 'ray[serve]' httpx 'mixtralkit[serve]'
    serve run deploy.ray_serve:app model=/models/Mixtral-8x7B-Instruct replicas=4 ranks=2

A replica is a server of its own, as its command starts it, in a process under the replica's actor, which Ray gives
``ranks`` GPUs. What comes to the one address goes to a replica as it is and comes back as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

_OF_ONE_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"host", b"upgrade"}
_DRAIN_S = 40  # above what serve's --drain_s and torchrun take


class Arguments(BaseModel):
    """What ``serve run`` takes as NAME=VALUE.

    Attributes:
        model: as serve's ``-m``; the same path on every host.
        ranks: GPUs, and processes, of a replica; with ``cpus`` it has no GPU.
        cpus: that a replica takes.
        options: more of serve's, such as ``--max_batch_size 256``.
        in_flight: most requests that Ray sends to a replica at a time; the rest waits in Ray.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    replicas: int = Field(1, ge=1)
    ranks: int = Field(1, ge=1)
    cpus: float | None = Field(None, gt=0)
    options: str = ""
    in_flight: int = Field(1024, ge=1)


class Replica:
    """One server, as an ASGI application: it starts and ends with the application, and takes that along if it dies, so
    that Ray makes another."""

    def __init__(self, command: list[str]) -> None:
        self._command = command

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._pass_on(Request(scope, receive), scope, receive, send)

    async def _live(self, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "lifespan.startup":
            pass
        try:
            await self._start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        while (await receive())["type"] != "lifespan.shutdown":
            pass
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, _DRAIN_S)
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        """Returns when the server takes requests."""
        loop, found = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, preexec_fn=_dies_with_parent)

        def read() -> None:
            for line in self._process.stderr:
                sys.stderr.write(line)
                if address := re.search(r"listening on (http://\S+);", line):
                    loop.call_soon_threadsafe(found.set_result, address[1])
            code = self._process.wait()
            if not found.done():
                loop.call_soon_threadsafe(found.set_exception, RuntimeError(f"the server ended with {code}"))
            elif code != 0:
                os._exit(1)

        threading.Thread(target=read, name="server's words", daemon=True).start()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(base_url=await found, timeout=None, limits=limits)
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await self._client.get("/health")).status_code == 200:
                    return
            await asyncio.sleep(0.2)

    async def _pass_on(self, request: Request, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """The request as it is; a client that leaves ends the connection to the server, which frees its pages."""
        url = httpx.URL(path=scope["path"], query=scope["query_string"])
        headers = [pair for pair in scope["headers"] if pair[0] not in _OF_ONE_HOP]
        content = await request.body()
        answer = await self._client.send(
            self._client.build_request(scope["method"], url, headers=headers, content=content), stream=True
        )

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()

        back = StreamingResponse(pieces(), answer.status_code)
        back.raw_headers = [(k.lower(), v) for k, v in answer.headers.raw if k.lower() not in _OF_ONE_HOP]
        await back(scope, receive, send)


def app(arguments: Arguments) -> serve.Application:
    """The application for ``serve run`` and ``serve build``."""
    given = ["-m", arguments.model, "--port", "0", *shlex.split(arguments.options)]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}", "-m"]
    command = [sys.executable, "-m", *(launcher if arguments.ranks > 1 else []), "mixtralkit", "serve", *given]
    if arguments.cpus is None:
        resources = {"num_gpus": arguments.ranks, "num_cpus": arguments.ranks}
    else:
        command, resources = [*command, "--device", "cpu"], {"num_cpus": arguments.cpus}

    @serve.deployment(
        name="mixtralkit", num_replicas=arguments.replicas, ray_actor_options=resources,
        max_ongoing_requests=arguments.in_flight, graceful_shutdown_timeout_s=_DRAIN_S,
    )  # fmt: skip
    @serve.ingress(Replica(command))
    class Mixtral:
        pass

    return Mixtral.bind()


def _dies_with_parent() -> None:
    """In the child: the kernel sends it SIGTERM when the actor is gone, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
