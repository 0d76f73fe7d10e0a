"""Errors as OpenAI nests them. A client tries 408, 409, 429 and 5xx again, so a fault that stays is another 4xx."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_value", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large",
    429: "queue_full", 500: "internal_error", 503: "unavailable",
}  # fmt: skip


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        param: the field that is wrong, where one is.
        retry_after_s: when to come again, for 429 and 503.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status, HTTPStatus(status).phrase.lower().replace(" ", "_"))
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """As it goes out, also as a chunk of a stream."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """As a whole answer."""
        more = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return json_response(self.body, self.status, {**(headers or {}), **more})


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair, which has no UTF-8 form, becomes ``?``."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as an answer."""
    return Response(json_bytes(value), status, headers=dict(headers or {}), media_type="application/json")


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param, code)


def of_validation(errors: Sequence[Mapping[str, Any]], content_type: str) -> ApiError:
    """400 that names the first field that is wrong; where it may be one of several things, what each of them wants.

    A body whose ``content_type`` is not JSON was not read as such.
    """
    places = [_place(error) for error in errors]
    kind, alike = errors[0]["type"], [i for i, place in enumerate(places) if place[:1] == places[0][:1]]
    if kind == "json_invalid":
        return bad(f"the body is not JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    if tuple(errors[0]["loc"]) == ("body",) and "json" not in content_type and kind != "missing":
        return bad("the body is taken as JSON only with the header Content-Type: application/json", "body")
    name = ".".join(_common([places[i] for i in alike])) or "body"
    if len(alike) == 1 and kind == "extra_forbidden":
        return bad(f"unknown field {name!r}; what is not supported is refused", name, "unknown_field")
    if len(alike) == 1 and kind == "missing":
        return bad(f"{name} is missing", name, "missing_field")
    said = " or ".join(dict.fromkeys(errors[i]["msg"] for i in alike[:6]))
    return bad(f"{name}: {said}", name)


def _common(places: Sequence[Sequence[str]]) -> list[str]:
    """What all of them begin with."""
    columns = zip(*places, strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


def _place(error: Mapping[str, Any]) -> list[str]:
    """Where a value stands, by names and numbers, without what kind of message it was taken for."""
    _, *place = map(str, error["loc"])
    return place[:2] + place[3:] if place[:1] == ["messages"] else place
