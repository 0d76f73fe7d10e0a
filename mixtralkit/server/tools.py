"""Grammars that make a model call tools, in the formats that ``tool_calls`` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.server.protocol import Tool
from mixtralkit.server.tool_calls import LIST, ONE

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
    template, mark = tokenizer.chat_template, tokenizer.id_of(LIST)
    if template is None or LIST in template:
        said = {"type": "array", "items": said, "minItems": 1, **({} if many else {"maxItems": 1})}
        is_token = mark is not None and not tokenizer.piece_bytes[mark]
        calls = f'{f"<[{mark}]>" if is_token else json.dumps(LIST)} " "? json'
    elif ONE in template:
        is_token, calls = False, '"<tool_call>" "\\n"? json "\\n"? "</tool_call>"'
        calls = f'{calls} ("\\n"? {calls})*' if many else calls
    else:
        raise ValueError(f"the model's chat template writes calls neither as {LIST} nor as {ONE}")
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
