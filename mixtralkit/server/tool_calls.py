"""Calls of tools in what a model says, read as it comes.

Mistral's models write ``[TOOL_CALLS]``, a token without text, and a JSON list of calls. Those trained on Hermes's
format write ``<tool_call>``, a JSON object and ``</tool_call>`` for each. What cannot be read as calls is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from typing import Any

from mixtralkit.engine.requests import StreamEvent
from mixtralkit.engine.tokenizer import Tokenizer

LIST, ONE, END = "[TOOL_CALLS]", "<tool_call>", "</tool_call>"
_MARKS = (LIST, ONE)
_ID = re.compile(r"[a-zA-Z0-9]{9}")  # Mistral's templates take no other
_LETTERS = string.ascii_letters + string.digits
_MOST_HEAD = 4096  # characters of a call in front of its arguments, which are read again with every token


class _UnfinishedError(Exception):
    """More has to come before a text can be read."""


class ToolCalls:
    """Splits one answer into text and calls.

    ::

        text ── mark ──► head: held back until it can only be a call ──► arguments, as they come ──► tail
         ▲                │ it can not: text after all                                                 │
         └────────────────┴───────────────────────── between: the next call's head, or no more ◄───────┘

    Args:
        many: give all calls, else the first.
    """

    def __init__(self, tokenizer: Tokenizer, many: bool = True) -> None:
        self._many, self._list_id = many, tokenizer.id_of(LIST)
        self._calls: list[dict[str, Any]] = []
        self._deltas: list[dict[str, Any]] = []  # of this push, one a call
        self._said = self._gap = ""  # text of this push, and white space behind calls that counts if text follows
        self._rest, self._ends = "", False  # what has come and was not given yet, and whether this is all
        self._step, self._mark, self._is_first = self._text, "", True

    def push(self, event: StreamEvent) -> tuple[str, list[dict[str, Any]]]:
        """What is certain now: text, and new calls and parts of arguments, each with the call's ``index``."""
        self._rest += "".join(LIST if token.id == self._list_id else token.text for token in event.tokens)
        self._ends = event.finish_reason is not None
        self._said, self._deltas = "", []
        while self._step():
            pass
        return self._said, [delta for delta in self._deltas if self._many or delta["index"] == 0]

    @property
    def calls(self) -> list[dict[str, Any]]:
        """All so far, as OpenAI's objects; the last may have a part of its arguments."""
        return self._calls if self._many else self._calls[:1]

    # each gives what it can of the rest; whether another is to go on

    def _text(self) -> bool:
        rest = self._rest
        found = min(((at, mark) for mark in _MARKS if (at := rest.find(mark)) >= 0), default=None)
        if found is not None:
            at, self._mark = found
            self._say(at)
            self._rest = self._rest[len(self._mark) :]
            self._step, self._is_first = self._head, True
            return True
        beginnings = (n for n in range(len(LIST) - 1, 0, -1) if any(mark[:n] == rest[-n:] for mark in _MARKS))
        self._say(len(rest) - (0 if self._ends else next(beginnings, 0)))
        return False

    def _head(self) -> bool:
        fields: dict[str, Any] = {}
        try:
            at = _skip(self._rest, 0)
            if self._mark == LIST and self._is_first and self._rest[at] == "[":
                at = _skip(self._rest, at + 1)
            at, is_whole = _read_fields(self._rest, _after(self._rest, at, "{"), fields)
            if not isinstance(fields.get("name"), str) or at > _MOST_HEAD:
                raise ValueError
        except _UnfinishedError:
            if not self._ends and len(self._rest) <= _MOST_HEAD:
                return False
            return self._no_call()
        except (ValueError, RecursionError):
            return self._no_call()
        self._rest, self._is_first = self._rest[at:], False
        id = fields.get("id")
        self._begin(fields["name"], id if _is_id(id) else "".join(secrets.choice(_LETTERS) for _ in range(9)))
        self._scan, self._step = _Scan(), self._between if is_whole else self._arguments
        if is_whole:
            self._add(fields.get("arguments", "{}"))
        return True

    def _arguments(self) -> bool:
        end, is_whole = self._scan.push(self._rest, 0)
        self._add(self._rest[:end])
        self._rest = self._rest[end:]
        if is_whole:
            self._step = self._tail
        return is_whole

    def _tail(self) -> bool:
        fields: dict[str, Any] = {"arguments": ""}
        try:
            at, is_whole = _skip(self._rest, 0), True
            if self._rest[at] == ",":
                at, is_whole = _read_fields(self._rest, at + 1, fields)
            else:
                at = _after(self._rest, at, "}")
            if not is_whole or at > _MOST_HEAD:
                raise ValueError
        except _UnfinishedError:
            if not self._ends and len(self._rest) <= _MOST_HEAD:
                return False
            at = len(self._rest) if self._ends else 0
        except (ValueError, RecursionError):
            at = 0  # what follows is text
        self._rest, self._step = self._rest[at:], self._between if at else self._text
        if _is_id(fields.get("id")):
            self._calls[-1]["id"] = fields["id"]  # too late for a stream
        return True

    def _between(self) -> bool:
        try:
            at = _skip(self._rest, 0)
        except _UnfinishedError:
            return False
        rest = self._rest[at:]
        if rest[0] == "{" or (rest[0] == "," and self._mark == LIST):
            self._rest, self._step = rest.removeprefix(","), self._head
        elif rest[0] == "]" and self._mark == LIST:
            self._rest, self._step = rest[1:], self._text
        elif self._mark == ONE and rest.startswith(END):
            self._rest, self._step = rest.removeprefix(END), self._text
        elif self._mark == ONE and END.startswith(rest):
            if not self._ends:
                return False
            self._rest, self._step = "", self._text
        else:
            self._step = self._text
        return True

    def _no_call(self) -> bool:
        """What was held back is text; so is its mark, but for the token that has none."""
        if self._is_first and not (self._mark == LIST and self._list_id is not None):
            self._rest = self._mark + self._rest
            self._say(len(self._mark))
        self._step = self._text
        return True

    def _say(self, count: int) -> None:
        self._gap, self._rest = self._gap + self._rest[:count], self._rest[count:]
        if not self._calls or self._gap.strip():
            self._said, self._gap = self._said + self._gap, ""

    def _begin(self, name: str, id: str) -> None:
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
        self._deltas.append({"index": len(self._calls), **call, "function": dict(call["function"])})
        self._calls.append(call)

    def _add(self, arguments: str) -> None:
        index = len(self._calls) - 1
        self._calls[-1]["function"]["arguments"] += arguments
        if not self._deltas or self._deltas[-1]["index"] != index:
            self._deltas.append({"index": index, "function": {"arguments": ""}})
        self._deltas[-1]["function"]["arguments"] += arguments


