"""The tokenizer inside a llama.cpp file: ids and texts of the model that it was made of, and of transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mixtralkit.checkpoint.gguf_vocabulary import keys_of, sentencepiece_model
from mixtralkit.engine.chat import encode_chat
from mixtralkit.engine.tokenizer import Tokenizer
from tests.checkpoint.gguf_files import write_vocabulary
from tests.engine.parts import TEXT, make_tokenizer

pytest.importorskip("gguf")
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}</s>{% endfor %}"


def texts(count: int) -> list[str]:
    """Pieces of real text and of odd letters, joined at random, with spaces in all places."""
    rng = random.Random(3)
    words = [
        *TEXT.split(),
        " ",
        "  ",
        "\n",
        "\t",
        "é",
        "日本",
        "🙂",
        "\u2581",
        "<s>",
        "</s>",
        "\x00",
        "a\u0301",
        "ﬁ",
        "\u00a0",
    ]
    made = [
        "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 12))) for _ in range(count)
    ]
    return ["", " ", "a", *made]


@pytest.mark.parametrize("shipped", [False, True])
def test_ids_and_texts_are_those_of_the_model_it_was_made_of(tmp_path: Path, shipped: bool) -> None:
    theirs = Tokenizer("ckpts/tokenizer.model") if shipped else make_tokenizer(tmp_path)
    write_vocabulary(tmp_path / "model.gguf", theirs)
    ours = Tokenizer.beside(tmp_path / "model.gguf")
    assert (ours.n_words, ours.bos_id, ours.eos_id, ours.unk_id, ours.end_ids) == (theirs.n_words, 1, 2, 0, {2})
    assert ours.piece_bytes == theirs.piece_bytes
    for text in texts(400):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode_inside(text) == theirs.encode_inside(text)
        assert ours.decode(ids) == theirs.decode(ids)


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    """Its own reading of the same file."""
    from transformers import AutoTokenizer

    write_vocabulary(tmp_path / "model.gguf", make_tokenizer(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = Tokenizer.beside(tmp_path / "model.gguf")
    for text in TEXT.replace("</s>", "").splitlines()[:8]:
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False)


def test_template_end_tokens_and_control_tokens_are_followed(tmp_path: Path) -> None:
    theirs = make_tokenizer(tmp_path)
    size = theirs.n_words
    path = tmp_path / "model.gguf"
    write_vocabulary(path, theirs, ("<|im_start|>", "<|im_end|>"), template=TEMPLATE, eos=size + 1, add_bos_token=False)
    ours = Tokenizer.beside(path)
    assert (ours.n_words, ours.eos_id, ours.end_ids, ours.add_bos) == (size + 2, size + 1, {size + 1}, False)
    assert (ours.chat_template, ours.template_from) == (TEMPLATE, path)
    assert encode_chat(ours, [{"role": "user", "content": "Who are you?"}]) == [
        1, size, *theirs.encode("Who are you?", bos=False), 2,
    ]  # fmt: skip
    assert ours.encode("<|im_start|>", bos=False) == theirs.encode("<|im_start|>", bos=False), (
        "text is no control token"
    )
    write_vocabulary(tmp_path / "b.gguf", theirs, add_space_prefix=False)
    assert Tokenizer.beside(tmp_path / "b.gguf").encode("Who", bos=False) != theirs.encode("Who", bos=False)


def test_a_folder_s_own_tokenizer_goes_first(tmp_path: Path) -> None:
    theirs = make_tokenizer(tmp_path)
    write_vocabulary(tmp_path / "model.gguf", theirs, template=TEMPLATE)
    assert Tokenizer.beside(tmp_path).path.name == "tokenizer.model"
    (tmp_path / "tokenizer.model").unlink()
    assert Tokenizer.beside(tmp_path).path.name == "model.gguf"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 13]}))
    assert Tokenizer.beside(tmp_path).end_ids == {2, 13}
    assert Tokenizer.beside(tmp_path / "model.gguf").end_ids == {2}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "gpt2"}, r"tokenizer\.ggml\.model \('gpt2'\) must be 'llama'"),
        ({"scores": [0.5]}, "has 384 tokens, 1 scores and 384 types"),
        ({"types": [1] * 384}, "0 tokens are of the unknown type, wanted one"),
        ({"tokens": ["a"] * 384}, "token 'a' is there twice or has no text"),
        ({"scores": ["a"] * 384}, r"tokenizer\.ggml\.scores \(.*\) must be a list of numbers"),
        ({"eos": 384}, r"tokenizer\.ggml\.eos_token_id \(384\) must be one of 384 tokens"),
    ],
)
def test_damaged_vocabularies_get_one_sentence(tmp_path: Path, changes: dict, says: str) -> None:
    path = tmp_path / "model.gguf"
    write_vocabulary(path, make_tokenizer(tmp_path), **changes)
    with pytest.raises(ValueError, match=says) as caught:
        sentencepiece_model(path, keys_of(path))
    assert str(path) in str(caught.value)
