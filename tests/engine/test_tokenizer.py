"""The tokenizer against sentencepiece itself."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtralkit.engine.tokenizer import TextStream, Tokenizer
from mixtralkit.layers import Tokenizer as LlamaStyleTokenizer
from tests.engine.parts import VOCAB_SIZE, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_has_what_llama_style_code_reads(tokenizer):
    assert LlamaStyleTokenizer is Tokenizer
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (VOCAB_SIZE, 1, 2, -1)
    plain = tokenizer.sp_model.encode("Who are you?")
    assert tokenizer.encode("Who are you?", True, True) == [1, *plain, 2]
    assert tokenizer.encode("Who are you?", bos=False, eos=False) == plain


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=150)
def test_text_comes_back(tokenizer, text):
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == text.replace("\u2581", " ")  # sentencepiece's own mark for a space is one


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30))
@example([197, 1, 131])  # the two bytes of one character with a control token between them
@settings(deadline=None, max_examples=300)
def test_any_ids_decode_as_sentencepiece_decodes_them(tokenizer, ids):
    expected = tokenizer.sp_model.decode(ids)
    assert tokenizer.decode(ids) == expected
    stream = TextStream(tokenizer)
    assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == expected


def test_a_character_of_several_tokens_appears_whole(tokenizer):
    ids = tokenizer.encode("é 😀", bos=False)
    stream = TextStream(tokenizer)
    deltas = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(deltas)
    assert "".join(deltas) == "é 😀"
    assert "" in deltas
    cut = TextStream(tokenizer)
    assert [cut.push(i) for i in ids[:-1]][-1] == ""
    assert cut.finish() == "\ufffd" * 3


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "[INST] a [/INST]", "a</s><s>b", "<0x0A>"])
def test_text_never_becomes_a_control_id(tokenizer, text):
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text


def test_half_a_surrogate_pair_is_encoded_as_a_question_mark(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d")) == "a?"


def test_wrong_files_and_values_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.model\): no such file"):
        Tokenizer(tmp_path / "missing.model")
    (tmp_path / "broken.model").write_bytes(b"\x07nonsense" * 100)
    with pytest.raises(ValueError, match=r"broken\.model\): not a sentencepiece model"):
        Tokenizer(tmp_path / "broken.model")
    with pytest.raises(ValueError, match=f"has {VOCAB_SIZE} tokens, but the model's vocab_size is 300"):
        tokenizer.check_vocabulary(300)
    with pytest.warns(UserWarning, match=f"has {VOCAB_SIZE} tokens, the model's vocab_size is 32000"):
        tokenizer.check_vocabulary(32000)
    with pytest.raises(ValueError, match="token id \\(-7\\)"):
        tokenizer.decode([-7])
    with pytest.raises(ValueError, match="must be a string, not int"):
        tokenizer.encode(3)
