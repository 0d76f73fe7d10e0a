"""Tools: shown to the model by its template, and its calls read from what it says, whole and streamed."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import openai
import pytest
from msgspec.structs import replace

from mixtralkit.distributed import RankContext
from mixtralkit.engine.chat import render
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.grammar import Grammars
from mixtralkit.engine.requests import Completion, StreamEvent, Token
from mixtralkit.engine.tokenizer import TextStream, Tokenizer
from mixtralkit.server.protocol import Tool
from mixtralkit.server.tool_calls import ToolCalls
from mixtralkit.server.tools import call_grammar
from tests.engine.parts import engine_config, make_model
from tests.engine.side_files import trained
from tests.engine.test_side_files import CONTROLS
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


def join(calls: list[dict], delta: dict) -> None:
    """Adds a part of a call, whose first part tells what it is and later ones more arguments."""
    if delta["index"] == len(calls):
        assert set(delta) == {"index", "id", "type", "function"}
        calls.append(delta)
    else:
        assert (delta["index"], set(delta)) == (len(calls) - 1, {"index", "function"})
        calls[-1]["function"]["arguments"] += delta["function"]["arguments"]


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
            for delta in part["delta"].get("tool_calls", []):
                join(streamed["tool_calls"], delta)
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


def read(pieces: list[str], reason: str = "stop", many: bool = True) -> tuple[str, list[dict], list[list[dict]]]:
    """Text, calls and each push's deltas of an answer that comes in these pieces; ``[TOOL_CALLS]`` is text in it."""
    calls, text, deltas = ToolCalls(Slots().tokenizer, many), "", []
    for i, piece in enumerate(pieces):
        event = StreamEvent(0, piece, reason if i == len(pieces) - 1 else None, tokens=(Token(5, -1.0, piece),))
        said, new = calls.push(event)
        text += said
        deltas.append(new)
    return text, calls.calls, deltas


ANSWERS = [
    'Look: [TOOL_CALLS] [{"name": "a", "arguments": {"x": "}]\\"", "y": [1, {"z": null}]}}, {"name": "b"}] and done',
    '[TOOL_CALLS]{"id": "abcDEF123", "arguments": {"x": 1}, "name": "a"}{"name": "b", "parameters": {}}',
    '[TOOL_CALLS] [{"name": "a", "arguments": "{\\"x\\": 1}"}, {"name": 7}]',
    '<tool_call>\n{"name": "a", "arguments": {"x": "</tool_call>"}}\n</tool_call> <tool_call>{"name": "b"}</tool_call>',
    '<tool_call>{"name": "a", "arguments": {}, "id": "abcDEF123"}</tool_call> ok <tool_call>{"arguments": {}}',
    "a <tool_call> is a mark, [TOOL_CALLS] too, <tool_call>{} [TOOL_CALLS][] <tool_",
    '<tool_call>{"name": "a", "arguments": {"x": 1}} junk',
    '<tool_call>{"name": "a", "arguments": [1, 2], "more": {}}</tool_call>',
    '<tool_call><tool_call>{"name": "a"}</tool_call>',
    '<tool_call>{"note": "' + 5000 * "x" + '", "name": "a"}</tool_call>',
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("many", [True, False])
def test_pieces_of_any_size_say_the_same(answer, many):
    text, calls, _ = read([answer], many=many)
    for size in (1, 2, 3, 7):
        parts, again, deltas = read([answer[i : i + size] for i in range(0, len(answer), size)], many=many)
        joined: list[dict] = []
        for delta in (delta for push in deltas for delta in push):
            join(joined, delta)
        assert parts == text
        assert [call["function"] for call in joined] == [call["function"] for call in again]
        assert [call["function"] for call in again] == [call["function"] for call in calls]


def test_what_answers_say():
    found = [read([answer])[:2] for answer in ANSWERS]
    assert [(text, [tuple(call["function"].values()) for call in calls]) for text, calls in found] == [
        ("Look:  and done", [("a", '{"x": "}]\\"", "y": [1, {"z": null}]}'), ("b", "{}")]),
        ("", [("a", '{"x": 1}'), ("b", "{}")]),
        (' {"name": 7}]', [("a", '{"x": 1}')]),
        ("", [("a", '{"x": "</tool_call>"}'), ("b", "{}")]),
        (' ok <tool_call>{"arguments": {}}', [("a", "{}")]),
        (ANSWERS[5], []),
        (" junk", [("a", '{"x": 1}')]),
        ("", [("a", "[1, 2]")]),
        ("<tool_call>", [("a", "{}")]),
        (ANSWERS[9], []),
    ]


def test_arguments_come_as_they_are_said():
    head, arguments = '<tool_call>{"name": "a", "arguments": ', '{"city": "Rome", "days": 3}'
    text, calls, deltas = read([*head, *arguments, "}", "</tool_call>"])
    assert (text, calls[0]["function"]["arguments"]) == ("", arguments)
    told = [push[0]["function"]["arguments"] for push in deltas if push]
    assert told == list(arguments)
    assert deltas[: len(head)] == [[]] * len(head), "nothing before it can only be a call"


def test_an_answer_that_is_cut_amid_a_call():
    head = 'So <tool_call>{"name": "a", "arguments": '
    assert read([*head, '{"city": "Ro'], "length")[:2][0] == "So "
    assert read([*head, '{"city": "Ro'], "length")[1][0]["function"]["arguments"] == '{"city": "Ro'
    assert read([*head], "length")[:2] == (head, [])
    whole, streamed = said('<tool_call>{"name": "a", "arguments": {"x": 1')
    assert whole["tool_calls"][0]["function"] == streamed["tool_calls"][0]["function"]


def test_no_calls_where_none_are_wanted():
    text = '<tool_call>{"name": "a"}</tool_call>'
    assert said(text, tool_choice="none")[0]["content"] == text


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
                for more in ({}, {"tool_choice": "required"}, {"tool_choice": {"type": "function",
                             "function": {"name": "other"}}}, {"tools": None, "tool_choice": "required"})]  # fmt: skip

    good, *refused = run(ask, engine)
    assert good.status_code == 200
    assert shown[0].startswith('<s>[TOOLS] [{"type": "function", "function": {"name": "weather"')
    assert '"arguments": {"city": "Rome"}' in shown[0], "values, not JSON in JSON"
    assert shown[0].endswith("[tool] 31abcDEF123")
    assert [answer.status_code for answer in refused] == [400, 400, 400]
    for answer, says in zip(refused, ("writes calls neither as", "names 'other'", "needs tools"), strict=True):
        assert says in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "tool_choice"
    assert "[TOOLS]" not in render(engine.tokenizer, ASKED["messages"])


