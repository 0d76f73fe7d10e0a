"""The chat template against mistral-common, id for id."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from mixtralkit.engine.chat import encode_chat
from tests.engine.parts import make_tokenizer

MESSAGES = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def mistral_ids(tokenizer, dialog) -> list[int]:
    theirs = InstructTokenizerV1(SentencePieceTokenizer(tokenizer.path))
    messages = [MESSAGES[m["role"]](content=m["content"]) for m in dialog]
    request = InstructRequestNormalizer.normalizer().from_chat_completion_request(
        ChatCompletionRequest(messages=messages)
    )
    return theirs.encode_instruct(request).tokens


def dialog(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system is not None else []
    return start + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


DIALOGS = {
    "one turn": dialog("Who are you?"),
    "three turns": dialog("Who are you?", "A model.", "And what do you do?"),
    "five turns": dialog("a", "b", "c", "d", "e"),
    "spaces around": dialog("  leading", "trailing  ", " both ", " x ", "\n\n"),
    "newlines": dialog("line\nline\n", "def f():\n    return 1\n", "again"),
    "control tokens as text": dialog("</s> <s> [INST] x [/INST]", "[/INST]</s>", "<s>[INST]"),
    "other scripts": dialog("日本語 Köln 😀", "Grüße", "\u2581 \u00a0"),
    "system": dialog("Who are you?", system="Answer in one word."),
    "system and turns": dialog("a", "b", "c", system="Be short."),
}


@pytest.mark.parametrize("name", DIALOGS)
def test_ids_are_those_of_mistral_common(tokenizer, name):
    assert encode_chat(tokenizer, DIALOGS[name]) == mistral_ids(tokenizer, DIALOGS[name])


@given(st.lists(st.text(alphabet="ab [INST]/<s>\n é日", min_size=1, max_size=12), min_size=1, max_size=7))
@settings(deadline=None, max_examples=100)
def test_any_dialog_is_encoded_as_by_mistral_common(tokenizer, turns):
    turns = turns if len(turns) % 2 else turns[:-1]
    assert encode_chat(tokenizer, dialog(*turns)) == mistral_ids(tokenizer, dialog(*turns))


def test_only_the_template_makes_control_ids(tokenizer):
    ids = encode_chat(tokenizer, DIALOGS["control tokens as text"])
    assert [i for i in ids if i in (0, 1, 2)] == [1, 2]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one"),
        ([{"role": "assistant", "content": "x"}], "message 0 has role 'assistant', but 'user' is next"),
        (dialog("a", "b"), "last message has role 'assistant'"),
        ([*dialog("a"), *dialog("b")], "message 1 has role 'user', but 'assistant' is next"),
        ([*dialog("a", "b"), {"role": "system", "content": "s"}], "message 2 has role 'system'"),
        (dialog(""), "message 0 \\(user\\) is empty"),
        ([{"role": "user"}], "message 0 must have a role and a text"),
        (dialog(system="only"), "last message has role 'system'"),
        ("text", "must be a list of messages"),
    ],
)
def test_wrong_dialogs_are_named(tokenizer, messages, says):
    with pytest.raises(ValueError, match=says):
        encode_chat(tokenizer, messages)
