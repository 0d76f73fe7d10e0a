"""Steps that run ahead against steps one after the other: the same answers, and launched before the text."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine import runner
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.graphs import Graphs
from mixtralkit.engine.leader import Leader
from mixtralkit.engine.requests import Request
from mixtralkit.engine.runner import Runner
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.shapes import bucket_sizes
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.planning.plan import ExpertPlan
from tests.engine.parts import VOCAB_SIZE, PlainEngine, engine_config, make_model
from tests.ranks import run_ranks

GREEDY = SamplingOptions(temperature=0)
HOT = SamplingOptions(temperature=3.0, top_p=1.0, seed=4)


def mixed_requests(count: int, seed: int = 0) -> list[Request]:
    """Lengths, settings and ends of all kinds; hot answers meet the end token, short stop strings end many."""
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        prompt = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 20)))
        sampling = rng.choice([GREEDY, HOT, SamplingOptions(temperature=0.7, top_k=9, min_p=0.02, seed=i)])
        stop = rng.choice([(), ("e",), ("th", "never there")])
        requests.append(Request(i, prompt, rng.randint(0, 40), sampling, stop, rng.random() < 0.3))
    return requests


def told(completions) -> list[tuple]:
    return [(c.id, c.tokens, c.text, c.finish_reason) for c in completions]


@pytest.mark.parametrize("slots", [1, 3, 7])
def test_answers_are_those_of_plain_steps(tokenizer, slots):
    model = make_model(RankContext(), engine_config(max_batch_size=slots))
    requests = mixed_requests(20)
    wanted = PlainEngine(model, tokenizer, prefill_budget=30).complete(requests)
    got = Engine(model, tokenizer, prefill_budget=30).complete(requests)
    assert told(got) == told(wanted)
    assert {c.finish_reason for c in got} == {"stop", "length"}
    for one, other in zip(got, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert (one.prompt_logprobs or []) == pytest.approx(other.prompt_logprobs or [], abs=1e-4)


def test_events_are_those_of_plain_steps(tokenizer):
    model = make_model(RankContext(), engine_config())
    requests = mixed_requests(9, seed=1)
    each = []
    for kind in (PlainEngine, Engine):
        events = list(kind(model, tokenizer).run(requests))
        each.append([[(e.text, e.finish_reason) for e in events if e.id == r.id] for r in requests])
    assert each[0] == each[1]


class Diary:
    """Records launches and takings of a run, and how many sequences each step sampled for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[tuple[str, int]] = []
        self.rows: list[int] = []
        launch, take = Runner.launch, Leader._take
        flights: dict[int, int] = {}

        def launched(runner, plan, *args):
            flight = launch(runner, plan, *args)
            flights[id(flight.plan)] = len(self.rows)
            self.lines.append(("launch", len(self.rows)))
            chunks = sum(chunk.is_sampled for own in plan.chunks for chunk in own)
            same = self.rows[-1] if plan.rows is None else sum(len(own.slots) for own in plan.rows)
            self.rows.append(same + chunks)
            return flight

        def taken(leader, *args):
            self.lines.append(("take", flights[id(leader.flights[0][0].plan)]))
            return take(leader, *args)

        monkeypatch.setattr(Runner, "launch", launched)
        monkeypatch.setattr(Leader, "_take", taken)


