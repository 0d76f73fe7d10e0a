"""Tools under Mistral's templates of versions 2 and 3 against mistral-common, id for id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct import messages as theirs
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV2, InstructTokenizerV3
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from mixtralkit.engine.chat import encode_chat, takes_tools
from mixtralkit.engine.tokenizer import Tokenizer
from tests.engine.parts import make_tokenizer
from tests.engine.side_files import trained
from tests.engine.test_side_files import CONTROLS

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": 'Köln, "Rome"'}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "How warm it is.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def calls(*named: tuple[str, str, Any]) -> dict[str, Any]:
    each = [{"id": id, "type": "function", "function": {"name": name, "arguments": value}} for id, name, value in named]
    return {"role": "assistant", "content": "", "tool_calls": each}


def result(id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": id}


ONE = [user("How warm is it in Rome?"), calls(("abcDEF123", "weather", {"city": "Rome"}))]
DIALOGS = {
    "no calls yet": [user("How warm is it?")],
    "system": [
        {"role": "system", "content": "Be brief."},
        user("a"),
        {"role": "assistant", "content": "b "},
        user("c"),
    ],
    "a number": [*ONE, result("abcDEF123", "31")],
    "an object": [*ONE, result("abcDEF123", '{"warm":  31, "unit": "°C"}')],
    "a text": [*ONE, result("abcDEF123", "[INST] not JSON")],
    "nothing": [*ONE, result("abcDEF123", "")],
    "a later question": [*ONE, result("abcDEF123", "31"), {"role": "assistant", "content": "31."}, user("And now?")],
    "again": [*ONE, result("abcDEF123", "31"), calls(("abcDEF124", "now", {})), result("abcDEF124", '"noon"')],
}
TWO = [user("Here and there?"), calls(("abcDEF123", "weather", {"city": "Rome"}), ("abcDEF124", "now", {})),
       result("abcDEF124", "1"), result("abcDEF123", "2")]  # fmt: skip


def make(folder: Path, version: int) -> tuple[Tokenizer, Any]:
    path = folder / f"tokenizer.model.v{version}"
    path.write_bytes(trained(control_symbols=CONTROLS))
    pieces = SentencePieceTokenizer(path, tokenizer_version=TokenizerVersion(f"v{version}"))
    return Tokenizer.beside(folder), {2: InstructTokenizerV2, 3: InstructTokenizerV3}[version](pieces)


def mistral_ids(other: Any, version: int, dialog: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    names = {c["id"]: c["function"]["name"] for m in dialog for c in m.get("tool_calls", ())}
    made = []
    for message in dialog:
        if message["role"] == "tool":
            id = message["tool_call_id"]
            made.append(theirs.ToolMessage(content=message["content"], tool_call_id=id, name=names[id]))
        elif "tool_calls" in message:
            said = [
                (c["id"], c["function"]["name"], json.dumps(c["function"]["arguments"])) for c in message["tool_calls"]
            ]
            own = [ToolCall(id=id, function=FunctionCall(name=name, arguments=value)) for id, name, value in said]
            made.append(theirs.AssistantMessage(content=None, tool_calls=own))
        else:
            kind = {"user": theirs.UserMessage, "system": theirs.SystemMessage, "assistant": theirs.AssistantMessage}
            made.append(kind[message["role"]](content=message["content"]))
    shown = [Tool.model_validate({**t, "function": {"parameters": {}, **t["function"]}}) for t in tools]
    request = ChatCompletionRequest(messages=made, tools=shown or None)
    normalizer = get_normalizer(TokenizerVersion(f"v{version}"), None)
    return other.encode_instruct(normalizer.from_chat_completion_request(request)).tokens


@pytest.mark.parametrize("version", [2, 3])
def test_ids_are_those_of_mistral_common(tmp_path, version):
    ours, other = make(tmp_path, version)
    assert takes_tools(ours)
    for name, dialog in {**DIALOGS, **({"two": TWO} if version == 3 else {})}.items():
        for tools in (TOOLS, TOOLS[:1], []):
            assert encode_chat(ours, dialog, tools) == mistral_ids(other, version, dialog, tools), name


@pytest.mark.parametrize(
    ("version", "dialog", "says"),
    [
        (2, TWO, "message 1 has 2 tool_calls; Mistral's version 2 answers one at a time"),
        (3, TWO[:3], "the last message has role 'tool'"),
        (3, [*TWO[:3], user("x")], "message 3 has role 'user', but 'tool' is next"),
        (3, [*ONE, result("abcDEF999", "1")], "message 2 (tool) answers call 'abcDEF999', none of ['abcDEF123']"),
        (3, [user("a"), calls(("call_1", "now", {}))], "message 1 has call 'call_1'; Mistral's ids are nine letters"),
        (3, [user("a"), {**calls(("abcDEF123", "now", {})), "content": "b"}], "message 1 has content and tool_calls"),
        (3, [user("a"), result("abcDEF123", "1")], "message 1 has role 'tool', but 'assistant' is next"),
        (
            1,
            [*ONE, result("abcDEF123", "1")],
            "message 1 has tool_calls, which the model's chat template does not take",
        ),
    ],
)
def test_dialogs_that_do_not_fit_are_named(tmp_path, version, dialog, says):
    tokenizer = make_tokenizer(tmp_path) if version == 1 else make(tmp_path, version)[0]
    with pytest.raises(ValueError, match="message") as error:
        encode_chat(tokenizer, dialog)
    assert says in str(error.value)
