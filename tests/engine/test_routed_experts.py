"""Which experts each token took, on request: those that the model without a cache chooses for the whole text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine import runner
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Completion, Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.mixtral import Mixtral
from tests.engine.parts import VOCAB_SIZE, engine_config, make_model
from tests.engine.test_warm_up import Captured
from tests.ranks import run_ranks

GREEDY = SamplingOptions(temperature=0)
WARM = SamplingOptions(temperature=0.8, seed=5)
PAGE = 8
COMMON = tuple(random.Random(1).randrange(3, VOCAB_SIZE) for _ in range(3 * PAGE))


def small(context: RankContext, attention: str = "tp", experts: str = "ep", pages: int | None = None):
    model = make_model(context, engine_config(max_batch_size=4), attention, experts)
    model.allocate_cache(PAGE, pages)
    return model


def asked() -> list[Request]:
    """Some ask for it, some do not; some with a known beginning, a stop text, scores, or nothing to generate."""
    rng, requests = random.Random(2), []
    for i in range(14):
        prompt = COMMON[: rng.randint(1, len(COMMON))] + tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(3))
        requests.append(Request(i, prompt, rng.randint(0, 14), rng.choice([GREEDY, WARM]), rng.choice([(), ("e",)]),
                                routed_experts=i % 4 != 3, prompt_logprobs=i % 5 == 0, top_logprobs=i % 3))  # fmt: skip
    return requests


def wanted(model, request: Request, done: Completion) -> np.ndarray:
    """Experts [tokens, L, K] by the model without a cache, of all tokens that it was given."""
    ids = [*request.prompt, *done.tokens]
    given = len(ids) - (done.end is None and bool(done.tokens))
    with torch.no_grad():
        routings = model.train_logits(torch.tensor([ids]))[1]
    return torch.stack([routing.experts_TK for routing in routings], dim=1).numpy()[:given]


@pytest.mark.parametrize(("pages", "budget"), [(None, 4096), (7, 11)])
def test_they_are_those_of_the_whole_text(folder, tokenizer, pages, budget):
    """In chunks, beside others, after a preemption, and where the beginning is in the cache."""
    model, requests = small(RankContext(), pages=pages), asked()
    engine = Engine(model, tokenizer, budget, mixed_budget=9)
    plain = [(c.tokens, c.text, c.finish_reason) for c in
             engine.complete([replace(request, routed_experts=False) for request in requests])]  # fmt: skip
    for _ in range(2):
        events = list(engine.run(requests))
        done = {event.id: event.completion for event in events if event.completion}
        for request, same in zip(requests, plain, strict=True):
            own = done[request.id]
            assert (own.tokens, own.text, own.finish_reason) == same
            told = [event.routed_experts for event in events if event.id == request.id]
            if not request.routed_experts:
                assert own.routed_experts is None
                assert told == [None] * len(told)
                continue
            assert own.routed_experts.tolist() == wanted(model, request, own).tolist()
            assert own.cached_tokens == 0, "the whole prompt is computed"
            assert np.concatenate([part for part in told if part is not None]).tolist() == own.routed_experts.tolist()
    assert {reason for _, _, reason in plain} == {"stop", "length"}
    assert (engine.snapshot().preemptions > 0) == (pages is not None)
    assert engine.snapshot().prefix_hits > 0, "by those who do not ask"


def _over_ranks(context: RankContext, folder: Path, attention: str, experts: str) -> list[list]:
    engine = Engine(small(context, attention, experts), Tokenizer(folder / "tokenizer.model"), 16)
    return [c.routed_experts is not None and c.routed_experts.tolist() for c in engine.complete(asked())]


@pytest.mark.parametrize(("attention", "experts"), [("tp", "tp"), ("dp", "ep"), ("coherent", "ep")])
def test_two_ranks_tell_the_same(folder, tokenizer, attention, experts):
    model, requests = small(RankContext()), asked()
    alone = Engine(model, tokenizer).complete(requests)
    right = [r.routed_experts and wanted(model, r, done).tolist() for r, done in zip(requests, alone, strict=True)]
    assert run_ranks(_over_ranks, 2, folder, attention, experts) == [right, right]


def test_from_python(tokenizer):
    mixtral = Mixtral.from_parts(small(RankContext()), tokenizer)
    requests = [mixtral.request(i, [5, 6, 7 + i], 4, temperature=0, routed_experts=i == 1) for i in range(2)]
    found = {done.id: done for done in mixtral.generate_many(requests)}
    params = mixtral.model.params
    assert found[1].routed_experts.shape == (6, params.n_layers, params.num_experts_per_tok)
    assert found[1].routed_experts.dtype == np.int16
    assert found[0].routed_experts is None


def test_decode_steps_that_tell_them_are_graphs(tokenizer, monkeypatch):
    """Of their own, so that those of others carry nothing more."""
    made: list[Captured] = []
    monkeypatch.setattr(runner, "Graphs", lambda *args: made.append(Captured()) or made[-1])
    engine = Engine(small(RankContext()), tokenizer)
    engine.complete([Request(i, (5, 6 + i), 4 + i, GREEDY, routed_experts=i == 1, ignore_eos=True) for i in range(3)])
    decodes = [key for key in made[0].keys if isinstance(key[0], int)]
    assert {(rows, routed) for rows, *_, routed in decodes} == {(3, True), (2, True), (1, False)}
