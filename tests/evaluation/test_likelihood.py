"""Log-likelihoods against a loop over single sequences, on one rank and two, in batches of any size."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.evaluation.likelihood import loglikelihoods, token_logprobs, windows
from tests.evaluation.parts import MAX_SEQ_LEN, make_mixtral, slow_logprobs
from tests.ranks import run_ranks

END_SCALE = 3.0  # some likeliest tokens are the end token


def some_pairs(count: int = 24, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Contexts that several continuations share; random continuations, and the model's own, right and spoilt."""
    rng, mixtral = random.Random(seed), make_mixtral(RankContext(), end_scale=END_SCALE)
    pairs = []
    for i in range(count):
        context = [1, *(rng.randrange(3, 384) for _ in range(rng.randrange(0, 30)))]
        greedy = likeliest(mixtral, context, rng.randrange(1, 20))
        spoilt = [*greedy[:-1], (greedy[-1] + 1) % 384]
        drawn = [rng.randrange(3, 384) for _ in range(rng.randrange(1, 6))]
        pairs += [(context, drawn), (context, greedy), (context, spoilt)][: 1 + i % 3 + (i % 3 == 0)]
    return pairs


def likeliest(mixtral, context: list[int], count: int) -> list[int]:
    """The likeliest token each time, by whole passes; the end token is a token as any other."""
    tokens = list(context)
    for _ in range(count):
        tokens.append(int(mixtral.model.forward(torch.tensor([tokens]), 0)[0, -1].argmax()))
    return tokens[len(context) :]


def on_ranks(context: RankContext, attention: str, batch: int, pairs: list) -> list:
    return loglikelihoods(make_mixtral(context, attention, batch, end_scale=END_SCALE), pairs)


@pytest.fixture(scope="module")
def pairs():
    return some_pairs()


@pytest.fixture(scope="module")
def expected(pairs):
    mixtral = make_mixtral(RankContext(), end_scale=END_SCALE)
    return [slow_logprobs(mixtral, *pair) for pair in pairs]


def test_the_pairs_are_worth_testing(pairs, expected):
    greedy = [pair for pair, (_, is_greedy) in zip(pairs, expected, strict=True) if is_greedy]
    assert 10 < len(greedy) < len(pairs) - 10
    assert any(2 in continuation[:-1] for _, continuation in greedy), "the end token is inside a likeliest continuation"
    assert any(len(continuation) > 8 for _, continuation in greedy), "the greedy test takes more than one round"
    shared = Counter(tuple(context) for context, _ in pairs)
    assert max(shared.values()) > 1


@pytest.mark.parametrize(("world", "attention", "batch"), [(1, "tp", 1), (1, "tp", 5), (2, "dp", 5), (2, "tp", 1)])
def test_equals_a_loop_over_single_sequences(pairs, expected, world, attention, batch):
    if world == 1:
        found = [on_ranks(RankContext(), attention, batch, pairs)]
    else:
        found = run_ranks(on_ranks, world, attention, batch, pairs)
    for own in found:
        assert [logprob for logprob, _ in own] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
        assert [is_greedy for _, is_greedy in own] == [is_greedy for _, is_greedy in expected]


