"""What broke other servers, over HTTP; ``CASES`` says which test has which of them."""

from __future__ import annotations

import ast
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from mixtralkit.config import ServerOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Answer
from mixtralkit.engine.tokenizer import TextStream
from mixtralkit.server import run as serving
from mixtralkit.server.service import Service
from tests.engine.parts import engine_config, make_model
from tests.server.doubles import Slots, run
from tests.server.process import ROOT

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CASES = {
    "system text of version 1": "server/test_answers.py::test_a_system_text_goes_before_the_first_question",
    "system text of versions 2 and 3": "engine/test_side_files.py::test_control_tokens_of_versions_2_and_3",
    "roles that do not alternate": "server/test_refusals.py::test_messages_are_refused",
    "templated text tokenised again": "server/test_answers.py::test_tokens",
    "pieces that begin with spaces": "server/test_answers.py::test_a_stream_s_deltas_joined_are_the_whole",
    "stop texts cut anywhere": "server/test_answers.py::test_stop_texts_do_not_leak",
    "one prompt in 8 slots": "server/test_answers.py::test_a_text_is_the_same_alone_and_beside_others",
    "the same request twice": "server/test_answers.py::test_a_beginning_that_is_in_the_cache_changes_nothing",
    "echo and logprobs, streamed and not": "server/test_answers.py::test_a_stream_s_deltas_joined_are_the_whole",
    "seeded beside unseeded": "server/test_answers.py::test_seeds",
    "kill -9": "server/test_faults.py::test_a_rank_that_dies_under_load",
    "disconnects in each phase": "server/test_faults.py::test_two_hundred_leave_at_every_phase",
    "a pool of 4096": "server/test_cases.py::test_an_answer_that_fills_the_pool",
    "largest prompt at full batch": "server/test_cases.py::test_the_largest_prompts_at_a_full_batch",
    "ids of calls": "server/test_tools.py::test_calls",
    "usage that nobody asked for": "server/test_answers.py::test_usage_comes_when_it_is_asked_for",
    "256 streams": "server/test_cases.py::test_256_streams_hear_of_each_step_before_the_next",
    "an exception in a template": "server/test_cases.py::test_a_template_that_fails_fails_alone",
    "an exception in a tokeniser": "server/test_refusals.py::test_an_exception_ends_one_request_only",
    "an exception as text is made": "server/test_cases.py::test_text_that_cannot_be_made_ends_one_answer_only",
    "one sequence outgrows the pool": "server/test_cases.py::test_an_answer_that_fills_the_pool",
    "prompt wholly in the cache": "engine/test_serving.py::"
    "test_a_prompt_that_is_wholly_known_gives_the_same_text_and_logprobs",
    "new plans under load": "server/test_faults.py::test_two_ranks_answer_as_one",
    "new plans where all is even": "engine/test_plan_manager.py::test_a_move_pays_only_over_enough_steps",
    "faults that stay are not tried again": "server/test_refusals.py::test_a_full_queue",
    "lm-eval": "server/test_lm_eval.py::test_local_completions",
    "names that gateways read": "server/test_deploy.py::test_paths_ports_and_metrics",
}


@pytest.mark.parametrize("case", CASES)
def test_each_case_has_its_test(case):
    path, _, name = CASES[case].partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def small_engine(tokenizer, pages: int | None = None, page_size: int = 128, **config: Any) -> Engine:
    model = make_model(RankContext(), engine_config(**config))
    model.allocate_cache(page_size, pages)
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tests.engine.parts import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.slow
def test_an_answer_that_fills_the_pool(tokenizer):
    """A prompt of 10 and 4,084 tokens in a pool of 4,096; beside it another that outgrows what is left, and one that
    asks for more than the pool has."""
    engine = small_engine(tokenizer, 32, n_layers=1, hidden_dim=16, max_seq_len=8192, max_batch_size=2)
    asked = {"prompt": [5] * 10, "temperature": 1.0, "seed": 1, "ignore_eos": True}

    async def ask(service, client):
        both = [client.post(COMPLETIONS, json={**asked, "max_tokens": length}, timeout=250) for length in (4084, 2300)]
        found = await asyncio.gather(*both)
        found.append(await client.post(COMPLETIONS, json={**asked, "prompt": [6] * 4090, "max_tokens": 50}))
        found.append(await client.post(COMPLETIONS, json={**asked, "prompt": [6] * 4097, "max_tokens": 1}))
        return found, service.thread.snapshot

    (*ran, refused), snapshot = run(ask, engine)
    told = [(answer.json()["usage"]["completion_tokens"], answer.json()["choices"][0]["finish_reason"])
            for answer in ran]  # fmt: skip
    assert told == [(4084, "length"), (2300, "length"), (6, "length")], "as far as the pool goes"
    assert snapshot.preemptions > 0, "there was no room for both"
    assert refused.status_code == 400
    assert "prompt 3 has 4097 tokens, more than the cache holds (4096)" in refused.json()["error"]["message"]


