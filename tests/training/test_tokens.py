import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtralkit.training import tokens as tokens_module
from mixtralkit.training.corpus import Document
from mixtralkit.training.tokens import BOS_ID, EOS_ID, Encoder, TokenSet, train_tokenizer
from tests.training.samples import small_corpus, small_tokens


def decode(ids: list[int]) -> bytes:
    """The bytes that ids stand for, without sentencepiece's own decoding: the oracle."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=small_tokens().tokenizer)
    out = b""
    for piece in (pieces.id_to_piece(i) for i in ids):
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        out += bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("\u2581", " ").encode()
    return out


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
def test_any_bytes_come_back(text):
    ids = Encoder(small_tokens().tokenizer).text(text)
    if b"\xe2\x96\x81" in text or not text:  # sentencepiece's own sign for a space
        return
    out = decode(ids)
    assert out in (text, b" " + text)


def test_long_text_is_encoded_as_a_whole(monkeypatch):
    text = b"  indented\n\n\n    deeper\nrow 12 of 84\n" * 20
    whole = Encoder(small_tokens().tokenizer).text(text)
    monkeypatch.setattr(tokens_module, "_CHUNK", 50)
    assert Encoder(small_tokens().tokenizer).text(text) == whole
    assert decode(whole) == b" " + text


def test_tokenizer_keeps_whitespace_and_splits_digits():
    pieces = sentencepiece.SentencePieceProcessor(model_proto=small_tokens().tokenizer)
    text = "def f(x):\n        return  1234\n"
    assert pieces.decode(pieces.encode(text)) == text
    assert not any(any(c.isdigit() for c in p.strip("\u2581")) and len(p.strip("\u2581")) > 1
                   for p in map(pieces.id_to_piece, range(259, pieces.vocab_size())))  # fmt: skip
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, BOS_ID, EOS_ID)
    assert any(p.strip("\u2581") == "" and len(p) >= 4 for p in map(pieces.id_to_piece, range(pieces.vocab_size())))


def test_dialogue_is_in_the_chat_template_of_the_engine(tmp_path):
    from mixtralkit.engine.chat import encode_chat
    from mixtralkit.engine.tokenizer import Tokenizer

    (tmp_path / "tokenizer.model").write_bytes(small_tokens().tokenizer)
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.model"))
    turns = ("What is row 3?", "A row.", "And 4?", "Another.")
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    ids = Encoder(small_tokens().tokenizer).document(Document("d", turns=turns))
    prompt = encode_chat(tokenizer, messages[:3])
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == [*tokenizer.encode("Another.", bos=False, eos=False), EOS_ID]


def test_token_file_round_trips(tmp_path):
    made = small_tokens()
    made.save(tmp_path / "tokens.npz")
    read = TokenSet.load(tmp_path / "tokens.npz")
    assert read.tokenizer == made.tokenizer
    assert read.heldout_bytes == made.heldout_bytes
    for name in ("train", "heldout"):
        assert list(getattr(read, name)) == list(getattr(made, name))
        for domain, ids in getattr(made, name).items():
            np.testing.assert_array_equal(getattr(read, name)[domain], ids)


def test_heldout_bytes_are_those_of_the_documents():
    assert small_tokens().heldout_bytes["code"] == 800


def test_bad_inputs_are_named(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"x\.npz: not a file of tokens"):
        TokenSet.load(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(small_corpus(), 100)
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Encoder(b"nonsense")