class _Scan:
    """Finds the end of a JSON value that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._is_text, self._is_escaped = 0, False, False

    def push(self, text: str, start: int) -> tuple[int, bool]:
        """How far the value reaches in ``text`` from ``start``, and whether it ends there."""
        for at in range(start, len(text)):
            letter = text[at]
            if self._is_text:
                ends_text = letter == '"' and not self._is_escaped
                self._is_escaped = letter == "\\" and not self._is_escaped
                self._is_text = not ends_text
                if ends_text and not self._depth:
                    return at + 1, True
            elif letter == '"':
                self._is_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]" and self._depth:
                self._depth -= 1
                if not self._depth:
                    return at + 1, True
            elif not self._depth and letter in "}],: \t\r\n":  # behind a number or a word
                return at, True
        return len(text), False


def _read_fields(text: str, at: int, fields: dict[str, Any]) -> tuple[int, bool]:
    """Reads an object from the first of its fields on, up to arguments that are an object, behind a name.

    ``arguments`` become their JSON, or the text that they are; a field that was there stays.

    Returns:
        Where it got, and whether the object has ended there.

    Raises:
        _UnfinishedError: the text ends before.
        ValueError, RecursionError: it is no JSON.
    """
    at = _skip(text, at)
    if text[at] == "}":
        return at + 1, True
    while True:
        at = _after(text, at, '"', keeps=True)
        key, at = _value(text, at)
        at = _skip(text, _after(text, _skip(text, at), ":"))
        key = "arguments" if key == "parameters" else key
        if key == "arguments" and text[at] == "{" and isinstance(fields.get("name"), str) and key not in fields:
            return at, False
        value, end = _value(text, at)
        if key == "arguments" and not isinstance(value, str):
            value = text[at:end]
        fields.setdefault(key, value)
        at = _skip(text, end)
        if text[at] == "}":
            return at + 1, True
        at = _skip(text, _after(text, at, ","))


def _value(text: str, at: int) -> tuple[Any, int]:
    end, is_whole = _Scan().push(text, at)
    if not is_whole:
        raise _UnfinishedError
    return json.loads(text[at:end]), end


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    if at == len(text):
        raise _UnfinishedError
    return at


def _after(text: str, at: int, letter: str, keeps: bool = False) -> int:
    if text[at] != letter:
        raise ValueError
    return at if keeps else at + 1


def _is_id(id: Any) -> bool:
    return isinstance(id, str) and _ID.fullmatch(id) is not None
