"""What requests ask of their logits, against a plain Python sampler that looks at one row and one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from mixtralkit.engine.sampler import Asked, SamplingOptions, SlotRules, sample, sample_each, settings_of
from mixtralkit.ops.sampling import adjust_logits, adjust_logits_reference

SLOTS, VOCAB = 5, 70  # a word of the masks is only partly used
CPU = torch.device("cpu")


def slow(logits: list[float], asked: Asked, position: int, allowed: set[int] | None = None) -> list[float]:
    """The definition, in float64."""
    s, found = asked.sampling, []
    for token, logit in enumerate(logits):
        logit += s.biases.get(token, 0.0)
        count = asked.answer.count(token)
        if count or token in asked.prompt:
            logit = logit / s.repetition_penalty if logit > 0 else logit * s.repetition_penalty
        logit -= s.frequency_penalty * count + (s.presence_penalty if count else 0)
        too_early = token in asked.ends and position + 1 - len(asked.prompt) < asked.min_tokens
        found.append(-math.inf if too_early or (allowed is not None and token not in allowed) else logit)
    return found


def words(allowed: set[int]) -> np.ndarray:
    """A bit for each token."""
    bits = [sum(1 << i for i in range(32) if 32 * w + i in allowed) for w in range(-(-VOCAB // 32))]
    return np.array(bits, dtype=np.uint32).view(np.int32)


def by_triton(logits_NV, rules, slots_N, positions_N):
    from mixtralkit.ops.sampling.triton import adjust_rows

    return adjust_rows(logits_NV, rules, slots_N, positions_N, piece=64)


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)
PENALTIES = st.sampled_from([0.0, -2.0, -0.5, 0.3, 2.0])
ASKED = st.builds(
    lambda presence, frequency, repetition, bias, prompt, answer, least, ends: Asked(
        SamplingOptions(
            presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, logit_bias=bias
        ),
        (1, *prompt), tuple(answer), least, tuple(ends),
    ),
    PENALTIES, PENALTIES, st.sampled_from([1.0, 0.5, 1.3, 3.0]),
    st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100, -1.5, 0.25, 100]), max_size=4),
    TOKENS, TOKENS, st.integers(0, 15), st.lists(st.integers(0, VOCAB - 1), max_size=3),
)  # fmt: skip
MASKS = st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1)


@given(st.lists(st.tuples(ASKED, MASKS), min_size=1, max_size=SLOTS), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_adjusted_logits_are_the_definition(sequences, seed):
    """In the reference and in Triton; the slots have been others' before, and rows that fill the shape are no one's."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator)[: len(sequences)]
    kept = SlotRules(SLOTS, VOCAB, CPU)
    for slot, (asked, _) in zip(slots.tolist(), reversed(sequences), strict=True):  # these leave no trace
        kept.place(slot, asked)
        kept.allow([slot], words({0})[None])
    for slot, (asked, allowed) in zip(slots.tolist(), sequences, strict=True):
        kept.place(slot, asked)
        if allowed is not None:
            kept.allow([slot], words(allowed)[None])
    logits_NV = torch.randn(len(sequences) + 1, VOCAB, generator=generator) * 3
    slots_N = torch.cat([slots, torch.tensor([-1])])
    positions_N = torch.tensor([len(asked.prompt) + len(asked.answer) - 1 for asked, _ in sequences] + [0])
    for adjust in (adjust_logits, adjust_logits_reference, by_triton):
        got_NV = adjust(logits_NV, kept.rules, slots_N, positions_N)
        for row, (asked, allowed) in enumerate(sequences):
            wanted = slow(logits_NV[row].double().tolist(), asked, int(positions_N[row]), allowed)
            torch.testing.assert_close(got_NV[row].double(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-4)
        assert torch.equal(got_NV[-1], logits_NV[-1])


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_transformers(penalty):
    logits_NV = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    prompt, answer = (1, 5, 5, 9), (7, 1, 60)
    kept = SlotRules(SLOTS, VOCAB, CPU)
    kept.place(3, Asked(SamplingOptions(repetition_penalty=penalty), prompt, answer))
    wanted_NV = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), logits_NV.clone())
    got_NV = kept.adjusted(logits_NV, torch.tensor([3]), torch.tensor([6]))
    torch.testing.assert_close(got_NV, wanted_NV)


def answers(kept: SlotRules, asked: dict[int, Asked | None], steps: int, hot: bool) -> dict[int, list[int]]:
    """Tokens of each slot's sequence from a "model" that looks at the position alone, with rows that only fill."""
    slots = [*asked, -1]
    prompts = {slot: len(one.prompt) if one else 3 for slot, one in asked.items()}
    table_SV = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(7)) * 4
    found: dict[int, list[int]] = {slot: [] for slot in asked}
    options = [SamplingOptions(temperature=0.8 if hot else 0, top_p=1.0)] * len(slots)
    for step in range(steps):
        at = [prompts.get(slot, 1) - 1 + step for slot in slots]
        slots_N, positions_N = torch.tensor(slots), torch.tensor(at)
        logits_NV = table_SV[positions_N]
        drawn = (
            (torch.tensor(settings_of(options)), torch.tensor([(0.37 * p) % 1 for p in at])) if hot else (None, None)
        )
        tokens_N, logprobs_N = sample_each(logits_NV, *drawn, kept.adjusted(logits_NV, slots_N, positions_N))
        kept.count(slots_N, tokens_N)
        own_N = logits_NV.log_softmax(-1).gather(-1, tokens_N[:, None])[:, 0]
        torch.testing.assert_close(logprobs_N, own_N)  # the model's own
        for slot, token in zip(asked, tokens_N.tolist(), strict=False):
            found[slot].append(token)
    return found


