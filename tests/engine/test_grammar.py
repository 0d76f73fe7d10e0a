"""Answers that fit a JSON schema, whatever a model wants: random tokens of those that are allowed."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from mixtralkit.engine.grammar import ANY_OBJECT, Grammars
from mixtralkit.engine.tokenizer import Tokenizer

CKPTS = Path(__file__).resolve().parents[2] / "ckpts"

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["käse", "b c", True, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
UNKNOWN = 37  # ids of the model that the tokenizer does not know


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.beside(CKPTS)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.n_words + UNKNOWN)


def allowed_ids(mask_W: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little")).tolist()


def answer(grammars: Grammars, tokenizer: Tokenizer, schema: str, seed: int, most: int = 300) -> tuple[list[int], bool]:
    """Random allowed tokens to an end, which is taken wherever it may be; whether it came."""
    rng, grammar, ids = random.Random(seed), grammars.begin(schema), []
    for _ in range(most):
        mask_W = grammar.allowed(ids)
        assert mask_W.dtype == np.int32
        assert len(mask_W) == -(-(tokenizer.n_words + UNKNOWN) // 32)
        found = allowed_ids(mask_W)
        assert max(found) < tokenizer.n_words
        if tokenizer.end_ids & set(found):
            return ids, True
        ids.append(rng.choice(found))
    return ids, False


@pytest.mark.parametrize("seed", range(8))
def test_any_allowed_tokens_make_what_the_schema_says(grammars, tokenizer, seed):
    ids, ended = answer(grammars, tokenizer, json.dumps(PERSON), seed)
    assert ended
    jsonschema.validate(json.loads(tokenizer.decode(ids)), PERSON)
    assert not tokenizer.decode(ids).startswith(" ")


def test_any_object():
    tokenizer = Tokenizer.beside(CKPTS)
    grammars = Grammars(tokenizer, tokenizer.n_words + UNKNOWN)
    texts = [tokenizer.decode(answer(grammars, tokenizer, ANY_OBJECT, seed, 3000)[0]) for seed in range(6)]
    whole = [json.loads(text) for text in texts if text.endswith("}")]
    assert all(isinstance(found, dict) for found in whole)
    assert len(whole) > 2, "most end somewhere"


def test_an_answer_that_is_computed_again_goes_on(grammars, tokenizer):
    ids, _ = answer(grammars, tokenizer, json.dumps(PERSON), 3)
    step_by_step, at_once = grammars.begin(json.dumps(PERSON)), grammars.begin(json.dumps(PERSON))
    for length in range(len(ids)):
        last = step_by_step.allowed(ids[: length + 1])
    assert np.array_equal(at_once.allowed(ids), last)
    assert np.array_equal(at_once.allowed(ids), last)  # asked twice


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("{", "json_schema"), ("[]", "is no JSON object"), ("3", "is no JSON object"),
        ('{"type": "strange"}', "strange"), ('{"type": "string", "pattern": "(a"}', "regex"),
        ('{"$ref": "http://somewhere/else"}', "not present|fetch"), ('{"a":' * 5000 + "1" + "}" * 5000, "json_schema"),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_is_no_schema_is_one_sentence(grammars, schema, says):
    for ask in (grammars.check, grammars.begin):
        with pytest.raises(ValueError, match=says) as caught:
            ask(schema)
        assert len(str(caught.value)) < 450
        assert "\n" not in str(caught.value)


def test_tokens_against_the_grammar_are_an_error_that_is_told(grammars, tokenizer):
    grammar = grammars.begin(ANY_OBJECT)
    with pytest.raises(ValueError, match="json_schema"):
        grammar.allowed([tokenizer.encode_inside("x")[0]])


def test_without_the_library_a_sentence_says_so(grammars, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ValueError, match=r"json_schema needs the package llguidance: pip install 'mixtralkit\[serve\]'"
    ):
        grammars.check(ANY_OBJECT)
