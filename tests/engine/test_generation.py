"""The generation loop against the plain loop: run the whole sequence again for every token."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions, sample, uniform
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.mixtral import Mixtral
from tests.engine.parts import VOCAB_SIZE, engine_config, make_model, make_tokenizer
from tests.ranks import run_ranks

GREEDY = SamplingOptions(temperature=0)
WARM = SamplingOptions(temperature=0.8, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return make_model(RankContext(), engine_config())


def some_requests(count: int, sampling: SamplingOptions, longest: int = 40, **more) -> list[Request]:
    rng = random.Random(count)
    prompts = [tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, longest))) for _ in range(count)]
    return [Request(i, prompt, rng.randint(1, 16), sampling, **more) for i, prompt in enumerate(prompts)]


def plain(model, request: Request) -> tuple[list[int], list[float], list[float], str]:
    """Tokens, their log-probabilities, the prompt's, and the reason, by the slow loop."""
    ids, logprobs, reason = list(request.prompt), [], "length"
    limit = min(request.max_gen_len, model.params.max_seq_len - len(ids))
    with torch.no_grad():
        scored = model.train_logits(torch.tensor([ids]))[0][0].float().log_softmax(-1)
    prompt_logprobs = [0.0] + [float(scored[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    while len(logprobs) < limit:
        with torch.no_grad():
            last = model.train_logits(torch.tensor([ids]))[0][0, -1:].float()
        token, logprob = sample(last, [request.sampling], [uniform(request.sampling.seed, request.id, len(ids))])
        if int(token) == 2:
            reason = "stop"
            break
        ids.append(int(token))
        logprobs.append(float(logprob))
    return ids[len(request.prompt) :], logprobs, prompt_logprobs, reason


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prefill_budget", [7, 4096])
def test_answers_are_those_of_the_plain_loop(model, tokenizer, sampling, prefill_budget):
    requests = some_requests(9, sampling, prompt_logprobs=True)
    completions = Engine(model, tokenizer, prefill_budget).complete(requests)
    for request, c in zip(requests, completions, strict=True):
        tokens, logprobs, prompt_logprobs, reason = plain(model, request)
        assert (c.id, c.tokens, c.finish_reason) == (request.id, tokens, reason)
        assert c.text == tokenizer.decode(tokens)
        assert c.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert c.prompt_logprobs == pytest.approx(prompt_logprobs, abs=1e-4)


def test_any_company_and_any_order_give_the_same_answers(model, tokenizer):
    requests = some_requests(7, WARM)
    engine = Engine(model, tokenizer)
    alone = [engine.complete([request])[0].tokens for request in requests]
    assert [c.tokens for c in engine.complete(requests)] == alone
    assert [c.tokens for c in engine.complete(requests[::-1])][::-1] == alone
    small = Engine(make_model(RankContext(), engine_config(max_batch_size=1)), tokenizer, prefill_budget=5)
    assert [c.tokens for c in small.complete(requests)] == alone


def test_the_end_token_ends_an_answer_and_is_not_part_of_it(model, tokenizer):
    request = Request(0, (1, 50, 60), 60, SamplingOptions(temperature=3.0, top_p=1.0))
    found = next(
        c
        for c in (
            Engine(model, tokenizer).complete([Request(i, request.prompt, 60, request.sampling)])[0] for i in range(300)
        )
        if c.finish_reason == "stop"
    )
    assert 2 not in found.tokens
    assert len(found.tokens) == len(found.logprobs) < 60


def test_a_stop_string_ends_an_answer_before_itself(model, tokenizer):
    whole = Engine(model, tokenizer).complete([Request(0, (1, 50, 60), 16, GREEDY)])[0]
    stop = whole.text[5:8]
    cut = Engine(model, tokenizer).complete([Request(0, (1, 50, 60), 16, GREEDY, stop=(stop, "never there"))])[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert stop in tokenizer.decode(cut.tokens)


def test_events_join_to_the_text_and_the_last_one_says_why(model, tokenizer):
    requests = some_requests(6, WARM)
    events = list(Engine(model, tokenizer).run(requests))
    for request in requests:
        own = [event for event in events if event.id == request.id]
        assert "".join(event.text for event in own) == own[-1].completion.text
        assert [event.finish_reason is None for event in own] == [True] * (len(own) - 1) + [False]


def test_max_seq_len_and_zero_tokens_end_with_length(model, tokenizer):
    full = tuple(range(3, 67))
    requests = [Request(0, full, 9, GREEDY), Request(1, full[:-3], 9, GREEDY), Request(2, (5, 6), 0, GREEDY)]
    completions = Engine(model, tokenizer).complete(requests)
    assert [len(c.tokens) for c in completions] == [0, 3, 0]
    assert {c.finish_reason for c in completions} == {"length"}


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(model, tokenizer):
    with pytest.raises(ValueError, match="prompt 1 has 65 tokens, more than max_seq_len \\(64\\)"):
        Engine(model, tokenizer).run([Request(0, (5,), 3), Request(1, (5,) * 65, 3)])


def test_interrupting_ends_every_answer(model, tokenizer):
    asked = itertools.count()
    requests = [Request(i, (5, 6, 7 + i), 30, WARM) for i in range(6)]
    events = list(Engine(model, tokenizer).run(requests, should_stop=lambda: next(asked) == 3))
    ends = {event.id: event.completion for event in events if event.finish_reason}
    assert {c.finish_reason for c in ends.values()} == {"interrupted"}
    assert [len(ends[i].tokens) for i in range(6)] == [3, 3, 3, 3, 0, 0]


def test_logits_that_are_not_finite_are_an_error(tokenizer):
    model = make_model(RankContext(), engine_config())
    model.norm.weight.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="prompt 0 at position 2 in torch"):
        Engine(model, tokenizer).complete([Request(0, (5, 6), 4, GREEDY)])


def test_a_tokenizer_of_another_model_is_an_error(tokenizer):
    model = make_model(RankContext(), engine_config(vocab_size=100))
    with pytest.raises(ValueError, match=f"has {VOCAB_SIZE} tokens, but the model's vocab_size is 100"):
        Mixtral.from_parts(model, tokenizer)


def _answers(context, folder, ways):
    return [_answers_within(context, folder, *way) for way in ways]


def _answers_within(context, folder, attention, experts, max_batch_size, prefill_budget):
    model = make_model(context, engine_config(max_batch_size=max_batch_size), attention, experts)
    engine = Engine(model, Tokenizer(folder / "tokenizer.model"), prefill_budget)
    requests = some_requests(4, GREEDY, 24, prompt_logprobs=True) + [
        Request(4 + r.id, r.prompt, r.max_gen_len, WARM) for r in some_requests(4, WARM, 24)
    ]
    completions = engine.complete(requests)
    return [(c.tokens, c.finish_reason, c.logprobs, c.prompt_logprobs) for c in completions]


@pytest.mark.parametrize("world_size", [2, 4])
def test_answers_are_the_same_on_any_ranks(tmp_path, world_size):
    make_tokenizer(tmp_path)
    alone = _answers_within(RankContext(), tmp_path, "tp", "ep", 4, 4096)
    ways = [way + limits for way in itertools.product(("tp", "dp"), ("tp", "ep")) for limits in ((8, 4096), (3, 16))]
    ranks = run_ranks(_answers, world_size, tmp_path, ways)
    for way, answers in [found for rank in ranks for found in zip(ways, rank, strict=True)]:
        assert [answer[:2] for answer in answers] == [answer[:2] for answer in alone], way
        for answer, expected in zip(answers, alone, strict=True):
            assert answer[2] == pytest.approx(expected[2], abs=1e-4)
            assert (answer[3] or []) == pytest.approx(expected[3] or [], abs=1e-4)


def _interrupted(context, folder, attention):
    model = make_model(context, engine_config(), attention)
    asked = itertools.count()
    requests = [Request(i, (5, 6, 7 + i), 30, WARM) for i in range(3)]
    wish = (lambda: next(asked) == 4) if context.is_first else (lambda: False)
    engine = Engine(model, Tokenizer(folder / "tokenizer.model"))
    events = [e for e in engine.run(requests, should_stop=wish) if e.completion]
    again = engine.complete(requests[:1])[0].tokens
    return [(e.id, e.completion.tokens, e.finish_reason) for e in events], again


@pytest.mark.parametrize("attention", ["tp", "dp"])
def test_rank_0_interrupts_all_ranks_together(tmp_path, attention):
    make_tokenizer(tmp_path)
    first, second = run_ranks(_interrupted, 2, tmp_path, attention)
    assert first == second
    events, again = first
    assert {reason for _, _, reason in events} == {"interrupted"}
    assert all(tokens and len(tokens) < 30 for _, tokens, _ in events)
    assert all(len(again) > len(tokens) for _, tokens, _ in events)


def test_runs_of_one_engine_never_mix(model, tokenizer):
    """A call while a stream was open, or from two threads, gave texts made of both requests."""
    requests = [some_requests(1, GREEDY, longest=n)[0] for n in (7, 30)]
    alone = [Engine(model, tokenizer).complete([request])[0].tokens for request in requests]
    engine = Engine(model, tokenizer)
    stream = engine.run([requests[0]])
    events = [next(stream)]
    assert engine.complete([requests[1]])[0].tokens == alone[1]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(engine.complete, [requests[1]])
        events += stream
        assert waiting.result(60)[0].tokens == alone[1]
        assert events[-1].completion.tokens == alone[0]
        several = [pool.submit(engine.complete, [requests[i % 2]]) for i in range(6)]
        assert [f.result(60)[0].tokens for f in several] == alone * 3
    opened = engine.run([requests[0]])
    next(opened)
    opened.close()
    assert engine.complete([requests[1]])[0].tokens == alone[1]


def test_a_step_takes_no_events(model, tokenizer):
    """What asks a model for answers while it makes a step would wait for itself."""
    engine = Engine(model, tokenizer)
    request = Request(0, (5, 6), 4, GREEDY)
    with pytest.raises(RuntimeError, match="a step of this model is being made by this thread"):
        list(engine.run([request], should_stop=lambda: bool(engine.complete([request]))))
    assert len(engine.complete([request])[0].tokens) == 4
