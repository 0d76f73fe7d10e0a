"""What is looked at before a request is read: its key, and the size of its body."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixtralkit.config import ServerOptions
from mixtralkit.server.errors import ApiError

_READ_ANYWAY = 8  # times the limit; a client that is cut off in the middle of sending may never see the answer


class Guard:
    """An ASGI layer: 401 without the key, but for /health; 413 for a body that is too large."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._key = app, options.api_key
        self._most = int(options.max_body_mb * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] != "/health" and not self._knows_key(headers.get("authorization", "")):
            error = ApiError(401, "this server wants its key, as a bearer token or a password")
            await error.response({"WWW-Authenticate": 'Basic realm="MixtralKit"'})(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._most:
            await self._refuse(int(length), scope, receive, send)
            return
        await self._counted(scope, receive, send)

    def _knows_key(self, said: str) -> bool:
        if self._key is None:
            return True
        kind, _, value = said.partition(" ")
        key = value.strip().encode("latin-1")  # as headers are decoded
        if kind.lower() == "basic":
            with contextlib.suppress(binascii.Error):
                key = base64.b64decode(key).partition(b":")[2]
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(key, self._key.encode("utf-8"))

    async def _refuse(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0
        while read < min(length, self._most * _READ_ANYWAY):
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
            read += len(message.get("body", b""))
        await self._too_large.response({"Connection": "close"})(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what comes as long as it is not too much; a length need not have been told."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if read > self._most:
                raise HTTPException(413, self._too_large.message)  # which FastAPI passes on
            return message

        await self._app(scope, counted, send)

    @property
    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most / 1e6:g} MB (max_body_mb)")