def test_one_call_where_no_more_are_wanted():
    text = '<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b"}</tool_call>'
    for message in said(text, parallel_tool_calls=False):
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["a"]
        assert message["reason"] == "tool_calls"


CITY = {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/City"}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"], "additionalProperties": False, "$defs": {"City": {"enum": ["Rome", "Köln"]}},
}  # fmt: skip
TWO = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {},
                                                                    "additionalProperties": False}, "strict": True}},
]  # fmt: skip


def random_answer(tokenizer: Tokenizer, grammar: str, seed: int) -> list[int]:
    """Random allowed tokens, an end wherever it may be."""
    rng, ids = random.Random(seed), []
    state = Grammars(tokenizer, tokenizer.n_words).begin(grammar, lark=True)
    while len(ids) < 4000:
        mask = np.flatnonzero(np.unpackbits(state.allowed(ids).view(np.uint8), bitorder="little")).tolist()
        goes_on = [id for id in mask if id not in tokenizer.end_ids]
        if len(goes_on) < len(mask) and (not goes_on or rng.random() < 0.5):
            return ids
        ids.append(rng.choice(goes_on))
    raise AssertionError("it does not end")


def events_of(tokenizer: Tokenizer, ids: list[int]) -> StreamEvent:
    stream = TextStream(tokenizer)
    texts = [stream.push(id) for id in ids]
    done = Completion(0, ids, [0.0] * len(ids), None, "".join(texts), "stop", texts)
    tokens = tuple(Token(id, 0.0, text) for id, text in zip(ids, texts, strict=True))
    return StreamEvent(0, "".join(texts), "stop", done, tokens)


