"""Stop strings and the life of a request."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtralkit.engine.requests import Request, StopFilter, check_prompt

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
