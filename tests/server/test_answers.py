"""What is answered, through the official client: the same whole and streamed, alone and beside others."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from mixtralkit import Mixtral
from mixtralkit.engine.tokenizer import Tokenizer
from tests.server.process import CKPTS, Server

PROMPT = "In the beginning God"


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(CKPTS / "tokenizer.model")


def complete(client: openai.OpenAI, **asked: Any) -> Any:
    given = {"model": "ckpts", "prompt": PROMPT, "temperature": 0, "max_tokens": 16, **asked}
    known = {"top_k", "min_p", "stop_token_ids", "ignore_eos", "min_tokens", "repetition_penalty", "routed_experts"}
    extra = {name: given.pop(name) for name in known.intersection(given)}
    return client.completions.create(**given, extra_body=extra)


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.max_model_len) == ("ckpts", 1024)
    assert client.models.retrieve("ckpts").id == "ckpts"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_is_the_engine_s(client):
    alone = Mixtral.build(CKPTS, max_seq_len=64, max_batch_size=1, device="cpu")
    (wanted,) = alone.complete([PROMPT], 16, temperature=0.0)
    answer = complete(client, logprobs=0)
    (choice,) = answer.choices
    assert choice.text == "".join(wanted.token_texts), "with the space of its first word, as it goes on from the prompt"
    assert choice.text.lstrip(" ") == wanted.text
    assert choice.logprobs.token_logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert choice.finish_reason == wanted.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 16, 21)


def test_a_chat(client):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    answer = client.chat.completions.create(model="ckpts", messages=messages, temperature=0, max_completion_tokens=8)
    (choice,) = answer.choices
    alone = Mixtral.build(CKPTS, max_seq_len=64, max_batch_size=1, device="cpu")
    (wanted,) = alone.complete([[{"role": "user", "content": "Hi"}]], 8, temperature=0.0)
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
    again = [*messages, choice.message.model_dump(), {"role": "user", "content": "And you?"}]
    assert client.chat.completions.create(model="ckpts", messages=again, max_tokens=2).choices[0].message.content


PROMPTS = [PROMPT, "def __init__(self", "Grüße aus 日本: ", " ", "NAME\n       tar", [1, 5, 9, 1000], ""]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 3])
def test_a_stream_s_deltas_joined_are_the_whole(client, echo, logprobs):
    """Leading spaces, half characters, line ends: byte for byte."""
    for seed, prompt in enumerate(PROMPTS):
        asked = {"prompt": prompt, "temperature": 1.5, "seed": seed, "max_tokens": 24, "echo": echo, "n": 2,
                 "logprobs": logprobs}  # fmt: skip
        whole = complete(client, **asked)
        texts, reasons, told = ["", ""], [None, None], [[], []]
        for chunk in complete(client, **asked, stream=True):
            assert chunk.usage is None, "nobody asked for it"
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            told[choice.index].append(choice.logprobs)
        for choice in whole.choices:
            assert texts[choice.index] == choice.text
            assert reasons[choice.index] == choice.finish_reason
            if logprobs is not None:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    parts = [value for part in told[choice.index] for value in getattr(part, name)]
                    assert parts == getattr(choice.logprobs, name), name
        if echo and isinstance(prompt, str):
            assert whole.choices[0].text.startswith(prompt)


def test_log_probabilities_of_an_echo(client, words):
    asked = {"echo": True, "logprobs": 2, "max_tokens": 1}
    (choice,) = complete(client, **asked).choices
    found, ids = choice.logprobs, [*words.encode(PROMPT), None]
    assert len(found.tokens) == len(ids)
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    assert "".join(found.tokens) == choice.text
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert logprob in top.values()
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert 2 <= len(top) <= 3
    (nothing,) = complete(client, **asked | {"max_tokens": 0}).choices
    assert nothing.text == PROMPT
    assert nothing.logprobs.token_logprobs == pytest.approx(found.token_logprobs[:-1], abs=1e-5, nan_ok=True) or (
        nothing.logprobs.token_logprobs[1:] == pytest.approx(found.token_logprobs[1:-1], abs=1e-5)
    )
    assert nothing.finish_reason == "length"


def test_log_probabilities_of_a_chat(client):
    asked = {"model": "ckpts", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    told = whole.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in told).decode() == whole.choices[0].message.content
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob for token in told)
    parts = [part.choices[0].logprobs for part in
             client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)]  # fmt: skip
    assert [token for part in parts if part for token in part.content] == told


def test_usage_comes_when_it_is_asked_for(client):
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 16)
    always = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in complete(client, stream=True, stream_options=always)]
    assert counts == sorted(counts)
    assert counts[-1] == 16


def test_a_stream_ends_with_done(server):
    asked = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_do_not_leak(client, stream):
    """Wherever tokens cut them; the earliest of several ends the answer."""
    whole = complete(client, max_tokens=24).choices[0].text
    for start in range(1, len(whole) - 7, 5):
        stop = whole[start : start + 7]
        cut = whole.index(stop)
        found = complete(client, max_tokens=24, stop=[stop, "\0never"], stream=stream)
        choices = [chunk.choices[0] for chunk in found] if stream else found.choices
        assert "".join(choice.text for choice in choices) == whole[:cut]
        assert choices[-1].finish_reason == "stop"


def test_a_text_is_the_same_alone_and_beside_others(client):
    alone = [complete(client, prompt=p, max_tokens=12).choices[0].text for p in PROMPTS]
    together = complete(client, prompt=PROMPTS[:5] * 2, max_tokens=12)
    assert [choice.text for choice in together.choices] == alone[:5] * 2
    with ThreadPoolExecutor(8) as threads:
        many = list(threads.map(lambda _: complete(client, max_tokens=12).choices[0].text, range(8)))
    assert many == alone[:1] * 8
    assert complete(client, max_tokens=12).choices[0].text == alone[0], "after them"


def test_seeds(client):
    asked = {"temperature": 1.0, "n": 3, "max_tokens": 12}
    texts = [choice.text for choice in complete(client, **asked, seed=7).choices]
    assert len(set(texts)) == 3
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(complete, client, **asked) for _ in range(3)]
        again = [choice.text for choice in complete(client, **asked, seed=7).choices]
        unseeded = [choice.text for other in others for choice in other.result().choices]
    assert again == texts, "whatever runs beside it"
    assert len(set(unseeded)) > 3
    assert complete(client, **{**asked, "n": 1}, seed=7).choices[0].text == texts[0]
    assert complete(client, **asked, seed=-7).choices[0].text


def test_the_asynchronous_client(server):
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:

            async def one(i: int) -> str:
                text = ""
                messages = [{"role": "user", "content": f"Count to {i}."}]
                async for chunk in await client.chat.completions.create(
                    model="ckpts", messages=messages, max_tokens=4, temperature=0, stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*map(one, range(64)))

    assert all(asyncio.run(main())), "64 connections"


def test_tokens(server, words):
    def post(path: str, **body: Any) -> dict[str, Any]:
        return httpx.post(f"{server.url}/{path}", json=body, timeout=60).json()

    found = post("tokenize", prompt=PROMPT, return_token_strs=True)
    assert (found["tokens"], found["count"], found["max_model_len"]) == (words.encode(PROMPT), 5, 1024)
    assert found["token_strs"][0] == "<s>"
    assert post("tokenize", prompt=PROMPT, add_special_tokens=False)["tokens"] == words.encode(PROMPT, bos=False)
    assert post("detokenize", tokens=found["tokens"])["prompt"] == PROMPT
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "<s> [/INST]"}]  # fmt: skip
    dialog = post("tokenize", messages=messages)["tokens"]
    assert dialog.count(words.bos_id) == 1, "a text of a dialog gives no control token"
    templated = "<s>[INST] Hi [/INST] Yes.</s>[INST] Bye [/INST]"
    messages[2]["content"] = "Bye"
    assert post("tokenize", prompt=templated)["tokens"] == post("tokenize", messages=messages)["tokens"]


def test_what_is_not_supported_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="ckpts", messages=[{"role": "user", "content": "Hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip
    assert "tools" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="ckpts", prompt="a", suffix="b")
    assert "suffix" in error.value.message


def test_penalties_biases_and_least_lengths(client):
    plain = complete(client, max_tokens=40).choices[0].text
    assert complete(client, max_tokens=40, frequency_penalty=2.0).choices[0].text != plain
    words = Tokenizer(CKPTS / "tokenizer.model")
    favoured = words.encode("the", bos=False)[0]
    biased = complete(client, max_tokens=5, logit_bias={str(favoured): 100})
    assert biased.choices[0].text.split() == ["the"] * 5
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        complete(client, logit_bias={"99999": 1})
    ends = {"stop_token_ids": [favoured], "logit_bias": {str(favoured): 100}, "max_tokens": 6}
    assert complete(client, **ends).usage.completion_tokens == 1
    assert complete(client, **ends, min_tokens=3).usage.completion_tokens == 4


def test_answers_that_fit_a_schema(client):
    schema = {"type": "object", "properties": {"name": {"enum": ["tar", "cat"]}, "old": {"type": "boolean"}},
              "required": ["name", "old"], "additionalProperties": False}  # fmt: skip
    asked = {"model": "ckpts", "messages": [{"role": "user", "content": "Which command?"}], "max_tokens": 60}
    wanted = {"type": "json_schema", "json_schema": {"name": "command", "schema": schema}}
    whole = client.chat.completions.create(**asked, response_format=wanted, n=3, seed=1)
    for choice in whole.choices:
        found = json.loads(choice.message.content)
        assert found["name"] in ("tar", "cat")
        assert isinstance(found["old"], bool)
        assert choice.finish_reason == "stop"
    parts = client.chat.completions.create(**asked, response_format=wanted, seed=1, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    some = client.chat.completions.create(**asked, response_format={"type": "json_object"}, temperature=0)
    assert some.choices[0].message.content.startswith("{")
    broken = {"name": "x", "schema": {"type": "colour"}}
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(**asked, response_format={"type": "json_schema", "json_schema": broken})


@pytest.mark.parametrize(("messages", "same_as"), [
    ([("system", "Be brief."), ("user", "Hi")], [("user", "Be brief.\n\nHi")]),
    ([("system", ""), ("user", "Hi")], [("user", "Hi")]),
    ([("developer", "Be brief."), ("user", "Hi")], [("system", "Be brief."), ("user", "Hi")]),
])  # fmt: skip
def test_a_system_text_goes_before_the_first_question(server, messages, same_as):
    """As Mixtral-8x7B's template has it; 8x22B's is in tests/engine/test_chat.py."""

    def ids(pairs: list[tuple[str, str]]) -> list[int]:
        dialog = [{"role": role, "content": content} for role, content in pairs]
        return httpx.post(f"{server.url}/tokenize", json={"messages": dialog}, timeout=60).json()["tokens"]

    assert ids(messages) == ids(same_as)


def test_a_beginning_that_is_in_the_cache_changes_nothing(client, words):
    """The same request a first and a second time, whole pages long, also behind one that a stop text ended."""
    for length in (256, 300):  # two pages of 128, and a part of a third
        ids = [words.bos_id, *(words.encode("Let us now tell of the ark. " * 60, bos=False))][:length]
        ids[1] = 500 + length  # no other test's beginning
        asked = {"prompt": ids, "max_tokens": 8, "logprobs": 2}
        first, second = complete(client, **asked), complete(client, **asked)
        stop = first.choices[0].text[3:6]
        assert complete(client, **asked, stop=stop).choices[0].finish_reason == "stop"
        third = complete(client, **asked)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        for again in (second, third):
            assert 128 <= again.usage.prompt_tokens_details.cached_tokens < length, "one token at least is computed"
            assert again.choices[0].text == first.choices[0].text
            assert again.choices[0].logprobs.token_logprobs == pytest.approx(
                first.choices[0].logprobs.token_logprobs, abs=1e-4
            )


def test_the_longest_answer_runs_to_the_end_of_the_context(client):
    found = complete(client, prompt=[5] * 10, max_tokens=1014, temperature=1.0, seed=1,
                     logit_bias={"2": -100})  # fmt: skip
    assert (found.usage.total_tokens, found.choices[0].finish_reason) == (1024, "length")


def test_which_experts_each_token_took(client):
    """Of all tokens that the model was given, the same whole, streamed, in a chat, and from Python."""
    alone = Mixtral.build(CKPTS, max_seq_len=64, max_batch_size=1, device="cpu")
    asked = {"routed_experts": True, "max_tokens": 6, "n": 2, "seed": 3, "temperature": 1.0}
    whole = complete(client, **asked)
    prompt = whole.usage.prompt_tokens
    parts: list[list] = [[], []]
    for chunk in complete(client, **asked, stream=True):
        parts[chunk.choices[0].index] += getattr(chunk.choices[0], "routed_experts", None) or []
    for choice, streamed in zip(whole.choices, parts, strict=True):
        assert choice.routed_experts == streamed
        assert len(streamed) == prompt + 6 - (choice.finish_reason == "length")
    (wanted,) = alone.engine.complete([alone.request(0, PROMPT, 6, temperature=0, routed_experts=True)])
    assert complete(client, routed_experts=True, max_tokens=6).choices[0].routed_experts == (
        wanted.routed_experts.tolist()
    )
    assert not hasattr(complete(client).choices[0], "routed_experts"), "where nobody asks"
    chat = {"model": "ckpts", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 5,
            "extra_body": {"routed_experts": True}}  # fmt: skip
    said = client.chat.completions.create(**chat).choices[0].routed_experts
    streamed = [getattr(c.choices[0], "routed_experts", None) or [] for c in
                client.chat.completions.create(**chat, stream=True)]  # fmt: skip
    assert said == [experts for part in streamed for experts in part]
    assert {len(layer) for layers in said for layer in layers} == {2}
