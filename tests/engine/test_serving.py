"""Requests that come and go while others run: every answer is that of the request alone, and no page is lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixtralkit.distributed import RankContext, RankFailed
from mixtralkit.engine.control import Control
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Abort, Completion, Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.mixtral import Mixtral
from tests.engine.parts import VOCAB_SIZE, engine_config, make_model
from tests.ranks import RankError, run_ranks

GREEDY = SamplingOptions(temperature=0)
WARM = SamplingOptions(temperature=0.8, top_p=0.95, seed=11)
PAGE = 16
COMMON = tuple(random.Random(0).randrange(3, VOCAB_SIZE) for _ in range(2 * PAGE))


def small(context: RankContext, attention: str = "tp", experts: str = "ep", slots: int = 4, pages: int | None = None):
    """A model with a cache of ``pages`` on each rank."""
    model = make_model(context, engine_config(max_batch_size=slots), attention, experts)
    model.allocate_cache(PAGE, pages)
    return model


@pytest.fixture(scope="module")
def model():
    return small(RankContext())


def many_requests(count: int, seed: int = 0) -> list[Request]:
    """Greedy and drawn ones; half of them begin alike, some with exactly whole pages."""
    rng, requests = random.Random(seed), []
    for i in range(count):
        own = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 20)))
        prompt = rng.choice([own, own, COMMON + own[: rng.randint(0, 9)], COMMON[:PAGE] + own])
        requests.append(Request(i, prompt, rng.randint(0, 24), rng.choice([GREEDY, WARM]), rng.choice([(), ("e",)])))
    return requests


def alone(tokenizer: Tokenizer, requests: list[Request]) -> dict[int, Completion]:
    """Each by itself on one rank, from an empty cache."""
    engine = Engine(small(RankContext()), tokenizer, prefix_reuse=False)
    return {request.id: engine.complete([request])[0] for request in requests}


def told(done: Completion) -> tuple:
    return done.tokens, done.text, done.finish_reason


class Script:
    """What comes at which poll: an ``Arrivals`` without a clock."""

    def __init__(self, steps: dict[int, list[Request | Abort]]) -> None:
        self.steps, self.polls = steps, 0

    @classmethod
    def at_random(cls, requests: list[Request], seed: int, within: int) -> Script:
        rng, steps = random.Random(seed), {}
        for request in rng.sample(requests, len(requests)):
            steps.setdefault(rng.randrange(within), []).append(request)
        return cls(steps)

    def poll(self, wait: bool) -> list[Request | Abort] | None:
        self.polls += 1
        return None if self.polls > max(self.steps) + 1 else self.steps.get(self.polls - 1, [])


def served(engine: Engine, script) -> dict[int, Completion]:
    done = {}
    for events in engine.serve(script):
        assert events
        done |= {event.id: event.completion for event in events if event.completion is not None}
    return done


def assert_all_free(engine: Engine) -> None:
    found = engine.snapshot()
    assert (found.running, found.waiting, found.pages_used, found.busy_since) == (0, 0, 0, None)


@pytest.mark.parametrize(("slots", "pages", "budget"), [(4, None, 4096), (4, 5, 24), (6, 6, 30)])
def test_answers_are_those_of_each_request_alone(tokenizer, slots, pages, budget):
    """Whatever else runs, in any order of arrival, with pools so small that sequences are preempted."""
    requests = many_requests(30)
    wanted = alone(tokenizer, requests)
    engine = Engine(small(RankContext(), slots=slots, pages=pages), tokenizer, budget, mixed_budget=9)
    for seed in range(2):
        done = served(engine, Script.at_random(requests, seed, 60))
        assert {id: told(one) for id, one in done.items()} == {id: told(one) for id, one in wanted.items()}
        for id, one in done.items():
            assert one.logprobs == pytest.approx(wanted[id].logprobs, abs=1e-4)
        assert_all_free(engine)
    assert engine.snapshot().prefix_hits > 0
    assert (engine.snapshot().preemptions > 0) == (pages is not None)


def _over_ranks(context: RankContext, folder: Path, attention: str, experts: str, pages: int) -> tuple:
    """The same by ``serve`` on rank 0 with others that follow, by a run from an iterator, and by two open runs."""
    tokenizer, requests = Tokenizer(folder / "tokenizer.model"), many_requests(10)
    engine = Engine(small(context, attention, experts, 4, pages), tokenizer, 24, mixed_budget=9)
    live = served(engine, Script.at_random(requests, 3, 20) if context.is_first else None)
    asked = iter(requests)
    lazy = {done.id: told(done) for done in (e.completion for e in engine.run(asked)) if done is not None}
    runs = [engine.run(requests[:5]), engine.run(requests[5:])]
    both: dict[int, tuple] = {}
    while runs:  # an event of each in turn
        for run in list(runs):
            event = next(run, None)
            if event is None:
                runs.remove(run)
            elif event.completion is not None:
                both[event.id] = told(event.completion)
    found = engine.snapshot()
    return {id: told(one) for id, one in live.items()}, lazy, both, (found.pages_used, found.preemptions)


@pytest.mark.parametrize(
    ("world_size", "attention", "experts"), [(2, "dp", "ep"), (2, "tp", "tp"), (4, "dp", "tp"), (4, "tp", "ep")]
)
def test_several_ranks_give_the_same(folder, tokenizer, world_size, attention, experts):
    wanted = {id: told(one) for id, one in alone(tokenizer, many_requests(10)).items()}
    answers = run_ranks(_over_ranks, world_size, folder, attention, experts, 5)
    for rank, (live, lazy, both, _) in enumerate(answers):
        assert live == ({} if rank else wanted)
        assert lazy == wanted
        assert both == wanted
    used, preemptions = answers[0][3]
    assert used == 0
    assert preemptions > 0 or (attention, world_size) == ("dp", 4)  # which has one slot a rank


def test_a_prompt_that_is_wholly_known_gives_the_same_text_and_logprobs(tokenizer, model):
    """Also of exactly whole pages, of which a token is left to compute, and after an answer that a stop text ended."""
    engine = Engine(model, tokenizer)
    for prompt in (COMMON, COMMON[:-1], (*COMMON, 9)):
        request = Request(0, prompt, 12, GREEDY)
        engine.forget_prefixes()
        first, second = (engine.complete([request])[0] for _ in range(2))
        assert (first.cached_tokens, second.cached_tokens) == (0, (len(prompt) - 1) // PAGE * PAGE)
        assert told(second) == told(first)
        assert second.logprobs == pytest.approx(first.logprobs, abs=1e-4)
        stopped = engine.complete([replace(request, stop=(first.text[3:5],))])[0]
        assert stopped.finish_reason == "stop"
        assert told(engine.complete([request])[0]) == told(first)


def test_one_prompt_gives_one_text_in_all_slots_beside_others_and_after_them(tokenizer):
    engine = Engine(small(RankContext(), slots=8), tokenizer)
    request = Request(0, (*COMMON, 9), 14, GREEDY)
    wanted = told(alone(tokenizer, [request])[0])
    same = [replace(request, id=i) for i in range(8)]
    assert [told(done) for done in engine.complete(same)] == [wanted] * 8
    mixed = [replace(one, id=10 + one.id) for one in many_requests(12, seed=2)]
    beside = {done.id: done for done in engine.complete([*mixed[:6], request, *mixed[6:]])}
    assert told(beside[0]) == wanted
    assert told(engine.complete([request])[0]) == wanted


def test_a_dialog_goes_on_from_its_own_answer(tokenizer, model):
    engine = Engine(model, tokenizer)
    engine.forget_prefixes()
    first = engine.complete([Request(0, COMMON, 20, GREEDY)])[0]
    again = engine.complete([Request(0, (*COMMON, *first.tokens, 7), 4, GREEDY)])[0]
    assert again.cached_tokens == 3 * PAGE  # 32 + 20 tokens, of which the last one was never computed


def test_scores_of_a_prompt_are_computed_though_it_is_known(tokenizer, model):
    engine = Engine(model, tokenizer)
    request = Request(0, (*COMMON, 8, 9), 3, GREEDY, prompt_logprobs=True, top_logprobs=3)
    first = engine.complete([request])[0]
    engine.complete([replace(request, prompt_logprobs=False)])
    again = engine.complete([request])[0]
    assert again.cached_tokens == 0
    assert again.prompt_logprobs == pytest.approx(first.prompt_logprobs, abs=1e-4)


def test_the_likeliest_tokens_are_those_of_the_model(tokenizer, model):
    requests = [
        Request(0, COMMON[:9], 5, WARM, prompt_logprobs=True, top_logprobs=4),
        Request(1, COMMON[:7], 5, GREEDY),
        Request(2, COMMON[3:9], 4, GREEDY, top_logprobs=2),
    ]
    for done, request in zip(Engine(model, tokenizer).complete(requests), requests, strict=True):
        if not request.top_logprobs:
            assert done.top_logprobs is None
            continue
        ids = [*request.prompt, *done.tokens]
        with torch.no_grad():
            scores_TV = model.train_logits(torch.tensor([ids]))[0][0].float().log_softmax(-1)
        tops = [*(done.prompt_top_logprobs or [()] * len(request.prompt)), *done.top_logprobs]
        first = 1 if request.prompt_logprobs else len(request.prompt)
        for place in range(first, len(ids)):
            values, wanted = scores_TV[place - 1].topk(request.top_logprobs)
            assert [id for id, _ in tops[place]] == wanted.tolist()
            assert [value for _, value in tops[place]] == pytest.approx(values.tolist(), abs=1e-4)


def test_events_carry_every_token_once(tokenizer, model):
    requests = [Request(i, COMMON[: 3 + i], 20, WARM, (("th",), ())[i % 2], logprobs=True) for i in range(8)]
    events = list(Engine(model, tokenizer).run(requests))
    for request in requests:
        own = [event for event in events if event.id == request.id]
        done = own[-1].completion
        tokens = [token for event in own for token in event.tokens]
        assert [token.id for token in tokens] == done.tokens
        assert [token.logprob for token in tokens] == done.logprobs
        assert "".join(token.text for token in tokens) == done.text == "".join(event.text for event in own)


def test_draws_depend_on_the_seed_and_the_draw_id_alone(tokenizer, model):
    engine = Engine(model, tokenizer)
    seeded = Request(77, COMMON[:5], 12, WARM, draw_id=3)
    wanted = engine.complete([Request(3, COMMON[:5], 12, WARM)])[0].tokens
    others = [Request(i, COMMON[i : i + 9], 9, replace(WARM, seed=i)) for i in range(5)]
    assert engine.complete([*others, seeded])[-1].tokens == wanted
    assert engine.complete([replace(seeded, draw_id=4)])[0].tokens != wanted


@pytest.mark.parametrize("at", [0, 1, 2, 3, 6, 12])
def test_a_hundred_aborts_at_once_leave_nothing_behind(tokenizer, at):
    """While they wait, while their prompts run and while they decode; what else runs is undisturbed."""
    engine = Engine(small(RankContext(), slots=6, pages=20), tokenizer, 24, mixed_budget=9)
    stays = [Request(1000 + i, COMMON[: 4 + i], 20, WARM) for i in range(2)]
    wanted = {request.id: told(engine.complete([request])[0]) for request in stays}
    goes = [Request(i, COMMON[: 1 + i % 30], 30, GREEDY) for i in range(100)]
    aborts = [Abort(request.id) for request in goes]
    steps = {0: [stays[0], *goes, stays[1]]}
    steps[at] = [*steps.get(at, []), *aborts]
    done = served(engine, Script(steps))
    assert {id: told(done[id]) for id in wanted} == wanted
    assert {done[request.id].finish_reason for request in goes} <= {"aborted", "stop"}
    assert sum(done[request.id].finish_reason == "aborted" for request in goes) > 80
    assert_all_free(engine)


def test_an_abort_of_what_has_ended_or_never_came_is_nothing(tokenizer, model):
    done = served(Engine(model, tokenizer), Script({0: [Request(0, (5, 6), 2, GREEDY)], 9: [Abort(0), Abort(5)]}))
    assert list(done) == [0]


def test_what_can_never_run_is_refused_at_once_with_a_sentence(tokenizer):
    engine = Engine(small(RankContext(), pages=3), tokenizer)  # 48 tokens, of a max_seq_len of 64
    wrong = [Request(0, (5,) * 65, 3), Request(1, (5,) * 49, 3), Request(2, (VOCAB_SIZE,), 3), Request(3, (), 1)]
    said = {}
    for events in engine.serve(
        Script({0: [*wrong, Request(4, (5,) * 48, 3, GREEDY), Request(5, (5,) * 10, 99, GREEDY)]})
    ):
        said |= {event.id: event for event in events if event.finish_reason}
    assert "more than max_seq_len (64)" in said[0].error
    assert said[1].error == "prompt 1 has 49 tokens, more than the cache holds (48)"
    assert "token ids outside" in said[2].error
    assert said[3].error == "prompt 3 is empty"
    assert [said[i].finish_reason for i in range(6)] == ["error"] * 4 + ["length"] * 2
    assert [len(said[i].completion.tokens) for i in (4, 5)] == [0, 38]  # as far as the pool goes
    with pytest.raises(ValueError, match=r"more than the cache holds \(48\)"):
        engine.check(wrong[1])
    with pytest.raises(ValueError, match=r"prompt 1 has 49"):
        engine.run(wrong[1:2])


def test_an_exception_in_one_request_ends_that_request_only(tokenizer, model, monkeypatch):
    """Its tokeniser fails in the middle of its text, and again when the rest is asked for."""
    from mixtralkit.engine.requests import Answer

    accept, finish = Answer.accept, Answer.finish

    def broken(answer, *args):
        if answer.request.id == 1 and len(answer.tokens) == 3:
            raise UnicodeError("no such character")
        return accept(answer, *args)

    def broken_end(answer, reason, *args, **more):
        if reason == "error":
            raise UnicodeError("still not")
        return finish(answer, reason, *args, **more)

    requests = [Request(i, (5, 6 + i), 8, GREEDY) for i in range(3)]
    wanted = [told(done) for done in Engine(model, tokenizer).complete(requests)]
    monkeypatch.setattr(Answer, "accept", broken)
    monkeypatch.setattr(Answer, "finish", broken_end)
    engine = Engine(model, tokenizer)
    ends = {}
    for events in engine.serve(Script({0: requests})):
        ends |= {event.id: event for event in events if event.finish_reason}
    assert (ends[1].finish_reason, ends[1].error) == ("error", "no such character")
    assert [told(ends[i].completion) for i in (0, 2)] == [wanted[0], wanted[2]]
    assert_all_free(engine)
    # in a run it is the run's error, and another open run goes on
    other = engine.run([requests[0]])
    first = next(other)
    with pytest.raises(UnicodeError, match="no such character"):
        engine.complete(requests)
    assert told([first, *other][-1].completion) == wanted[0]
    assert_all_free(engine)


def test_two_streams_of_one_model_are_open_at_once(tokenizer, model):
    """The second raised: both would have taken slot 0."""
    mixtral = Mixtral.from_parts(model, tokenizer)
    prompts = [[5, 6, 7], [8, 9]]
    wanted = [c.text for c in mixtral.complete(prompts, 12, temperature=0)]
    streams = [mixtral.stream([prompt], 12, temperature=0) for prompt in prompts]
    texts = ["", ""]
    for _ in range(40):
        for i, stream in enumerate(streams):
            texts[i] += getattr(next(stream, None), "text", "")
    assert texts == wanted
    assert mixtral.engine.snapshot().steps < 3 * 13, "they ran together"


def test_requests_of_an_iterator_are_taken_as_there_is_room(tokenizer, model):
    mixtral, taken = Mixtral.from_parts(model, tokenizer), []

    def endless() -> Iterator[Request]:
        while True:
            taken.append(len(taken))
            yield mixtral.request(taken[-1], [5, 6 + len(taken) % 50], 5, temperature=0)

    answers = mixtral.generate_many(endless())
    first = [next(answers) for _ in range(10)]
    assert sorted(done.id for done in first)[:8] == list(range(8))
    assert len(taken) < 10 + 3 * 4 + 1
    answers.close()
    assert_all_free(mixtral.engine)
    with pytest.raises(ValueError, match="prompt 1 has token ids outside"):
        list(mixtral.generate_many(iter([Request(0, (5,), 3), Request(1, (VOCAB_SIZE,), 3)])))
    assert_all_free(mixtral.engine)


def test_a_run_that_stops_leaves_the_others(tokenizer, model):
    engine = Engine(model, tokenizer)
    request = Request(0, (5, 6, 7), 30, GREEDY)
    wanted = told(engine.complete([request])[0])
    going, asked = engine.run([request]), iter(range(100))
    next(going)
    stopped = [e.completion for e in engine.run([request], lambda: next(asked) == 4) if e.completion]
    assert stopped[0].finish_reason == "interrupted"
    assert 3 <= len(stopped[0].tokens) <= 5
    assert told([*going][-1].completion) == wanted


def test_threads_share_steps(tokenizer, model):
    engine = Engine(model, tokenizer)
    requests = many_requests(6, seed=4)
    wanted = [told(done) for done in engine.complete(requests)]
    found: dict[int, tuple] = {}

    def ask(i: int) -> None:
        found[i] = told(engine.complete([requests[i]])[0])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(6)] == wanted


def test_a_snapshot_counts(tokenizer, model):
    engine = Engine(model, tokenizer, mixed_budget=9)
    engine.forget_prefixes()
    asked = [Request(i, COMMON[: 20 + i], 6, GREEDY, ignore_eos=True) for i in range(6)]
    seen = []
    for _ in engine.serve(Script({0: asked})):
        seen.append(engine.snapshot())
    last = engine.snapshot()
    assert max(one.running for one in seen) == 4
    assert seen[0].running + seen[0].waiting == 6
    assert max(one.pages_used for one in seen) > 0
    assert (last.prompt_tokens, last.generation_tokens) == (sum(range(20, 26)), 36)
    assert (last.pages, last.page_size) == (16, PAGE)
    assert last.prefix_queries == last.prompt_tokens
    assert last.prefix_hits == 5 * PAGE
    assert last.pages_reusable > 0
    assert last.steps > 10
    assert last.step_s > 0


def test_ignored_end_tokens_are_tokens(tokenizer, model):
    hot = SamplingOptions(temperature=3.0, top_p=1.0)
    asked = [Request(i, (1, 50, 60), 60, hot, ignore_eos=True) for i in range(40)]
    done = Engine(model, tokenizer).complete(asked)
    assert {len(one.tokens) for one in done} == {60}
    assert any(2 in one.tokens for one in done)


class _Fails:
    def __init__(self, after: int) -> None:
        self.after = after

    def poll(self, wait: bool):
        self.after -= 1
        if self.after < 0:
            raise OSError("the network is gone")
        return [Request(self.after, (5, 6), 20, GREEDY)]


def _rank_0_fails(context: RankContext, folder: Path) -> tuple[str, list[int]]:
    engine = Engine(small(context), Tokenizer(folder / "tokenizer.model"))
    try:
        for _ in engine.serve(_Fails(3) if context.is_first else None):
            pass
    except (OSError, RankFailed) as error:
        said = f"{type(error).__name__}: {error}"
    # and the next run is as ever
    return said, engine.complete([Request(0, (5, 6), 4, GREEDY)])[0].tokens


def test_what_fails_on_rank_0_is_told_to_the_others(folder):
    (first, one), (second, other) = run_ranks(_rank_0_fails, 2, folder)
    assert first == "OSError: the network is gone"
    assert second == "RankFailed: rank 0: the network is gone"
    assert one == other


def _rank_dies(context: RankContext, folder: Path, who: int) -> str:
    import os

    engine = Engine(small(context, "dp"), Tokenizer(folder / "tokenizer.model"))
    begun = time.monotonic()
    try:
        for n, event in enumerate(engine.run([Request(i, (5, 6 + i), 60, GREEDY) for i in range(4)])):
            assert event.id < 4
            if n == 6 and context.rank == who:
                os._exit(3)
    except RuntimeError as error:
        print(error)
    if time.monotonic() - begun > 60:
        return "too late"
    os._exit(7)  # it was told


@pytest.mark.parametrize("who", [0, 1])
def test_no_rank_waits_for_one_that_died(folder, who):
    with pytest.raises(RankError) as caught:
        run_ranks(_rank_dies, 2, folder, who, timeout_s=100)
    assert "did not end" not in str(caught.value)
    assert "exit code" in str(caught.value)


class _Endless:
    """A step on a device that waits for a rank that is gone."""

    is_running = True


def _device_waits(context: RankContext) -> str:
    import os

    control = Control(context)
    if not context.is_first:
        os._exit(3)
    with pytest.raises(RankFailed, match="rank 1 has gone"):
        control.wait_for(_Endless())
    os._exit(7)


def test_rank_0_does_not_wait_for_the_device_of_a_rank_that_died():
    with pytest.raises(RankError) as caught:
        run_ranks(_device_waits, 2, timeout_s=100)
    assert "did not end" not in str(caught.value)