def _three_answers(context: RankContext, folder: Path) -> tuple[list[tuple[str, int]], list[int]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        diary = Diary(monkeypatch)
        engine = Engine(make_model(context, engine_config(), "dp"), Tokenizer(folder / "tokenizer.model"))
        engine.complete([Request(i, (5, 6 + i), 6 - i, GREEDY) for i in range(3)])
    return diary.lines, diary.rows


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_is_launched_before_the_last_ones_text(folder, world_size):
    """On one rank, and on two with sequences of their own, of which one ends up with none and only follows."""
    told = run_ranks(_three_answers, world_size, folder)
    for lines, rows in told:
        assert [line for line in lines if line[0] == "launch"] == [("launch", step) for step in range(6)]
        assert rows == [3, 3, 3, 3, 2, 1]  # the last token of a limit is known to be the last one
    assert told[0][0] == [
        ("launch", 0), ("launch", 1), ("take", 0), ("launch", 2), ("take", 1), ("launch", 3), ("take", 2),
        ("launch", 4), ("take", 3), ("launch", 5), ("take", 4), ("take", 5),
    ]  # fmt: skip


def test_a_row_too_many_is_thrown_away_and_its_slot_taken_again(tokenizer, monkeypatch):
    """The text ends two answers at a step; the next one has run with them, and two requests take their slots."""
    model = make_model(RankContext(), engine_config(max_batch_size=3))
    model.allocate_cache(64, pages=5)  # so that nobody waits for the pages of the ended
    whole = Engine(model, tokenizer).complete([Request(0, (1, 50, 60), 16, GREEDY)])[0]
    stop = whole.text[5:8]
    requests = [Request(i, (1, 50, 60), 16, GREEDY, stop=(stop,) if i < 2 else ()) for i in range(5)]
    diary = Diary(monkeypatch)
    answers = Engine(model, tokenizer).complete(requests)
    assert answers[0].finish_reason == answers[1].finish_reason == "stop"
    assert [a.tokens for a in answers[2:]] == [whole.tokens] * 3
    last = len(answers[0].tokens) - 1  # the step that gives the end of the stop text
    assert diary.rows[: last + 3] == [3] * (last + 3)  # one too many, and one with the next two requests' prompts
    assert diary.lines[2 * last + 2 : 2 * last + 4] == [("take", last), ("launch", last + 2)]


def test_rows_that_fill_a_bucket_change_nothing(tokenizer, monkeypatch):
    model = make_model(RankContext(), engine_config(max_batch_size=16))
    requests = mixed_requests(11, seed=2)
    wanted = told(Engine(model, tokenizer).complete(requests))
    monkeypatch.setattr(runner, "bucket_sizes", lambda most: [16])
    assert told(Engine(model, tokenizer).complete(requests)) == wanted


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 16, 20, 100, 256, 300])
def test_bucket_sizes(most):
    sizes = bucket_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert {s for s in (*range(1, 9), 12, 16, 24, 32, 48, 64, 96, 128, 192, 256) if s < most} == set(sizes[:-1])


def test_logits_that_are_not_finite_are_an_error_in_decode_too(tokenizer):
    model = make_model(RankContext(), engine_config())
    events = Engine(model, tokenizer).run([Request(0, (5, 6), 9, GREEDY)])
    next(events)
    model.norm.weight.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"prompt 0 at position [345] in torch\.float32; float16"):
        list(events)


def test_an_abandoned_run_leaves_nothing_behind(tokenizer):
    engine = Engine(make_model(RankContext(), engine_config()), tokenizer)
    requests = mixed_requests(8)
    wanted = told(engine.complete(requests))
    events = engine.run(requests)
    for _ in range(20):
        next(events)
    events.close()
    assert told(engine.complete(requests)) == wanted


def test_steps_are_made_anew_for_another_cache_and_follow_another_plan(tokenizer):
    model = make_model(RankContext(), engine_config())
    engine, requests = Engine(model, tokenizer), [Request(0, (5, 6, 7), 8, GREEDY)]
    wanted, first = told(engine.complete(requests)), engine._runner
    assert told(engine.complete(requests)) == wanted
    assert engine._runner is first
    model.cache = None
    assert told(engine.complete(requests)) == wanted
    second = engine._runner
    assert second.cache is model.cache
    for layer in range(model.params.n_layers):
        slots_LWS = model.layout.plan.slots_LWS.copy()
        slots_LWS[layer] = slots_LWS[layer, :, ::-1]
        model.adopt(layer, ExpertPlan(slots_LWS, model.params.num_experts))
    assert told(engine.complete(requests)) == wanted
    assert engine._runner is second
    engine.reset()
    assert engine._runner is None
    assert told(engine.complete(requests)) == wanted


