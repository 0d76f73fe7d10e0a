"""Calls of tools in what a model says, and grammars that make it say some.

Mistral's models write ``[TOOL_CALLS]``, a token without text, and a JSON list of calls. Those trained on Hermes's
format write ``<tool_call>``, a JSON object and ``</tool_call>`` for each. What cannot be read as calls is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from typing import Any

from mixtralkit.engine.requests import StopFilter, StreamEvent
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.server.protocol import Tool

_LIST, _ONE = "[TOOL_CALLS]", "<tool_call>"
_ID = re.compile(r"[a-zA-Z0-9]{9}")  # Mistral's templates take no other
_LETTERS = string.ascii_letters + string.digits

_ANY = {"type": "object"}
_AN_ID = {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
_AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as models were shown it


def call_grammar(tokenizer: Tokenizer, tools: Sequence[Tool], many: bool, free: bool) -> str:
    """Answers that call one of the tools, or several, with arguments as these describe them: llguidance's Lark.

    Args:
        many: several calls may come.
        free: text may come before the calls, or no call at all.

    Raises:
        ValueError: where the model's template shows no format of calls, or arguments are described in a wrong way.
    """
    described, each = {}, []
    for i, tool in enumerate(tools):
        described[f"tool{i}"] = _ANY
        if tool.function.parameters and (tool.function.strict or not free):
            described[f"tool{i}"] = _moved(tool.function.parameters, f"#/$defs/tool{i}")
        properties = {"name": {"const": tool.function.name}, "arguments": {"$ref": f"#/$defs/tool{i}"}, "id": _AN_ID}
        each.append({"type": "object", "properties": properties, "required": ["name", "arguments"],
                     "additionalProperties": False})  # fmt: skip
    said = {"anyOf": each}
    template, mark = tokenizer.chat_template, tokenizer.id_of(_LIST)
    if template is None or _LIST in template:
        said = {"type": "array", "items": said, "minItems": 1, **({} if many else {"maxItems": 1})}
        is_token = mark is not None and not tokenizer.piece_bytes[mark]
        calls = f'{f"<[{mark}]>" if is_token else json.dumps(_LIST)} " "? json'
    elif _ONE in template:
        is_token, calls = False, '"<tool_call>" "\\n"? json "\\n"? "</tool_call>"'
        calls = f'{calls} ("\\n"? {calls})*' if many else calls
    else:
        raise ValueError(f"the model's chat template writes calls neither as {_LIST} nor as {_ONE}")
    if free and not is_token:  # any text may be one that looks like a call
        raise ValueError("a function's strict needs a tool_choice here: the model's calls are texts like others")
    start = f"start: TEXT ({calls})?\nTEXT: /(.|\\n)*/" if free else f"start: {calls}"
    return f"{start}\njson: %json {json.dumps({**said, '$defs': described, 'x-guidance': _AS_DUMPED})}\n"


def _moved(schema: Any, root: str) -> Any:
    """A JSON schema that stands somewhere else now, with its references."""
    if isinstance(schema, list):
        return [_moved(value, root) for value in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, root) for name, value in schema.items()}
    if isinstance(own := schema.get("$ref"), str) and own.startswith("#"):
        moved["$ref"] = root + own[1:]
    return moved


class ToolCalls:
    """Splits one answer into text and calls, as it comes.

    Args:
        many: give all calls, else the first.
    """

    def __init__(self, tokenizer: Tokenizer, many: bool = True) -> None:
        self._many, self._list_id = many, tokenizer.id_of(_LIST)
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
        return text, calls if self._many else calls[:1]


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
