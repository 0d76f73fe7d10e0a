"""The sampler against a plain Python one, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtralkit.distributed import RankContext
from mixtralkit.engine.sampler import SamplingOptions, gather_vocabulary, sample, sample_likeliest, uniform
from tests.ranks import run_ranks


def kept_tokens(logits: list[float], o: SamplingOptions) -> dict[int, float]:
    """Token → probability of what may be drawn, likeliest first."""
    order = sorted(range(len(logits)), key=lambda t: -logits[t])
    best = logits[order[0]]
    probs = [math.exp((logits[t] - best) / o.temperature) for t in order]
    if o.top_k:
        order, probs = order[: o.top_k], probs[: o.top_k]
    total, before, kept = sum(probs), 0.0, {}
    for place, (token, p) in enumerate(zip(order, probs, strict=True)):
        if place == 0 or (before < o.top_p * total and p >= o.min_p * probs[0]):
            kept[token] = p
        before += p
    return {token: p / sum(kept.values()) for token, p in kept.items()}


OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.3, 0.6, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)


@given(st.integers(0, 10**6), st.lists(OPTIONS, min_size=1, max_size=4))
@settings(deadline=None, max_examples=150)
def test_draws_what_the_cumulative_distribution_says(seed, options):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(options), 20, generator=generator) * 3
    uniforms = torch.rand(len(options), generator=generator).tolist()
    tokens, logprobs = sample(logits, options, uniforms)
    for row, (o, u) in enumerate(zip(options, uniforms, strict=True)):
        kept = kept_tokens(logits[row].double().tolist(), o)
        token = int(tokens[row])
        assert token in kept
        names = list(kept)
        below = sum(kept[t] for t in names[: names.index(token)])
        assert below - 1e-5 <= u <= below + kept[token] + 1e-5
        assert math.isclose(logprobs[row], logits[row].log_softmax(0)[token], abs_tol=1e-5)


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(20000, 1)
    option = SamplingOptions(temperature=1.0, top_p=1.0)
    tokens, _ = sample(logits, [option] * 20000, [uniform(5, 0, i) for i in range(20000)])
    frequencies = tokens.bincount(minlength=4) / 20000
    torch.testing.assert_close(frequencies, logits[0].softmax(0), atol=0.012, rtol=0)


def test_temperature_zero_takes_the_likeliest_and_stands_beside_others():
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 2.9], [1.0, 1.0, 0.0]])
    greedy, hot = SamplingOptions(temperature=0), SamplingOptions(temperature=1.0, top_p=1.0)
    tokens, _ = sample(logits, [greedy, hot, greedy], [0.9, 0.9, 0.9])
    assert tokens.tolist() == [1, 2, 0]


def test_a_row_is_drawn_alike_in_any_company():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    options = [SamplingOptions(temperature=t, top_k=k) for t, k in [(0, 0), (1, 5), (0.5, 0), (2, 0), (1, 1), (0.1, 9)]]
    uniforms = [uniform(1, i, 7) for i in range(6)]
    together, _ = sample(logits, options, uniforms)
    alone = [int(sample(logits[i : i + 1], options[i : i + 1], uniforms[i : i + 1])[0]) for i in range(6)]
    assert together.tolist() == alone
    backwards, _ = sample(logits.flip(0), options[::-1], uniforms[::-1])
    assert backwards.flip(0).tolist() == alone


def test_extreme_values_neither_overflow_nor_leave_the_kept_tokens():
    logits = torch.tensor([[1e4, -1e4, 0.0, 9999.0]])
    last = 1 - 2**-24
    assert int(sample(logits, [SamplingOptions(temperature=1e-6)], [last])[0]) == 0
    flat = torch.zeros(1, 32000)
    assert int(sample(flat, [SamplingOptions(temperature=1.0, top_p=1.0, top_k=7)], [last])[0]) == 6
    assert int(sample(flat, [SamplingOptions(temperature=1.0, top_p=1e-6)], [last])[0]) == 0


def _over_parts(context: RankContext, vocab: int) -> tuple[torch.Tensor, ...]:
    logits = _rows_with_ties(vocab)
    first, end = (vocab * (context.rank + i) // context.world_size for i in range(2))
    part = logits[:, first:end].contiguous()
    return gather_vocabulary(part, vocab, context), *sample_likeliest(part, first, context)


def _rows_with_ties(vocab: int) -> torch.Tensor:
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)).mul(2).round()
    logits[-1] = -50.0  # all equal
    return logits


@pytest.mark.parametrize(("world_size", "vocab"), [(2, 101), (4, 101), (4, 7)])
def test_ranks_with_parts_of_the_vocabulary_give_one_ranks_tokens(world_size, vocab):
    logits = _rows_with_ties(vocab)
    tokens, logprobs = sample(logits, [SamplingOptions(temperature=0)] * 9, [0.0] * 9)
    assert torch.equal(tokens, logits.argmax(-1))
    for whole, found, of_found in run_ranks(_over_parts, world_size, vocab):
        assert torch.equal(whole, logits)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(of_found, logprobs, atol=1e-5, rtol=1e-5)


def test_no_rows_give_no_tokens():
    tokens, logprobs = sample(torch.zeros(0, 9), [], [])
    assert tokens.shape == logprobs.shape == (0,)


def test_uniform_depends_on_each_argument_and_is_spread():
    numbers = {uniform(s, r, p) for s in range(10) for r in range(10) for p in range(10)}
    assert len(numbers) == 1000
    assert all(0 <= u < 1 for u in numbers)
    assert abs(sum(numbers) / 1000 - 0.5) < 0.05
    assert uniform(1, 2, 3) == uniform(1, 2, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_p", 0), ("top_p", 1.1), ("top_p", math.nan), ("top_k", -1), ("top_k", 2.5), ("top_k", True),
        ("min_p", -0.1), ("min_p", 1), ("seed", -1), ("seed", 0.5),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} \("):
        SamplingOptions(**{name: value})
