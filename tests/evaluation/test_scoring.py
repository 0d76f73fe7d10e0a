"""Scores of single answers: each metric on cases worked out by hand, and records that cannot be scored."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest

from mixtralkit.evaluation import scoring
from mixtralkit.evaluation.prompt_sets import PromptRecord
from mixtralkit.evaluation.scoring import (
    GENERATION_METRICS,
    Question,
    final_number,
    likeliest,
    question_of,
    score_choices,
    score_generation,
    score_text,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", "72"),
        ("3 + 4 = 7, so #### 8 then 9", "8"),
        ("18 eggs\n#### 1,234", "1234"),
        ("#### none; it was 5", "5"),
        ("first 5\n####", "5"),
        ("#### 5\n\nQuestion: and 6?\n#### 7", "5"),
        ("It costs $1,234.50 in all", "1234.5"),
        ("-$5", "-5"),
        ("$-5.25", "-5.25"),
        ("−3 degrees", "-3"),
        ("10-3", "3"),
        ("(2)-3", "3"),
        ("- 7 apples", "7"),
        ("about 50%", "50"),
        ("50.0 %", "50"),
        (".5", "0.5"),
        ("1e3", "1000"),
        ("1,2345", "2345"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("metric", "generation", "target", "score"),
    [
        ("exact_match", " Paris\n", "Paris", 1.0),
        ("exact_match", "Paris.", "Paris", 0.0),
        ("exact_match", "", "", 1.0),
        ("contains", "It is Paris.", "Paris", 1.0),
        ("contains", "It is paris.", "Paris", 0.0),
        ("regex", "call 555-1234", r"\d{3}-\d{4}$", 1.0),
        ("regex", "call 555-123", r"\d{3}-\d{4}$", 0.0),
        ("numeric", "so 1,000.0 apples", "#### 1000", 1.0),
        ("numeric", "so 999 apples", "1000", 0.0),
        ("numeric", "no idea", "1000", 0.0),
        # three of four words of the target in order, all three of the generation: P 1, R 3/4
        ("rouge_l", "The cat sat", "the cat sat down", 2 * 0.75 / 1.75),
        ("rouge_l", "sat cat the", "the cat sat", 1 / 3),
        ("rouge_l", "", "the cat", 0.0),
        ("chrf", "the cat", "the cat", 1.0),
        ("chrf", "", "the cat", 0.0),
        ("chrf", "xyz", "the cat", 0.0),
    ],
)
def test_metrics_of_generations(metric, generation, target, score):
    question = question_of(PromptRecord(0, "p", target=target, more={"metric": metric}))
    assert score_generation(question, generation) == {metric: pytest.approx(score)}


def test_chrf_is_the_mean_f2_of_character_ngrams():
    """chrF2 of one sentence by its definition: orders 1 to 6 without spaces, precision and recall averaged apart."""
    generation, target = "the cat sat on a mat", "the cat is on the mat"
    precisions, recalls = [], []
    for order in range(1, 7):
        a, b = (
            [text.replace(" ", "")[i : i + order] for i in range(len(text.replace(" ", "")) - order + 1)]
            for text in (generation, target)
        )
        hits = sum(min(a.count(gram), b.count(gram)) for gram in set(a))
        precisions.append(hits / len(a))
        recalls.append(hits / len(b))
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    expected = 5 * precision * recall / (4 * precision + recall)
    assert GENERATION_METRICS["chrf"](generation, target) == pytest.approx(expected)


def test_the_best_target_counts_for_each_metric():
    record = PromptRecord(0, "p", target=["Lyon", "Paris, France"], more={"metric": ["exact_match", "contains"]})
    assert score_generation(question_of(record), "Paris, France") == {"exact_match": 1.0, "contains": 1.0}
    assert score_generation(question_of(record), "in Lyon") == {"exact_match": 0.0, "contains": 1.0}


def choice(answer, choices=("a", "bb", "cccc")) -> Question:
    return question_of(PromptRecord(0, "p", choices=list(choices), answer=answer))


def test_choices_by_sum_by_token_and_by_byte():
    logprobs, tokens, sizes = [-3.0, -5.0, -6.0], [1, 2, 2], [1, 2, 6]  # per token -3 -2.5 -3, per byte -3 -2.5 -1
    names = ("accuracy", "accuracy_per_token", "accuracy_per_byte")
    for right, scores in ((0, (1, 0, 0)), (1, (0, 1, 0)), (2, (0, 0, 1))):
        assert score_choices(choice(right), logprobs, tokens, sizes) == dict(zip(names, scores, strict=True))


@pytest.mark.parametrize("answer", [1, "bb", [1], ["bb"], [2, "bb"]])
def test_an_answer_is_an_index_or_a_text_or_several(answer):
    assert score_choices(choice(answer), [-2.0, -1.0, -3.0], [1, 1, 1], [1, 1, 1])["accuracy"] == 1.0


def test_the_first_of_choices_that_differ_by_rounding_counts():
    assert likeliest([-2.0, -1.0000001, -1.0]) == 1
    assert likeliest([-2.0, -1.001, -1.0]) == 2


def test_scores_of_a_text():
    found = score_text(-12.0, 4, 10)
    assert found == {
        "nats_per_token": 3.0,
        "perplexity": pytest.approx(math.exp(3)),
        "bits_per_byte": pytest.approx(12 / math.log(2) / 10),
    }
    assert math.isfinite(score_text(-1e6, 4, 10)["perplexity"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "has nothing to score"),
        ({"more": {"metric": "exact_match"}}, "has nothing to score"),
        ({"answer": "Paris"}, "has an answer but no choices"),
        ({"target": "a"}, "has a target but no metric: exact_match, contains"),
        ({"target": "a", "more": {"metric": "bleu"}}, r"metric \('bleu'\) must be one of exact_match"),
        ({"target": "a", "more": {"metric": []}}, r"metric \(\[\]\) must be a name"),
        ({"target": "a", "more": {"metric": 3}}, r"metric \(3\)"),
        ({"target": 5, "more": {"metric": "contains"}}, r"target \(5\) must be a text"),
        ({"target": [], "more": {"metric": "contains"}}, r"target \(\[\]\)"),
        ({"target": "(", "more": {"metric": "regex"}}, r"target \('\('\) is no regular expression"),
        ({"target": "none", "more": {"metric": "numeric"}}, r"target \('none'\) has no number"),
        ({"choices": ["a", "b"]}, "has choices but no answer"),
        ({"choices": ["a", "b"], "answer": 2}, r"answer \(2\) must lie in 0 … 1: there are 2 choices"),
        ({"choices": ["a", "b"], "answer": -1}, r"answer \(-1\) must lie in"),
        ({"choices": ["a", "b"], "answer": "c"}, r"answer \('c'\) is not among the choices"),
        ({"choices": ["a", "b"], "answer": True}, r"answer \(True\) must be an index"),
        ({"choices": ["a", "b"], "answer": [0, 5]}, r"answer \(5\)"),
        ({"choices": ["a"], "answer": 0}, r"choices \(\['a'\]\) must be at least 2"),
        ({"choices": ["a", ""], "answer": 0}, "choices .* none of them empty"),
        ({"choices": "ab", "answer": 0}, "choices"),
        ({"choices": ["a", "b"], "answer": 0, "target": "a"}, "choices and target exclude each other"),
        ({"choices": ["a", "b"], "answer": 0, "more": {"metric": "contains"}}, "is for generations"),
        ({"is_text": True, "target": "a"}, "target and perplexity of the text exclude"),
        ({"is_text": True, "more": {"metric": "contains"}}, "stands alone"),
        ({"more": {"metric": ["perplexity", "contains"]}}, "stands alone"),
    ],
)
def test_records_that_cannot_be_scored(fields, says):
    with pytest.raises(ValueError, match=says):
        question_of(PromptRecord(0, "p", **fields))


def test_a_dialog_has_no_perplexity():
    with pytest.raises(ValueError, match="needs a text or a prompt, not messages"):
        question_of(PromptRecord(0, [{"role": "user", "content": "hi"}], more={"metric": "perplexity"}))


@pytest.mark.parametrize(
    "record", [PromptRecord(0, "p", is_text=True), PromptRecord(0, "p", more={"metric": "perplexity"})]
)
def test_texts_and_prompts_have_a_perplexity(record):
    assert question_of(record).kind == "text"


def test_expressions_that_never_end_and_numbers_beyond_all_sense(monkeypatch):
    """They hung the run, or were tracebacks."""
    monkeypatch.setattr(scoring, "MOST_MATCHING_S", 0.2)
    with pytest.raises(ValueError, match=r"took over 0\.2 s to match"):
        scoring.regex("a" * 60, r"^(a|a|aa)+[xb]$")
    for pattern in ("a{99999999999999999999}", "a{1,20000}", "(" * 20_000, "*", "(?P<a"):
        with pytest.raises(ValueError, match="is no regular expression"):
            question_of(PromptRecord(0, "p", target=pattern, more={"metric": "regex"}))
    assert scoring.final_number("1e99999999999999999999999") is None
    assert scoring.numeric("1e" + "9" * 5000, "7") == 0.0
