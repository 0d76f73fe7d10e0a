"""Stop strings and the life of a request."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtralkit.engine.requests import Answer, Request, StopFilter, check_prompt, echoed_texts
from mixtralkit.engine.tokenizer import TextStream, Tokenizer
from tests.engine.parts import VOCAB_SIZE, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


PIECES = st.lists(st.text(alphabet="ab", max_size=3), max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3).map(tuple)


@given(PIECES, STOPS)
@settings(deadline=None, max_examples=300)
def test_text_ends_before_the_first_stop_string(pieces, stop):
    filter, out, seen = StopFilter(stop), "", ""
    for piece in pieces:
        seen += piece
        out += filter.push(piece)
        ends = [seen.index(s) for s in stop if s in seen]
        assert filter.stopped == bool(ends)
        if ends:
            assert out == seen[: min(ends)]
            return
        held = seen[len(out) :]
        assert seen.startswith(out)
        assert not held or any(s.startswith(held) for s in stop)
    assert out + filter.finish() == seen


def test_without_stop_strings_nothing_is_held():
    assert StopFilter(()).push("anything") == "anything"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_gen_len": -1}, "max_gen_len \\(-1\\)"),
        ({"max_gen_len": 1.5}, "max_gen_len \\(1.5\\)"),
        ({"stop": ("",)}, "stop \\("),
        ({"stop": "text"}, "stop \\('text'\\)"),
    ],
)
def test_wrong_requests_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        Request(**{"id": 0, "prompt": (1,), "max_gen_len": 3, **changes})


@pytest.mark.parametrize(
    ("prompt", "says"),
    [((), "prompt 5 is empty"), ((1,) * 9, "prompt 5 has 9 tokens, more than max_seq_len \\(8\\)"),
     ((1, 50), "prompt 5 has token ids outside 0 … 49"), ((-1, 3), "prompt 5 has token ids")],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_named(prompt, says):
    with pytest.raises(ValueError, match=says):
        check_prompt(5, prompt, max_seq_len=8, vocab_size=50)


def answered(tokenizer, ids, stop=()):
    sequence = Answer(Request(0, (1, 5), len(ids) + 1, stop=stop), len(ids) + 1, tokenizer)
    events = []
    for token in ids:
        events.append(sequence.accept(token, 0.0))
        if sequence.ended:
            break
    events.append(None if sequence.ended else sequence.finish("length"))
    done = next(event.completion for event in reversed(events) if event is not None and event.completion)
    return done, "".join(event.text for event in events if event is not None)


@given(st.lists(st.integers(0, VOCAB_SIZE + 9), max_size=30), st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=6))
@example([197, 1, 131], [198])  # bytes of one character, a control token between them, and one cut by the prompt's end
@settings(deadline=None, max_examples=300)
def test_texts_of_tokens_join_to_the_answer_whole_streamed_and_echoed(tokenizer, ids, prompt):
    """The texts of the tokens had lost their spaces."""
    ids = [i for i in ids if i != tokenizer.eos_id]
    done, streamed = answered(tokenizer, ids)
    assert "".join(done.texts) == done.text == streamed == tokenizer.decode(ids)
    assert len(done.texts) == len(done.tokens)
    echoed = echoed_texts(tokenizer, prompt, done)
    assert "".join(echoed) == tokenizer.decode([*prompt, *ids])
    assert len(echoed) == len(prompt) + len(ids)


@given(st.text(alphabet="ab the\n", min_size=1, max_size=20), st.text(alphabet=" abthe", min_size=1, max_size=4))
@settings(deadline=None, max_examples=300)
def test_stop_texts_are_found_where_the_answer_goes_on_from_its_prompt(tokenizer, text, stop):
    """A stop text that begins with a space missed the answer's first word."""
    ids, prompt = tokenizer.encode(text, bos=False), tokenizer.encode("a prompt")
    going_on = "".join(TextStream(tokenizer, keeps_space=True).push(i) for i in ids)
    at = going_on.find(stop)
    wanted = going_on if at < 0 else going_on[:at]
    done, streamed = answered(tokenizer, ids, (stop,))
    assert done.text == streamed == wanted[1:]  # of the space before the first word
    assert "".join(done.texts) == done.text
    assert (done.finish_reason == "stop") == (at >= 0)
    assert "".join(echoed_texts(tokenizer, prompt, done)) == "a prompt" + wanted


def test_any_end_token_ends_an_answer(tokenizer):
    ended = [answered(t, [9, 7, 8])[0] for t in (tokenizer, Tokenizer(tokenizer.path, stop_token_ids=[7]))]
    assert [(done.tokens, done.finish_reason, done.end_token) for done in ended] == [
        ([9, 7, 8], "length", None), ([9], "stop", 7)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"stop_token_ids \(-1\)"):
        Tokenizer(tokenizer.path, stop_token_ids=[-1])


@given(
    st.lists(st.integers(0, VOCAB_SIZE + 9), max_size=30),
    st.lists(st.text(alphabet="ab the", min_size=1, max_size=3), max_size=2),
)
@example([197, 1, 131], [])  # bytes of one character, and a control token between them
@settings(deadline=None, max_examples=300)
def test_events_carry_each_token_once_when_its_text_is_certain(tokenizer, ids, stop):
    """Whatever a stop text holds back, the tokens of all events are the answer's, and their texts its text."""
    request = Request(0, (1, 5), len(ids) + 1, stop=tuple(stop), logprobs=True)
    answer, told, text = Answer(request, len(ids) + 1, tokenizer), [], ""
    for place, token in enumerate([i for i in ids if i != tokenizer.eos_id]):
        event = answer.accept(token, -float(place))
        if event is not None:
            told += event.tokens
            text += event.text
        assert len("".join(t.text for t in told)) <= len(text), "no token before its text"
        if answer.ended:
            break
    if not answer.ended:
        event = answer.finish("length")
        told += event.tokens
        text += event.text
    done = event.completion
    assert [token.id for token in told] == done.tokens
    assert [token.logprob for token in told] == done.logprobs
    assert "".join(token.text for token in told) == done.text == text
    assert [token.text for token in told] == done.texts
