"""The batcher's bookkeeping, played through without a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtralkit.engine.batching import Batcher
from mixtralkit.engine.requests import Request
from tests.engine.parts import make_tokenizer

MAX_SEQ_LEN = 24
REQUESTS = st.lists(st.tuples(st.integers(1, MAX_SEQ_LEN), st.integers(0, 6), st.booleans()), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@given(REQUESTS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
@settings(deadline=None, max_examples=150)
def test_every_position_runs_once_in_order_and_within_the_limits(tokenizer, sizes, slots, ranks, budget):
    requests = [
        Request(i, (5,) * prompt, length, prompt_logprobs=scored) for i, (prompt, length, scored) in enumerate(sizes)
    ]
    batcher = Batcher(requests, tokenizer, slots, ranks, budget, MAX_SEQ_LEN)
    done, positions, scored = {}, {r.id: 0 for r in requests}, {r.id: 0 for r in requests}
    steps = 0
    while batcher:
        steps += 1
        assert steps < 2000
        batcher.admit()
        plan = batcher.plan()
        assert len(plan) == ranks
        assert any(plan), "a step must go on with something"
        for rank, pieces in enumerate(plan):
            own_slots = [piece.sequence.slot for piece in pieces]
            assert own_slots == sorted(set(own_slots))
            assert all(0 <= slot < slots for slot in own_slots)
            prompt_tokens = 0
            for piece in pieces:
                s = piece.sequence
                assert s.rank == rank
                assert piece.start == positions[s.request.id] < piece.stop <= MAX_SEQ_LEN
                prompt_tokens += max(0, min(piece.stop, len(s.request.prompt)) - piece.start)
                positions[s.request.id] = s.cached = piece.stop
                scored[s.request.id] += piece.scored
                event = s.accept(6, -1.0) if piece.is_sampled else None
                if not piece.is_sampled and piece.stop == s.length:
                    event = s.finish("length")
                if event is not None and event.finish_reason:
                    done[s.request.id] = event.completion
                    batcher.release(s)
            assert prompt_tokens <= budget
    for request in requests:
        expected = min(request.max_gen_len, MAX_SEQ_LEN - len(request.prompt))
        assert len(done[request.id].tokens) == expected
        assert scored[request.id] == (len(request.prompt) - 1 if request.prompt_logprobs else 0)
        assert positions[request.id] == len(request.prompt) + max(0, expected - 1)


def test_requests_spread_over_the_ranks_and_wait_for_slots(tokenizer):
    batcher = Batcher([Request(i, (5,), 1) for i in range(7)], tokenizer, 2, 3, 100, MAX_SEQ_LEN)
    batcher.admit()
    assert [(s.rank, s.slot) for s in batcher.running] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert len(batcher.waiting) == 1
    batcher.release(batcher.running[1])
    batcher.admit()
    assert (batcher.running[-1].request.id, batcher.running[-1].rank, batcher.running[-1].slot) == (6, 1, 0)