ASKING = {
    4: Asked(SamplingOptions(presence_penalty=1.5, frequency_penalty=0.7), (1, 2)),
    0: None,
    2: Asked(SamplingOptions(repetition_penalty=1.8, logit_bias={9: 5.0}), (1, 9, 9, 4)),
    1: Asked(SamplingOptions(logit_bias={8: 100, 3: 99.5}), (1, 2), min_tokens=4, ends=(8,)),
}


@pytest.mark.parametrize("hot", [False, True])
def test_answers_go_on_as_one_row_does(hot):
    """Counted on the device from step to step, each as if alone; a sequence that asks for nothing as without rules."""
    kept = SlotRules(SLOTS, VOCAB, CPU)
    for slot, asked in ASKING.items():
        kept.place(slot, asked)
    together = answers(kept, ASKING, 12, hot)
    for slot, asked in ASKING.items():
        alone = SlotRules(SLOTS, VOCAB, CPU)
        alone.place(3, asked)
        assert answers(alone, {3: asked}, 12, hot)[3] == together[slot]
    assert together[1][:4] == [3] * 4  # the end comes behind four others
    assert together[1][4] == 8
    plain = answers(SlotRules(SLOTS, VOCAB, CPU), {0: None}, 12, hot)
    assert together[0] == plain[0]
    assert len(set(map(tuple, together.values()))) == 4
    # and token by token what the definition says, where nothing is drawn
    table_SV = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(7)) * 4
    for slot in (4, 2) if not hot else ():
        asked, tokens = ASKING[slot], ()
        for _ in range(12):
            position = len(asked.prompt) + len(tokens) - 1
            logits = slow(table_SV[position].tolist(), Asked(asked.sampling, asked.prompt, tokens), position)
            tokens = (*tokens, logits.index(max(logits)))
        assert list(tokens) == together[slot]


def test_a_sequence_that_is_computed_again_goes_on():
    """A preempted one takes another slot with the answer it has."""
    kept, asked = SlotRules(SLOTS, VOCAB, CPU), ASKING[4]
    kept.place(4, asked)
    whole = answers(kept, {4: asked}, 10, False)[4]
    kept.place(4, None)
    again = Asked(asked.sampling, asked.prompt, tuple(whole[:6]))
    kept.place(2, again)
    rules = kept.rules
    position = len(asked.prompt) + 5
    table_SV = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(7)) * 4
    logits_NV = table_SV[position : position + 1]
    assert int(kept.adjusted(logits_NV, torch.tensor([2]), torch.tensor([position])).argmax()) == whole[6]
    assert not rules.asks_S[4]
    assert torch.equal(kept.adjusted(logits_NV, torch.tensor([4]), torch.tensor([position])), logits_NV)


def test_what_is_left_of_a_mask_is_drawn_whatever_the_number():
    kept = SlotRules(SLOTS, VOCAB, CPU)
    kept.place(1, Asked(SamplingOptions(), (1,)))
    kept.allow([1], words({69})[None])
    logits_NV = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    adjusted_NV = kept.adjusted(logits_NV, torch.tensor([1]), torch.tensor([4]))
    hot = torch.tensor(settings_of([SamplingOptions(temperature=2.0, top_p=0.9)]))
    for number in (0.0, 0.5, 1 - 2**-24):
        tokens_N, logprobs_N = sample_each(logits_NV, hot, torch.tensor([number]), adjusted_NV)
        assert tokens_N.tolist() == [69]
        assert logprobs_N.isfinite().all()
    assert sample_each(logits_NV, None, None, adjusted_NV)[0].tolist() == [69]


def test_without_rules_nothing_changes():
    logits_NV = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    options = [SamplingOptions(temperature=t) for t in (0, 0.7, 1.0, 0)]
    wanted = sample(logits_NV, options, [0.1, 0.6, 0.9, 0.2])
    got = sample_each(logits_NV, torch.tensor(settings_of(options)), torch.tensor([0.1, 0.6, 0.9, 0.2]))
    assert all(map(torch.equal, got, wanted))


def test_options_that_ask():
    assert not SamplingOptions(temperature=2.0, top_k=3).asks
    for given_ in (
        {"presence_penalty": -1},
        {"frequency_penalty": 1},
        {"repetition_penalty": 2},
        {"logit_bias": {3: 0}},
    ):
        assert SamplingOptions(**given_).asks
    options = SamplingOptions(logit_bias={"7": -100, 3: 0.1})
    assert options.logit_bias == ("7:-100", "3:0.1")
    assert options.biases == {7: -100.0, 3: 0.1}
    assert SamplingOptions(logit_bias=options.logit_bias) == options
    options.check_vocabulary(8)
    with pytest.raises(ValueError, match="logit_bias names token 7; ids are below 7"):
        options.check_vocabulary(7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 2.1), ("presence_penalty", "1"), ("frequency_penalty", -2.5),
        ("frequency_penalty", math.nan), ("repetition_penalty", 0), ("repetition_penalty", -1),
        ("repetition_penalty", math.inf),
        ("logit_bias", {5: 101}), ("logit_bias", {5: math.nan}), ("logit_bias", {-1: 1}), ("logit_bias", {"a": 1}),
        ("logit_bias", {5: True}), ("logit_bias", "5:1"), ("logit_bias", ["5"]), ("logit_bias", [5]),
        ("logit_bias", ["5:1", "05:2"]), ("logit_bias", {1.5: 1}),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} \("):
        SamplingOptions(**{name: value})