def near_ties(count: int = 400) -> list[tuple[tuple[int, ...], int, int]]:
    """Contexts with their two likeliest tokens, where neither has half of the probability and the second a fifth."""
    mixtral, rng, found = make_mixtral(RankContext()), random.Random(5), []
    for _ in range(count // 20):
        ids = [1, *(rng.randrange(3, 384) for _ in range(20))]
        probs_TV = mixtral.model.forward(torch.tensor([ids]), 0)[0].softmax(-1)
        top = probs_TV.topk(2)
        for at, ((p, q), (best, second)) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            if p < 0.49 and q > 0.2 and p - q > 0.01:
                found.append((tuple(ids[: at + 1]), best, second))
    return found


def test_the_second_likeliest_token_is_not_greedy_also_where_nothing_beats_it():
    ties, mixtral = near_ties(), make_mixtral(RankContext())
    assert len(ties) >= 3
    best = loglikelihoods(mixtral, [(context, (token,)) for context, token, _ in ties])
    second = loglikelihoods(mixtral, [(context, (token,)) for context, _, token in ties])
    assert [is_greedy for _, is_greedy in best + second] == [True] * len(ties) + [False] * len(ties)


def test_one_unlikely_token_anywhere_makes_a_continuation_not_greedy():
    """Also at the first place that a round of the test leaves open."""
    mixtral, context = make_mixtral(RankContext()), [1, 40, 50]
    greedy = likeliest(mixtral, context, 20)
    spoilt = [[*greedy[:at], (greedy[at] + 1) % 384, *greedy[at + 1 :]] for at in range(20)]
    found = loglikelihoods(mixtral, [(context, greedy), *((context, continuation) for continuation in spoilt)])
    assert [is_greedy for _, is_greedy in found] == [True] + [False] * 20


def test_the_model_is_asked_only_for_what_log_probabilities_leave_open():
    (context, first, second), *_ = near_ties()
    mixtral = make_mixtral(RankContext())
    asked = []
    complete = mixtral.engine.complete
    mixtral.engine.complete = lambda requests: asked.extend(requests) or complete(requests)
    loglikelihoods(mixtral, [(context, (first,)), (context, (second,)), (context, (second, 50))])
    assert [(request.prompt, request.max_gen_len) for request in asked] == [(context, 1)]


def test_equal_sequences_run_once_and_each_pair_gets_its_part():
    mixtral = make_mixtral(RankContext())
    calls = []
    run = mixtral.engine.run
    mixtral.engine.run = lambda requests: calls.append(len(requests)) or run(requests)
    ids = (1, 50, 60, 70, 80)
    whole, end, again = token_logprobs(mixtral, [(ids[:1], ids[1:]), (ids[:3], ids[3:]), (ids[:1], ids[1:])])
    assert calls == [1]
    assert whole[2:] == end
    assert whole == again
    assert len(whole) == 4


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (((), (5,)), "pair 1 has no context"),
        (((1,), ()), "pair 1 has no continuation"),
        (((1,) * 90, (5,) * 7), rf"pair 1 has 90 \+ 7 tokens, more than max_seq_len \({MAX_SEQ_LEN}\)"),
    ],
)
def test_pairs_that_cannot_be_scored_are_named(pair, says):
    with pytest.raises(ValueError, match=says):
        loglikelihoods(make_mixtral(RankContext()), [((1,), (5,)), pair])


def test_a_model_that_computes_nan_is_an_error_and_no_score():
    mixtral = make_mixtral(RankContext())
    with torch.no_grad():
        mixtral.model.named_tensors()["output.weight"][7] = math.nan
    with pytest.raises(RuntimeError, match=r"no finite log-probability for pair 0, token 0 .* in torch.float32"):
        loglikelihoods(mixtral, [((1, 50), (60,))])


@pytest.mark.parametrize("window", [2, 3, 5, 8, 40])
def test_windows_score_every_id_once_with_the_context_asked_for(window):
    for count in range(0, 30):
        whole = [1, *range(100, 100 + count)]
        for context in range(1, window):
            scored, seen = [], 0
            for before, after in windows(whole[1:], 1, window, context):
                assert len(before) + len(after) <= window
                assert len(after) > 0
                at = 1 + len(scored)
                assert list(before) == whole[at - len(before) : at], "context is what stands before"
                assert len(before) >= min(context, at)
                scored += after
                seen += 1
            assert scored == whole[1:]
            assert seen <= max(1, math.ceil(count / (window - context)))


def test_windows_of_the_docstring():
    assert windows([1, 2, 3, 4, 5, 6], 0, 4, 2) == [((0,), (1, 2, 3)), ((2, 3), (4, 5)), ((3, 4, 5), (6,))]


@pytest.mark.parametrize(("window", "context"), [(1, 1), (4, 0), (4, 4)])
def test_windows_that_cannot_be_are_refused(window, context):
    with pytest.raises(ValueError, match=rf"(window|context) \({window if window == 1 else context}\)"):
        windows([5], 1, window, context)
