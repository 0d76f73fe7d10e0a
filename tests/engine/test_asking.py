"""What requests ask of their logits, through the engine: as one sequence alone, whoever runs beside it and wherever."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import Asked, SamplingOptions, SlotRules, sample_each, settings_of, uniform
from mixtralkit.engine.tokenizer import Tokenizer
from tests.engine.parts import VOCAB_SIZE, engine_config, make_model
from tests.engine.test_slot_rules import slow
from tests.ranks import run_ranks

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def asking_requests(count: int, temperatures=(0.0, 0.0, 1.5)) -> list[Request]:
    """Every third asks for nothing, and some for a schema."""
    rng, requests = random.Random(1), []
    for i in range(count):
        sampling = SamplingOptions(temperature=rng.choice(temperatures), top_p=1.0, seed=i)
        more = {}
        if i % 3 == 1:
            sampling = replace(
                sampling, presence_penalty=rng.choice([0, 1.5]), frequency_penalty=rng.choice([-1, 0, 0.8]),
                repetition_penalty=rng.choice([1, 1.7]),
                logit_bias={rng.randrange(VOCAB_SIZE): 4, 2: rng.choice([0, 9])},
            )  # fmt: skip
            more = {"min_tokens": rng.choice([0, 6])}
        elif i % 3 == 2:
            more = {"json_schema": json.dumps(SCHEMA)}
        prompt = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 20)))
        requests.append(Request(i, prompt, rng.randint(5, 40), sampling, **more))
    return requests


def told(completions) -> list[tuple]:
    return [(c.id, c.tokens, c.text, c.finish_reason) for c in completions]


def test_greedy_answers_are_those_of_the_definition(tokenizer):
    """Each token from the logits of a whole forward, changed by a plain Python loop."""
    model, plain = (make_model(RankContext(), engine_config()) for _ in range(2))
    requests = [r for r in asking_requests(16, (0.0,)) if r.json_schema is None]
    assert sum(r.asks for r in requests) >= 4
    for request, got in zip(requests, Engine(model, tokenizer).complete(requests), strict=True):
        ids = list(request.prompt)
        ends = tuple(tokenizer.end_ids)
        for token, logprob in zip([*got.tokens, got.end_token], [*got.logprobs, None], strict=True):
            if token is None:
                break
            logits_V = plain.forward(torch.tensor([ids]))[0, -1]
            asked = Asked(request.sampling, request.prompt, tuple(ids[len(request.prompt) :]), request.min_tokens, ends)
            changed = torch.tensor(slow(logits_V.tolist(), asked, len(ids) - 1))
            assert changed[token] >= changed.max() - 1e-3
            assert logprob is None or logprob == pytest.approx(float(logits_V.log_softmax(-1)[token]), abs=1e-4)
            ids.append(token)


def test_answers_depend_on_nobody_else(tokenizer):
    """In any company, with few pages, where sequences lose theirs and are computed again, and with reused prefixes."""
    model = make_model(RankContext(), engine_config(max_batch_size=6))
    requests = asking_requests(20)
    alone = [Engine(model, tokenizer, prefix_reuse=False).complete([request])[0] for request in requests]
    engine = Engine(model, tokenizer, prefill_budget=30)
    assert told(engine.complete(requests)) == told(alone)
    assert told(engine.complete(requests)) == told(alone)  # prefixes are known, slots have had others
    model.allocate_cache(16, pages=6)
    engine = Engine(model, tokenizer, prefill_budget=30)
    assert told(engine.complete(requests)) == told(alone)
    assert engine.snapshot().preemptions > 0
    for i in range(1, 20, 3):
        unasked = SamplingOptions(requests[i].sampling.temperature, 1.0, seed=i)
        requests[i] = replace(requests[i], sampling=unasked, min_tokens=0)
    changed = [one != other for one, other in zip(told(engine.complete(requests)), told(alone), strict=True)]
    assert sum(changed) > 3
    assert not any(changed[i] for i in range(20) if i % 3 != 1)


def test_answers_to_a_schema_fit_it(tokenizer):
    model = make_model(RankContext(), engine_config())
    schema, draws = json.dumps(SCHEMA), [SamplingOptions(temperature=t, top_p=1.0) for t in (0.0, 1.0)]
    requests = [Request(i, (1, 5 + i), 60, draws[i % 2], json_schema=schema) for i in range(6)]
    beside = [Request(6 + i, (1, 9 + i), 50, SamplingOptions(temperature=0)) for i in range(3)]
    answers = Engine(model, tokenizer).complete([*requests, *beside])
    assert told(answers[6:]) == told(Engine(model, tokenizer).complete(beside))
    for answer in answers[:6]:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        assert "".join(answer.texts) == answer.text


def test_no_end_token_comes_before_the_least_number_of_tokens(tokenizer):
    model, end = make_model(RankContext(), engine_config()), 2
    wants = SamplingOptions(temperature=0, logit_bias={end: 100})
    requests = [Request(i, (1, 7), 20, wants, min_tokens=n) for i, n in enumerate((0, 1, 7, 20, 50))]
    requests.append(Request(5, (1, 7), 20, replace(wants, logit_bias={9: 100}), stop_token_ids=(9,), min_tokens=4))
    answers = Engine(model, tokenizer).complete(requests)
    assert [len(a.tokens) for a in answers] == [0, 1, 7, 20, 20, 4]
    assert [a.finish_reason for a in answers] == ["stop", "stop", "stop", "length", "length", "stop"]


def test_steps_without_asking_do_without_rules(tokenizer):
    """And nothing is allocated for them; a request that asks makes the rules, which stay."""
    engine = Engine(make_model(RankContext(), engine_config()), tokenizer)
    plain = [Request(i, (5, 6 + i), 6, SamplingOptions(temperature=0.5 * i)) for i in range(3)]
    wanted = told(engine.complete(plain))
    assert engine._runner._rules is None
    engine.complete([replace(plain[0], sampling=SamplingOptions(presence_penalty=1.0))])
    rules = engine._runner._rules
    adjusted, calls = rules.adjusted, []
    rules.adjusted = lambda *given: calls.append(1) or adjusted(*given)
    assert told(engine.complete(plain)) == wanted
    assert not calls


def _over_ranks(context: RankContext, folder: Path, attention: str) -> list[tuple]:
    model = make_model(context, engine_config(max_batch_size=6), attention)
    return told(Engine(model, Tokenizer(folder / "tokenizer.model"), prefill_budget=30).complete(asking_requests(13)))


@pytest.mark.parametrize("attention", ["tp", "dp"])
def test_several_ranks_give_one_ranks_answers(folder, attention):
    wanted = _over_ranks(RankContext(), folder, "tp")
    assert run_ranks(_over_ranks, 2, folder, attention) == [wanted] * 2


def test_drawn_tokens_depend_on_seed_request_and_position(tokenizer):
    """The number that draws a token is the same whatever is asked; so is what it draws where nothing is left to it."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(3, VOCAB_SIZE, generator=generator)
    kept = SlotRules(3, VOCAB_SIZE, torch.device("cpu"))
    kept.place(0, Asked(SamplingOptions(presence_penalty=2.0), (1,)))  # of an answer without tokens: changes nothing
    hot = torch.tensor(settings_of([SamplingOptions(temperature=1.0, top_p=1.0)] * 3))
    numbers = torch.tensor([uniform(7, 3, 9)] * 3)
    slots_N = torch.tensor([0, 1, 2])
    plain_N, _ = sample_each(logits_NV, hot, numbers)
    asked_N, _ = sample_each(logits_NV, hot, numbers, kept.adjusted(logits_NV, slots_N, slots_N))
    assert torch.equal(plain_N, asked_N)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling": SamplingOptions(logit_bias={VOCAB_SIZE: 1})}, f"logit_bias names token {VOCAB_SIZE}"),
        ({"json_schema": '{"type": "strange"}'}, "json_schema .*strange"),
        ({"json_schema": "{}", "min_tokens": 3}, "json_schema needs an answer that ends where it fits"),
        ({"json_schema": "{}", "ignore_eos": True}, "json_schema needs an answer that ends where it fits"),
        ({"min_tokens": -1}, r"min_tokens \(-1\) must be"),
        ({"min_tokens": True}, r"min_tokens \(True\) must be"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tokenizer, changes, says):
    engine = Engine(make_model(RankContext(), engine_config()), tokenizer)
    with pytest.raises(ValueError, match=says):
        engine.run([Request(0, (1, 2), 5), Request(**{"id": 1, "prompt": (1, 2), "max_gen_len": 5, **changes})])
