"""Replicas of ``mixtralkit serve`` behind one address, on Ray Serve.

    pip install 'ray[serve]' httpx 'mixtralkit[serve]'
    serve run deploy.ray_serve:app model=/models/Mixtral-8x7B-Instruct replicas=4 ranks=2

A replica is a server of its own, as its command starts it, in a process under the replica's actor, which Ray gives
``ranks`` GPUs. What comes to the one address goes as it is to the replica that has seen its beginning, and comes back
as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import StreamingResponse

_OF_ONE_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"host", b"upgrade"}
_DRAIN_S = 40  # above what serve's --drain_s and torchrun take
_LOOK_S = 1.0  # between two looks at how many wait in a server
_BEGINNING = 1024  # characters of a prompt that say where it goes


class Arguments(BaseModel):
    """What ``serve run`` takes as NAME=VALUE.

    Attributes:
        model: as serve's ``-m``; the same path on every host.
        ranks: GPUs, and processes, of a replica; with ``cpus`` it has no GPU.
        cpus: that a replica takes.
        options: more of serve's, such as ``--max_batch_size 256``.
        in_flight: most requests that Ray sends to a replica at a time; the rest waits in Ray.
        fronts: processes that read what comes in and pass it on.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    replicas: int = Field(1, ge=1)
    ranks: int = Field(1, ge=1)
    cpus: float | None = Field(None, gt=0)
    options: str = ""
    in_flight: int = Field(1024, ge=1)
    fronts: int = Field(1, ge=1)


@dataclass(frozen=True)
class Asked:
    """A request as it came: path with its query, headers in lower case; ``beginning`` of what the model is to read."""

    method: str
    url: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    beginning: str


def beginning_of(body: bytes) -> str:
    """The first characters of a prompt, or of a dialog up to its first question, which later turns begin with too;
    empty where there is no text."""
    try:
        asked = json.loads(body)
        said = asked.get("messages", asked.get("prompt", ""))
        if isinstance(said, list) and said and isinstance(said[0], dict):
            asks = [message.get("role") == "user" for message in said]
            said = said[: asks.index(True) + 1 if True in asks else None]
        return said[:_BEGINNING] if isinstance(said, str) else json.dumps(said)[:_BEGINNING] if said else ""
    except (ValueError, AttributeError, RecursionError):  # the server says what is wrong with it
        return ""


def in_order(beginning: str, waiting: dict[str, int]) -> list[str]:
    """Replicas as a request is to try them, those where fewest wait first: with an equal number each beginning has an
    order of its own, which stays when others come or go. Any order without a beginning.

    Args:
        waiting: requests that wait in each replica's server.
    """

    def place(replica: str) -> tuple[int, bytes]:
        own = hashlib.blake2b(f"{beginning}\n{replica}".encode(errors="replace"), digest_size=8).digest()
        return waiting[replica], own if beginning else random.randbytes(8)

    return sorted(waiting, key=place)


class ByBeginning(RequestRouter):
    """Sends requests that begin alike to one replica, whose cache has the beginning, while none wait there."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica by itself, in ``in_order``."""
        asked = next(iter(pending_request.args), None) if pending_request is not None else None
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        waiting = {id: replica.routing_stats.get("waiting", 0) for id, replica in by_id.items()}
        return [[by_id[id]] for id in in_order(getattr(asked, "beginning", ""), waiting)]


class Front:
    """Takes what comes to the one address, and passes back what a replica answers as it comes."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        body, url = await request.body(), request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [pair for pair in request.headers.raw if pair[0] not in _OF_ONE_HOP]
        pieces = self._replicas.answer.remote(Asked(request.method, url, headers, body, beginning_of(body)))
        status, headers = await anext(pieces)

        async def rest() -> AsyncIterator[bytes]:
            try:
                async for piece in pieces:
                    yield piece
            finally:  # a client that leaves ends the connection to the server, which frees its pages
                pieces.cancel()

        back = StreamingResponse(rest(), status)
        back.raw_headers = headers
        return back


class Replica:
    """One server in a process of its own, which takes the replica along if it dies, so that Ray makes another."""

    async def __init__(self, command: list[str]) -> None:
        self._command = command
        await self._start()

    def __del__(self) -> None:
        if (process := getattr(self, "_process", None)) is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_DRAIN_S)

    async def record_routing_stats(self) -> dict[str, int]:
        """For ``ByBeginning``."""
        key = os.environ.get("MIXTRALKIT_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            live = (await self._client.get("/live", headers=headers)).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return {"waiting": live.get("requests", {}).get("waiting", 0)}

    async def answer(self, asked: Asked) -> AsyncIterator[tuple[int, list[tuple[bytes, bytes]]] | bytes]:
        """Status and headers, then the body as it comes."""
        request = self._client.build_request(asked.method, asked.url, headers=asked.headers, content=asked.body)
        answer = await self._client.send(request, stream=True)
        try:
            kept = [(name.lower(), value) for name, value in answer.headers.raw]
            yield answer.status_code, [pair for pair in kept if pair[0] not in _OF_ONE_HOP]
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            await answer.aclose()

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


def app(arguments: Arguments) -> serve.Application:
    """The application for ``serve run`` and ``serve build``."""
    given = ["-m", arguments.model, "--port", "0", *shlex.split(arguments.options)]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}", "-m"]
    command = [sys.executable, "-m", *(launcher if arguments.ranks > 1 else []), "mixtralkit", "serve", *given]
    if arguments.cpus is None:
        resources = {"num_gpus": arguments.ranks, "num_cpus": arguments.ranks}
    else:
        command, resources = [*command, "--device", "cpu"], {"num_cpus": arguments.cpus}

    routing = RequestRouterConfig(request_router_class=ByBeginning, request_routing_stats_period_s=_LOOK_S)
    replicas = serve.deployment(
        Replica, name="mixtralkit", num_replicas=arguments.replicas, ray_actor_options=resources,
        max_ongoing_requests=arguments.in_flight, graceful_shutdown_timeout_s=_DRAIN_S, request_router_config=routing,
    )  # fmt: skip
    front = serve.deployment(
        Front, name="front", num_replicas=arguments.fronts, ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=arguments.in_flight * arguments.replicas,
    )  # fmt: skip
    return front.bind(replicas.bind(command))


def _dies_with_parent() -> None:
    """In the child: the kernel sends it SIGTERM when the actor is gone, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
