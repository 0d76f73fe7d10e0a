"""Calls of tools in what a model says.

Mistral's models write ``[TOOL_CALLS]``, a token without text, and a JSON list of calls. Those trained on Hermes's
format write ``<tool_call>``, a JSON object and ``</tool_call>`` for each. What cannot be read as calls is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from typing import Any

from mixtralkit.engine.requests import StopFilter, StreamEvent
from mixtralkit.engine.tokenizer import Tokenizer

_LIST, _ONE = "[TOOL_CALLS]", "<tool_call>"
_ID = re.compile(r"[a-zA-Z0-9]{9}")  # Mistral's templates take no other
_LETTERS = string.ascii_letters + string.digits


class ToolCalls:
    """Splits one answer into text and calls, as it comes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._list_id = tokenizer.id_of(_LIST)
        self._filter = StopFilter((_LIST, _ONE))
        self._shown = 0  # characters of the whole that were given as text
        self._whole = ""

    def push(self, event: StreamEvent) -> tuple[str, list[dict[str, Any]]]:
        """The text that is certain not to be a call, and with the last event the calls."""
        said = "".join(_LIST if token.id == self._list_id else token.text for token in event.tokens)
        self._whole += said
        text = "" if self._filter.stopped else self._filter.push(said)
        calls = []
        if event.finish_reason is not None:
            calls = read_calls(self._whole[self._shown + len(text) :])
            if not calls:
                text = self._whole[self._shown :].replace(_LIST, "")
        self._shown += len(text)
        return text, calls


def read_calls(text: str) -> list[dict[str, Any]]:
    """The calls of a text that begins with a mark, as OpenAI's objects; none where it cannot be read."""
    if text.startswith(_LIST):
        found = _values(text.removeprefix(_LIST))
        found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    else:
        parts = [part.partition("</tool_call>")[0] for part in text.split(_ONE)[1:]]
        found = [value for part in parts for value in _values(part)]
    calls = [_call(value) for value in found]
    return [] if None in calls else calls


def _values(text: str) -> list[Any]:
    """The JSON values that stand one behind the other; [None] where something else does."""
    found, at, decoder = [], 0, json.JSONDecoder()
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return [None]
        found.append(value)
    return found


def _call(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    id = value.get("id")
    if not isinstance(id, str) or _ID.fullmatch(id) is None:
        id = "".join(secrets.choice(_LETTERS) for _ in range(9))
    return {"id": id, "type": "function", "function": {"name": value["name"], "arguments": arguments}}
