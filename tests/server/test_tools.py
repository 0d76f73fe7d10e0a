"""Tools: shown to the model by its template, and its calls read from what it says, whole and streamed."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from mixtralkit.engine.chat import render
from mixtralkit.engine.requests import Completion, StreamEvent, Token
from mixtralkit.server.tools import read_calls
from tests.server.doubles import Slots, run

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}[TOOLS] {{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}] "
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.content }}{{ m.tool_call_id or '' }}{% endfor %}"
)
ASKED = {"messages": [{"role": "user", "content": "How warm is it in Rome?"}], "tools": TOOLS, "max_tokens": 40}


class Says(Slots):
    """Says one text, token by token; ``[TOOL_CALLS]`` is a token without text."""

    def __init__(self, text: str) -> None:
        super().__init__(max_seq_len=512)
        self.tokenizer.chat_template, self.tokenizer.template_from = TEMPLATE, "a test"
        self.text, self.pieces = text, re.findall(r"\[TOOL_CALLS\]|.{1,4}", text, re.S)

    def _step(self, id: int) -> StreamEvent:
        request, count = self.running[id]
        self.running[id] = request, count + 1
        ids = [0 if piece == "[TOOL_CALLS]" else 5 for piece in self.pieces]
        texts = ["" if piece == "[TOOL_CALLS]" else piece for piece in self.pieces]
        event = StreamEvent(id, texts[count], tokens=(Token(ids[count], -1.0, texts[count]),))
        if count + 1 < len(texts):
            return event
        del self.running[id]
        whole = Completion(id, ids, [-1.0] * len(ids), None, "".join(texts), "stop", texts)
        return replace(event, finish_reason="stop", completion=whole)


def said(text: str, **asked: object) -> tuple[dict, dict]:
    """The message of a whole answer, and the one that a stream's deltas make; with its finish reason each."""
    engine = Says(text)
    engine.tokenizer.id_of = lambda name: 0 if name == "[TOOL_CALLS]" else None

    async def ask(service, client):
        whole = await client.post("/v1/chat/completions", json={**ASKED, **asked})
        parts = await client.post("/v1/chat/completions", json={**ASKED, **asked, "stream": True})
        return whole.json()["choices"][0], parts.text

    choice, lines = run(ask, engine)
    streamed: dict = {"content": "", "reason": None, "tool_calls": []}
    for line in lines.splitlines():
        if line.startswith("data: {"):
            (part,) = json.loads(line[6:])["choices"]
            streamed["content"] += part["delta"].get("content") or ""
            streamed["tool_calls"] += part["delta"].get("tool_calls", [])
            streamed["reason"] = part["finish_reason"]
    return {**choice["message"], "reason": choice["finish_reason"]}, streamed


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ('[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', None, ["weather"]),
        ('[TOOL_CALLS] [{"name": "a", "arguments": {}, "id": "abcDEF123"}, {"name": "b", "arguments": {}}]', None,
         ["a", "b"]),
        ('I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "I look.\n",
         ["weather"]),
        ('<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b"}</tool_call>', None, ["a", "b"]),
    ],
)  # fmt: skip
def test_calls(text, content, names):
    whole, streamed = said(text)
    assert (whole["content"], whole["reason"]) == (content, "tool_calls")
    assert [call["function"]["name"] for call in whole["tool_calls"]] == names
    for call in whole["tool_calls"]:
        assert re.fullmatch(r"[a-zA-Z0-9]{9}", call["id"])
        json.loads(call["function"]["arguments"])
    assert (streamed["content"], streamed["reason"]) == (content or "", "tool_calls")
    assert [call["function"] for call in streamed["tool_calls"]] == [call["function"] for call in whole["tool_calls"]]
    assert [call["index"] for call in streamed["tool_calls"]] == list(range(len(names)))
    if "abcDEF123" in text:
        assert whole["tool_calls"][0]["id"] == "abcDEF123"


@pytest.mark.parametrize("text", ["No.", "a <tool", "<tool_call>{broken", '<tool_call>{"name": 1}</tool_call>'])
def test_what_is_no_call_is_text(text):
    whole, streamed = said(text)
    assert (whole["content"], whole["reason"]) == (text, "stop")
    assert (streamed["content"], streamed["tool_calls"], streamed["reason"]) == (text, [], "stop")


def test_no_calls_where_none_are_wanted():
    text = '<tool_call>{"name": "a"}</tool_call>'
    assert said(text, tool_choice="none")[0]["content"] == text
    assert read_calls("nothing") == []


def test_the_template_shows_tools_calls_and_results():
    engine = Says("Yes.")
    shown = []

    async def ask(service, client):
        original = service.tokenizer.encode_rendered
        service.tokenizer.encode_rendered = lambda text: shown.append(text) or original(text)
        call = {"id": "abcDEF123", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        messages = [*ASKED["messages"], {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "abcDEF123", "content": "31"}]  # fmt: skip
        return [await client.post("/v1/chat/completions", json={**ASKED, "messages": messages, **more})
                for more in ({}, {"tool_choice": "required"}, {"parallel_tool_calls": False})]  # fmt: skip

    good, *refused = run(ask, engine)
    assert good.status_code == 200
    assert shown[0].startswith('<s>[TOOLS] [{"type": "function", "function": {"name": "weather"')
    assert '"arguments": {"city": "Rome"}' in shown[0], "values, not JSON in JSON"
    assert shown[0].endswith("[tool] 31abcDEF123")
    assert [answer.status_code for answer in refused] == [400, 400]
    assert "[TOOLS]" not in render(engine.tokenizer, ASKED["messages"])