def seen_by(observer_of: type[Engine], model, tokenizer, requests) -> Counter:
    rows: Counter = Counter()

    def observe(batch, reports) -> None:
        assert [len(r.routing.experts_TK) for r in reports] == [len(batch.tokens_T)] * model.params.n_layers
        experts_TLK = torch.stack([report.routing.experts_TK for report in reports], dim=1)
        for span in batch.spans:
            for row in range(span.start, span.stop):
                position = span.position + row - span.start
                assert position == batch.positions_T[row]
                assert span.slot == batch.slots_T[row]
                rows[span.sequence, position, int(batch.tokens_T[row]), str(experts_TLK[row].tolist())] += 1
        assert all(int(report.dropped) == int(report.rerouted) == 0 for report in reports)

    observer_of(model, tokenizer, prefill_budget=30, observe=observe).complete(requests)
    return rows


def test_observers_see_the_tokens_of_plain_steps_once(tokenizer):
    model = make_model(RankContext(), engine_config())
    requests = mixed_requests(12, seed=3)
    seen = seen_by(Engine, model, tokenizer, requests)
    assert seen == seen_by(PlainEngine, model, tokenizer, requests)
    assert max(seen.values()) == 1


def test_what_observers_keep_stays(tokenizer):
    model = make_model(RankContext(), engine_config())
    kept, copies = [], []

    def observe(batch, reports) -> None:
        kept.append([report.routing.experts_TK for report in reports])
        copies.append([experts_TK.clone() for experts_TK in kept[-1]])

    Engine(model, tokenizer, observe=observe).complete(mixed_requests(5))
    for step, copied in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, copied, strict=True))


def test_without_a_gpu_graphs_are_plain_calls():
    calls = []
    graphs = Graphs(torch.device("cpu"))
    for _ in range(2):
        graphs.run("key", lambda: calls.append("run"), lambda: calls.append("rehearse"))
    assert calls == ["run", "run"]


def _answers_over(context: RankContext, folder: Path, attention: str, experts: str, slots: int) -> tuple:
    model = make_model(context, engine_config(max_batch_size=slots), attention, experts)
    engine = Engine(model, Tokenizer(folder / "tokenizer.model"), prefill_budget=30)
    requests = mixed_requests(14, seed=5)
    done = engine.complete(requests)
    assert engine._runner is not None
    asked = iter(range(1000))
    wish = (lambda: next(asked) == 9) if context.is_first else (lambda: False)
    events = [e.completion for e in engine.run(requests, should_stop=wish) if e.completion]
    return told(done), [c.logprobs for c in done], told(events)


@pytest.mark.parametrize(
    ("world_size", "attention", "experts"), [(2, "tp", "tp"), (4, "tp", "ep"), (2, "dp", "ep"), (4, "dp", "ep")]
)
def test_several_ranks_give_one_ranks_answers(folder, world_size, attention, experts):
    wanted, logprobs, interrupted = _answers_over(RankContext(), folder, "tp", "ep", 5)
    answers = run_ranks(_answers_over, world_size, folder, attention, experts, 5)
    if attention == "dp":  # their shares come to more sequences at a time
        interrupted = answers[0][2]
    assert "interrupted" in {reason for *_, reason in interrupted}
    for tokens, found, ends in answers:
        assert tokens == wanted
        assert ends == interrupted
        assert [x for row in found for x in row] == pytest.approx([x for row in logprobs for x in row], abs=1e-4)


def test_a_long_run_with_places_that_stay_empty(tokenizer):
    """Rows without a sequence keep position 0, however many steps they are carried along."""
    model = make_model(RankContext(), engine_config(max_batch_size=4))
    engine = Engine(model, tokenizer)
    requests = [Request(i, (5, 6 + i), 60, GREEDY) for i in range(3)]
    for _ in range(3):
        engine.complete([replace(request, id=i) for i, request in enumerate(requests)])
    assert engine._runner._own.positions_B[3] == 0
    assert int(engine._runner._own.positions_B.max()) < model.params.max_seq_len
