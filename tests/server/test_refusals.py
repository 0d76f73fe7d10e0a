"""Requests that are refused: each by a status, a sentence that names what is wrong, and OpenAI's nesting."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import threading

import httpx
import pytest

from mixtralkit.config import ServerOptions
from mixtralkit.server.service import Service
from tests.server.doubles import Slots, application, run

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def refused(path: str, content: str | bytes, **options: object) -> tuple[int, dict]:
    """Status and error of a request with this body."""

    async def ask(service, client):
        return await client.post(path, content=content, headers={"content-type": "application/json"})

    found = run(ask, **options)
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return found.status_code, error


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ("{", None, "the body is not JSON"),
        ("", "body", "body is missing"),
        ("[1]", "body", "body: Input should be a valid dictionary"),
        ('{"prompt": "a", "colour": 1}', "colour", "unknown field 'colour'"),
        ('{"prompt": "a", "suffix": "b"}', "suffix", "unknown field 'suffix'"),
        ("{}", "prompt", "prompt is missing"),
        ('{"prompt": 5}', "prompt", "prompt: Input should be a valid string or Input should be a valid list"),
        ('{"prompt": []}', "prompt", "at least 1 item"),
        ('{"prompt": [[]]}', "prompt", "at least 1 item"),
        ('{"prompt": ["a", 1]}', "prompt", "valid string"),
        ('{"prompt": [-1]}', "prompt", "greater than or equal to 0"),
        ('{"prompt": [4096]}', "prompt", "prompt has token id 4096; ids are below 4096"),
        ('{"prompt": [[1], [9999999]]}', "prompt.1", "prompt.1 has token id 9999999"),
        ('{"prompt": "a", "max_tokens": -1}', "max_tokens", "greater than or equal to 0"),
        ('{"prompt": "a", "max_tokens": "5"}', "max_tokens", "valid integer"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens", "valid integer"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens", "valid integer"),
        ('{"prompt": "a", "max_tokens": 1e400}', "max_tokens", "max_tokens"),
        ('{"prompt": "a", "max_tokens": 99999999999999999999999}', "max_tokens", "max_tokens"),
        ('{"prompt": "a", "temperature": -0.1}', "temperature", "greater than or equal to 0"),
        ('{"prompt": "a", "temperature": NaN}', "temperature", "finite"),
        ('{"prompt": "a", "temperature": 1e308}', "temperature", "less than or equal to 2"),
        ('{"prompt": "a", "top_p": 1.01}', "top_p", "less than or equal to 1"),
        ('{"prompt": "a", "top_k": -2}', "top_k", "greater than or equal to -1"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "seed", "less than 9223372036854775808"),
        ('{"prompt": "a", "n": 0}', "n", "greater than or equal to 1"),
        ('{"prompt": "a", "n": 65}', "n", "n (65) must be at most 64 (max_n)"),
        ('{"prompt": "a", "stop": ""}', "stop", "at least 1 character"),
        ('{"prompt": "a", "stop": [1]}', "stop", "valid string"),
        ('{"prompt": "a", "logprobs": 21}', "logprobs", "less than or equal to 20"),
        ('{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options", "needs stream to be true"),
        ('{"prompt": "a", "\\ud800": 1}', "body", "unable to parse raw data as a unicode string"),
    ],
)  # fmt: skip
def test_a_completion_is_refused(body, param, says):
    status, error = refused(COMPLETIONS, body)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least 1 item"),
        ([{"role": "user"}], "messages.0.content is missing"),
        ([{"role": "robot", "content": "a"}], "'robot' found using 'role' does not match"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages.0.content: Input should be a valid string or",
        ),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "message 1 has role 'user'"),
        ([{"role": "system", "content": "a"}], "must be the user's"),
        ([{"role": "user", "content": ""}], "message 0 (user) is empty"),
        ([{"role": "user", "content": "a", "name": "Bob"}], "unknown field"),
    ],
)
def test_messages_are_refused(messages, says):
    status, error = refused(CHAT, json.dumps({"messages": messages}))
    assert status == 400
    assert says in error["message"]


def test_the_context_is_counted_to_the_token():
    ids = list(range(3, 3 + 60))
    status, error = refused(COMPLETIONS, json.dumps({"prompt": ids, "max_tokens": 5}))
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "maximum context length is 64 tokens" in error["message"]
    assert "65 tokens (60 in the prompt, 5 in max_tokens)" in error["message"]

    async def ask(service, client):
        return [
            await client.post(COMPLETIONS, json={"prompt": p, "max_tokens": m})
            for p, m in ((ids, 4), (ids + [5] * 4, 0))
        ]

    assert [answer.status_code for answer in run(ask)] == [200, 200]


def test_another_model_is_not_found():
    status, error = refused(COMPLETIONS, '{"model": "gpt-4", "prompt": "a"}')
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert "'gpt-4' is not served; this is 'double'" in error["message"]


def test_paths_and_methods():
    async def ask(service, client):
        return await client.get("/v1/nothing"), await client.get(COMPLETIONS), await client.get("/v1/models/other")

    found = run(ask)
    assert [answer.status_code for answer in found] == [404, 405, 404]
    assert [answer.json()["error"]["code"] for answer in found] == [
        "not_found",
        "method_not_allowed",
        "model_not_found",
    ]


def test_a_body_that_is_too_large():
    big = json.dumps({"prompt": "a" * 1_100_000})
    status, error = refused(COMPLETIONS, big, max_body_mb=1.0)
    assert (status, error["code"]) == (413, "body_too_large")
    assert "larger than 1 MB (max_body_mb)" in error["message"]

    async def pieces():
        for start in range(0, len(big), 65536):
            yield big[start : start + 65536].encode()

    async def ask(service, client):
        return await client.post(COMPLETIONS, content=pieces(), headers={"content-type": "application/json"})

    answer = run(ask, max_body_mb=1.0)
    assert answer.status_code == 413, "its length was not told"


def test_half_a_surrogate_pair_is_a_character():
    async def ask(service, client):
        return await client.post(COMPLETIONS, content='{"prompt": "\\ud800", "echo": true, "max_tokens": 1}',
                                 headers={"content-type": "application/json"})  # fmt: skip

    answer = run(ask)
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "?a")


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
def test_a_body_that_does_not_say_that_it_is_json(headers):
    """As curl -d sends it; the answer once was about dictionaries."""

    async def ask(service, client):
        return await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)

    answer = run(ask)
    assert answer.status_code == 400
    assert "with the header Content-Type: application/json" in answer.json()["error"]["message"]


def test_deep_json_is_refused():
    status, _ = refused(COMPLETIONS, '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert status == 400


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (None, 401), ("Bearer wrong", 401), ("Bearer", 401), ("Basic !!!", 401), ("secret-ü", 401),
        ("Bearer secret-ü", 200), ("bearer secret-ü", 200),
        ("Basic " + base64.b64encode("anyone:secret-ü".encode()).decode(), 200),
    ],
)  # fmt: skip
def test_the_key(said, status):
    headers = {} if said is None else {"Authorization": said.encode("utf-8")}

    async def ask(service, client):
        found = [await client.get(path, headers=headers) for path in ("/", "/v1/models", "/metrics", "/openapi.json")]
        return found, await client.get("/health")

    found, health = run(ask, api_key="secret-ü")
    assert {answer.status_code for answer in found} == {status}
    assert health.status_code == 200, "it needs no key"
    if status == 401:
        assert found[0].json()["error"]["code"] == "invalid_api_key"
        assert found[0].headers["www-authenticate"].startswith("Basic")


def test_a_full_queue():
    engine = Slots(slots=2)
    engine.runs_freely = False

    async def ask(service, client):
        def post():
            return asyncio.ensure_future(client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}))

        taken = [post() for _ in range(5)]
        while service.thread.open_requests < 5:
            await asyncio.sleep(0.01)
        more = await client.post(COMPLETIONS, json={"prompt": ["a", "b"], "max_tokens": 2})
        never = await client.post(COMPLETIONS, json={"prompt": ["a"] * 6, "max_tokens": 2})
        engine.runs_freely = True
        return await asyncio.gather(*taken), more, never

    taken, more, never = run(ask, engine, max_waiting=3)
    assert {answer.status_code for answer in taken} == {200}
    assert (more.status_code, more.json()["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(more.headers["retry-after"]) <= 60
    assert never.status_code == 400, "no later time is better, so it is no 429"
    assert "wants 6 answers; 5 have room" in never.json()["error"]["message"]


def test_nothing_is_taken_before_the_model_is_there():
    async def main():
        gate = asyncio.Event()
        loop = asyncio.get_running_loop()
        engine = Slots()

        def load():
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
            return engine

        async with application(engine, load) as (service, client):
            before = [await client.get("/health"), await client.post(COMPLETIONS, json={"prompt": "a"})]
            gate.set()
            while service.state == "loading":
                await asyncio.sleep(0.01)
            return before, await client.get("/health")

    before, after = asyncio.run(main())
    assert [answer.status_code for answer in before] == [503, 503]
    assert "still loading" in before[0].json()["error"]["message"]
    assert after.status_code == 200


def test_an_exception_ends_one_request_only(monkeypatch):
    engine = Slots()
    whole = engine.tokenizer.encode

    def broken(text: str, **options):
        if "bomb" in text:
            raise ZeroDivisionError("in the tokenizer")
        return whole(text, **options)

    monkeypatch.setattr(engine.tokenizer, "encode", broken)

    async def ask(service, client):
        both = [client.post(COMPLETIONS, json={"prompt": text, "max_tokens": 3}) for text in ("a bomb", "a")]
        return [*await asyncio.gather(*both), await client.get("/health")]

    bad, good, health = run(ask, engine)
    assert (bad.status_code, bad.json()["error"]["type"]) == (500, "server_error")
    assert (good.status_code, health.status_code) == (200, 200)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_cannot_go_on(stream):
    engine = Slots()
    engine.runs_freely = False

    async def ask(service, client):
        asked = {"prompt": "a", "max_tokens": 5, "stream": stream}
        answer = asyncio.ensure_future(client.post(COMPLETIONS, json=asked))
        engine.steps.release()
        while not engine.running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        engine.fault = RuntimeError("the device is gone")
        found, health = await answer, None
        while (health := await client.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        await service.ended.wait()
        return found, health, service.error

    monkey = pytest.MonkeyPatch()
    monkey.setitem(Service.__init__.__globals__, "_DEADLINE_S", 1e6)  # the deadline would end this process
    try:
        found, health, error = run(ask, engine)
    finally:
        monkey.undo()
    assert health.status_code == 503
    assert str(error) == "the device is gone"
    if stream:
        chunks = [json.loads(line[6:]) for line in found.text.splitlines() if line]
        assert found.status_code == 200
        assert "the device is gone" in chunks[-1]["error"]["message"]
        assert "[DONE]" not in found.text
    else:
        assert found.status_code == 503


def test_requests_are_taken_behind_the_warm_up(monkeypatch):
    """By the server's own way from loading to ready: /health is 503 as long as graphs are captured."""
    from mixtralkit.server import run as serving

    begun, goes_on, said = threading.Event(), threading.Event(), []
    engine = Slots()

    def warm_up() -> None:
        begun.set()
        goes_on.wait(60)

    engine.warm_up = warm_up
    monkeypatch.setattr(serving, "_say", said.append)

    async def main() -> tuple[list[int], list[str]]:
        with serving._listen(ServerOptions(port=0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            work = asyncio.ensure_future(
                serving._serve("double", ServerOptions(port=0), lambda: (engine, lambda: None), listener)
            )
            async with httpx.AsyncClient(timeout=60) as client:
                while not begun.is_set():
                    await asyncio.sleep(0.01)
                codes = [(await client.get(f"{url}/health")).status_code]
                codes.append((await client.post(url + COMPLETIONS, json={"prompt": "a"})).status_code)
                said_before = list(said)
                goes_on.set()
                while (code := (await client.get(f"{url}/health")).status_code) != 200:
                    assert code == 503
                    await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await work
            return codes, said_before

    codes, said_before = asyncio.run(main())
    assert codes == [503, 503]
    assert said_before == []
    assert said == ["double is ready"]