@pytest.mark.parametrize("template", [None, "[TOOL_CALLS] {{ tools }}", "<tool_call> {{ tools }}"])
@pytest.mark.parametrize("many", [True, False])
def test_a_call_that_must_come_comes(tmp_path, template, many):
    """Whatever the model wants: random tokens of those that the grammar allows are calls that fit their tools."""
    (tmp_path / "tokenizer.model.v3").write_bytes(trained(control_symbols=CONTROLS))
    tokenizer = Tokenizer.beside(tmp_path)
    tokenizer.chat_template = template
    tools, names, counts = [Tool.model_validate(tool) for tool in TWO], set(), set()
    for seed in range(12):
        ids = random_answer(tokenizer, call_grammar(tokenizer, tools, many, free=False), seed)
        text, calls = ToolCalls(tokenizer).push(events_of(tokenizer, ids))
        assert (text, bool(calls)) == ("", True), tokenizer.decode(ids)
        counts.add(len(calls))
        for call in calls:
            names.add(call["function"]["name"])
            parameters = {"weather": CITY, "now": TWO[1]["function"]["parameters"]}[call["function"]["name"]]
            jsonschema.validate(json.loads(call["function"]["arguments"]), parameters)
    assert names == {"weather", "now"}
    assert (max(counts) > 1) == many


def test_strict_arguments_fit_also_where_calls_are_free(tmp_path):
    (tmp_path / "tokenizer.model.v3").write_bytes(trained(control_symbols=CONTROLS))
    tokenizer = Tokenizer.beside(tmp_path)
    tools = [Tool.model_validate(tool) for tool in TWO]
    grammars, grammar = Grammars(tokenizer, tokenizer.n_words), call_grammar(tokenizer, tools, True, free=True)

    def allows(ids: list[int]) -> bool:
        state = grammars.begin(grammar, lark=True)
        return all(state.allowed(ids[:i])[id // 32] >> id % 32 & 1 for i, id in enumerate(ids))

    mark, encode = tokenizer.id_of("[TOOL_CALLS]"), tokenizer.encode
    good = encode('[{"name": "weather", "arguments": {"city": "Rome", "warm": true}}]', bos=False)
    bad = encode('[{"name": "weather", "arguments": {"city": "Paris", "warm": true}}]', bos=False)
    free = encode('[{"name": "now", "arguments": {}}]', bos=False)
    end = [tokenizer.eos_id]
    assert allows([*encode("I do not know.\n", bos=False), *end])
    assert allows([mark, *good, *end])
    assert allows([*encode("Let me look.", bos=False), mark, *free, *end])
    assert not allows([mark, *bad])
    tokenizer.chat_template = "<tool_call> {{ tools }}"
    with pytest.raises(ValueError, match="strict needs a tool_choice"):
        call_grammar(tokenizer, tools, True, free=True)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}])
def test_a_model_that_never_heard_of_tools_calls_them(tmp_path, choice):
    """The engine, its grammar and Mistral's template of version 3, over HTTP, whole and streamed."""
    (tmp_path / "tokenizer.model.v3").write_bytes(trained(control_symbols=CONTROLS))
    model = make_model(RankContext(), engine_config(max_seq_len=1024))
    engine = Engine(model, Tokenizer.beside(tmp_path))
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": TWO, "tool_choice": choice, "max_tokens": 300,
             "seed": 5}  # fmt: skip

    async def ask(service, client):
        whole = await client.post("/v1/chat/completions", json=asked)
        parts = await client.post("/v1/chat/completions", json={**asked, "stream": True})
        official = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client)
        seen: dict[str, str] = {}
        async with official.chat.completions.stream(model="double", **asked) as stream:
            async for event in stream:
                if event.type == "tool_calls.function.arguments.delta":
                    seen[event.name] = seen.get(event.name, "") + event.arguments_delta
            final = await stream.get_final_completion()
        message = final.choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "31"} for call in message.tool_calls]
        dialog = [*asked["messages"], message, *results]
        await official.chat.completions.create(
            model="double", messages=dialog, tools=TWO, tool_choice="none", max_tokens=1
        )
        return whole, parts.text, seen, final

    whole, lines, seen, final = run(ask, engine)
    (said,) = whole.json()["choices"]
    kept = [(call.function.name, call.function.arguments) for call in final.choices[0].message.tool_calls]
    assert kept == [(call["function"]["name"], call["function"]["arguments"]) for call in said["message"]["tool_calls"]]
    assert all(seen[name].endswith(arguments) for name, arguments in kept)
    assert said["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    functions = [call["function"] for call in said["message"]["tool_calls"]]
    assert {function["name"] for function in functions} <= ({"now", "weather"} if choice == "required" else {"now"})
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines.splitlines() if line.startswith("data: {")]
    calls: list[dict] = []
    for delta in deltas:
        for call in delta.get("tool_calls", []):
            join(calls, call)
    assert [call["function"] for call in calls] == functions
    assert "".join(delta.get("content") or "" for delta in deltas) == ""
