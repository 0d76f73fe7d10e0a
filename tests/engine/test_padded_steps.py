"""Steps with prompts made up to a few shapes, as on a GPU: here launched one by one, by the references."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine import shapes
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.model import attention
from mixtralkit.ops.ragged_attention import ragged_attention
from tests.engine.parts import engine_config, make_model
from tests.engine.test_runner import mixed_requests, told
from tests.ranks import run_ranks

SIZES = (8, 24, shapes.MOST_IN_GRAPH)


class PaddedEngine(Engine):
    """Notes the shapes of its steps with prompts."""

    def _prepare(self) -> None:
        super()._prepare()
        self._runner._pads_prompts, shape_of, self.seen = True, type(self._runner)._shape, getattr(self, "seen", [])

        def noted(plan, observed):
            shape = shape_of(self._runner, plan, observed)
            self.seen.append((plan, shape))
            return shape

        self._runner._shape = noted


def by_the_table(q_THC, keys, values, tables_SM, spans, spans_B4, window=None):
    """As a kernel does it that gets no more than the table; other rows come back as they may: not a number."""
    if spans[0][0] >= 0:
        return ragged_attention(q_THC, keys, values, tables_SM, spans, spans_B4, window)
    out_THC = torch.full_like(q_THC, torch.nan)
    for slot, position, queries, start in spans_B4.tolist():
        if queries:
            rows, span = slice(start, start + queries), [(slot, position, queries)]
            table = torch.tensor([[slot, position, queries, 0]])
            out_THC[rows] = ragged_attention(q_THC[rows], keys, values, tables_SM, span, table, window)
    return out_THC


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(attention, "ragged_attention", by_the_table)
    monkeypatch.setattr(shapes, "PROMPT_TOKENS", SIZES)
    monkeypatch.setattr(shapes, "FEW_BESIDE", 4)


@pytest.mark.parametrize("slots", [1, 3, 12])
def test_answers_are_those_of_steps_as_long_as_they_are(tokenizer, slots):
    model = make_model(RankContext(), engine_config(max_batch_size=slots))
    requests = mixed_requests(24)
    wanted = Engine(model, tokenizer, prefill_budget=30).complete(requests)
    engine = PaddedEngine(model, tokenizer, prefill_budget=30)
    got = engine.complete(requests)
    assert sum(shape is not None for _, shape in engine.seen) > 3
    assert told(got) == told(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_shape_is_the_next_that_holds_the_step(tokenizer):
    model = make_model(RankContext(), engine_config(max_batch_size=12))
    engine = PaddedEngine(model, tokenizer, prefill_budget=30)
    engine.complete(mixed_requests(24))
    seen = set()
    for plan, shape in engine.seen:
        rows, chunks = plan.rows[0].slots, plan.chunks[0]
        special, many = any(chunk.targets for chunk in chunks), len(chunks) > 4
        if shape is None:
            assert special or many
            continue
        assert not special
        assert len(rows) <= shape.rows in (0, 4, 12)
        assert sum(len(chunk.ids) for chunk in chunks) <= shape.tokens in SIZES
        assert len(chunks) <= shape.spans
        seen.add(shape)
    assert len(seen) > 1


def _padded(context, folder, kind) -> list:
    attention.ragged_attention, shapes.PROMPT_TOKENS = by_the_table, SIZES
    model = make_model(context, engine_config(max_batch_size=6), attention=kind)
    engine = PaddedEngine(model, Tokenizer(folder / "tokenizer.model"), prefill_budget=30)
    got = told(engine.complete(mixed_requests(12)))
    assert sum(shape is not None for _, shape in engine.seen) > 3
    return got


@pytest.mark.parametrize("kind", ["dp", "tp"])
def test_ranks_take_the_same_shapes(tokenizer, folder, kind):
    model = make_model(RankContext(), engine_config(max_batch_size=6))
    wanted = told(Engine(model, tokenizer, prefill_budget=30).complete(mixed_requests(12)))
    assert run_ranks(_padded, 2, folder, kind) == [wanted] * 2


def test_rows_that_only_fill_take_no_expert(tokenizer, monkeypatch):
    model = make_model(RankContext(), engine_config(max_batch_size=12))
    engine, computed = PaddedEngine(model, tokenizer, prefill_budget=30), []
    for block in model.layers[:-1]:  # in the last one are the rows that are sampled, and the first one again
        experts = block.feed_forward.experts
        run = experts.forward
        monkeypatch.setattr(experts, "forward", lambda rows, run=run: computed.append(rows.slots_RK) or run(rows))
    engine.complete(mixed_requests(1, seed=5))
    (plan, shape), *_ = engine.seen
    tokens = sum(len(chunk.ids) for chunk in plan.chunks[0])
    assert 0 < tokens < shape.tokens == len(computed[0])
    for slots_RK in computed[: len(model.layers) - 1]:
        assert (slots_RK[:tokens] >= 0).all()
        assert (slots_RK[tokens:] < 0).all()
