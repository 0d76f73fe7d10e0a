"""Answers that go out piece by piece, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixtralkit.server.errors import ApiError, json_bytes

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is there to be answered."""


async def left(request: Request, work: Coroutine[Any, Any, T], on_left: Callable[[], None]) -> T:
    """What ``work`` gives; ends it with ``on_left`` when the client leaves, or when it fails.

    Raises:
        ClientLeft: when it did.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientLeft
        return doing.result()
    except BaseException:
        on_left()
        raise
    finally:
        doing.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: a chunk each, an error as a chunk, ``[DONE]`` at the end.

    ``send`` waits where the client reads slowly; nothing else waits for it.

    Args:
        first: the first chunk, which is there.
        on_left: called when the client leaves before the end.
    """

    media_type = "text/event-stream"

    def __init__(self, first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], on_left: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._on_left = first, rest, on_left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError:
            pass  # the client left while it was written to
        finally:
            if not sending.done() or sending.cancelled() or sending.exception() is not None:
                self._on_left()
            sending.cancel()
            gone.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._write(send, self._first)
        try:
            async for chunk in self._rest:
                await self._write(send, chunk)
        except ApiError as error:
            await self._write(send, error.body)
            self._on_left()
        except Exception as error:
            await self._write(send, ApiError(500, f"the answer failed: {error}").body)
            self._on_left()
        else:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, chunk: dict[str, Any]) -> None:
        await send({"type": "http.response.body", "body": b"data: " + json_bytes(chunk) + b"\n\n", "more_body": True})