def test_the_largest_prompts_at_a_full_batch(tokenizer):
    """After the warm-up, all slots at once; each with the scores of all its tokens."""
    engine = small_engine(tokenizer, page_size=32, max_seq_len=256, max_batch_size=8)
    engine.warm_up(engine.prefill_budget)
    prompts = [[5 + i] * 255 for i in range(8)]

    async def ask(service, client):
        asked = {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 5}
        return (await client.post(COMPLETIONS, json=asked)), (await client.get("/health")).status_code

    answer, health = run(ask, engine)
    assert (answer.status_code, health) == (200, 200)
    assert [len(choice["logprobs"]["tokens"]) for choice in answer.json()["choices"]] == [256] * 8


@asynccontextmanager
async def listening(engine: Any, **options: Any) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    """A server of this process that is really connected to, so that answers come piece by piece."""
    chosen, made = ServerOptions(port=0, **options), []
    original = serving.make_app
    patch = pytest.MonkeyPatch()
    patch.setattr(serving, "make_app", lambda service: made.append(service) or original(service))
    engine.warm_up = getattr(engine, "warm_up", lambda: None)
    with serving._listen(chosen) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        work = asyncio.ensure_future(serving._serve("double", chosen, lambda: (engine, lambda: None), listener))
        limits = httpx.Limits(max_connections=None)
        try:
            async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
                while not made or made[0].state == "loading":
                    await asyncio.sleep(0.01)
                yield made[0], client
        finally:
            patch.undo()
            made[0].drain()
            await work


def test_256_streams_hear_of_each_step_before_the_next():
    """So the time between two tokens is the engine's at the client too: none waits for a token of another step."""
    engine, steps, streams = Slots(slots=256), 4, 256
    engine.runs_freely = False

    async def follow(client: httpx.AsyncClient, heard: list[int], i: int) -> str:
        asked, text = {"prompt": "a", "max_tokens": steps, "stream": True}, ""
        async with client.stream("POST", COMPLETIONS, json=asked) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    heard[i] = len(text)
        return text

    async def main() -> list[str]:
        heard = [0] * streams
        async with listening(engine, max_waiting=streams) as (_, client):
            clients = [asyncio.ensure_future(follow(client, heard, i)) for i in range(streams)]
            while len(engine.running) < streams:
                await asyncio.sleep(0.01)
            for step in range(1, steps + 1):
                engine.steps.release()
                while min(heard) < step:  # hangs where a token stays behind
                    await asyncio.sleep(0.01)
                assert max(heard) == step
            return await asyncio.gather(*clients)

    assert asyncio.run(asyncio.wait_for(main(), 200)) == ["a" * steps] * streams


def test_a_template_that_fails_fails_alone():
    engine = Slots()
    engine.tokenizer.chat_template = (
        "{% if messages[0].content == 'bomb' %}{{ 1 / 0 }}{% endif %}{{ messages[0].content }}"
    )
    engine.tokenizer.template_from = "a test"

    async def ask(service, client):
        both = [client.post(CHAT, json={"messages": [{"role": "user", "content": text}], "max_tokens": 3})
                for text in ("bomb", "a")]  # fmt: skip
        return [*await asyncio.gather(*both), await client.get("/health")]

    bad, good, health = run(ask, engine)
    assert (bad.status_code, good.status_code, health.status_code) == (400, 200, 200)
    assert "chat template (a test): division by zero" in bad.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_cannot_be_made_ends_one_answer_only(tokenizer, monkeypatch, stream):
    """And text is made neither on the event loop nor in the engine's thread."""
    import threading

    threads: dict[str, set[str]] = {"read": set(), "made": set()}
    accept, push, encode = Answer.accept, TextStream.push, tokenizer.encode

    def broken(answer, *args):
        if answer.request.prompt[1] == 9 and len(answer.tokens) == 3:
            raise UnicodeError("no such character")
        return accept(answer, *args)

    def pushed(own, token):
        threads["made"].add(threading.current_thread().name.split("_")[0])
        return push(own, token)

    def encoded(text, **more):
        threads["read"].add(threading.current_thread().name.split("_")[0])
        return encode(text, **more)

    monkeypatch.setattr(Answer, "accept", broken)
    monkeypatch.setattr(TextStream, "push", pushed)
    monkeypatch.setattr(tokenizer, "encode", encoded)
    engine = small_engine(tokenizer)

    async def ask(service, client):
        asked = {"max_tokens": 8, "temperature": 0, "stream": stream, "ignore_eos": True}
        both = [client.post(COMPLETIONS, json={**asked, "prompt": prompt}) for prompt in ([5, 9], [5, 8], "God")]
        found = [*await asyncio.gather(*both), await client.get("/health")]
        while service.thread.snapshot.running:
            await asyncio.sleep(0.01)
        return found, service.thread.snapshot.pages_used

    (bad, good, also, health), pages_used = run(ask, engine)
    if stream:
        error = json.loads([line for line in bad.text.splitlines() if line][-1].removeprefix("data: "))["error"]
        assert good.text.rstrip().endswith("data: [DONE]")
    else:
        assert bad.status_code == 500
        error = bad.json()["error"]
    assert (error["message"], error["type"]) == ("no such character", "server_error")
    assert (good.status_code, also.status_code, health.status_code, pages_used) == (200, 200, 200, 0)
    assert threads == {"read": {"text"}, "made": {"detokenize"}}
