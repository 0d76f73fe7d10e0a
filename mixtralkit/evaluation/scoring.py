"""What a record asks for, and the scores of one answer to it: pure functions of texts and numbers.

Scores lie in 0 … 1 and more is better, but for those of texts: nats per token, perplexity and bits per byte.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from mixtralkit.evaluation.prompt_sets import PromptRecord
from mixtralkit.json_file import shown

CHOICE_METRICS = ("accuracy", "accuracy_per_token", "accuracy_per_byte")
TEXT_METRICS = ("nats_per_token", "perplexity", "bits_per_byte")
PERPLEXITY = "perplexity"  # as a record's metric: score the prompt itself

# Log-likelihoods closer than this (nats) differ by float32 rounding; the first choice of them counts.
TIE = 1e-5
MOST_MATCHING_S, MOST_PATTERN, MOST_REPEATS = 5.0, 10_000, 10_000  # of a regular expression
MOST_EXPONENT = 10_000  # of a number in a text
_LARGEST_EXPONENT = 700.0  # of e in float64

# 1,234.5 or 1234.5 or .5, perhaps with an exponent; the sign only where it is not between two operands
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w.)])[-−])?(?:[$€£](?P<inner>[-−])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<exponent>[eE][+-]?\d{1,4300})?"
)


@dataclass(frozen=True)
class Question:
    """What a record asks for.

    Attributes:
        kind: ``"generation"``, ``"choice"`` or ``"text"``.
        metrics: names of its scores.
        targets: of a generation; the best match counts.
        choices: of a choice.
        right: indices of the right choices.
    """

    kind: str
    metrics: tuple[str, ...]
    targets: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: frozenset[int] = frozenset()


def question_of(record: PromptRecord) -> Question:
    """Reads a record's scored fields; ValueError, one sentence without file and line, says what is wrong with them."""
    metrics = _metrics(record.more.get("metric"))
    if record.is_text or PERPLEXITY in metrics:
        return _text_question(record, metrics)
    if record.choices is not None:
        return _choice_question(record, metrics)
    if record.target is not None:
        return _generation_question(record, metrics)
    if record.answer is not None:
        raise ValueError("has an answer but no choices; what a generation is compared with is its target")
    raise ValueError(
        "has nothing to score: target (with metric) for a generation, choices and answer, or text for its perplexity"
    )


def _metrics(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"metric ({value!r}) must be a name or a list of names")
    known = (*GENERATION_METRICS, PERPLEXITY)
    for name in names:
        if name not in known:
            raise ValueError(f"metric ({name!r}) must be one of {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def _text_question(record: PromptRecord, metrics: tuple[str, ...]) -> Question:
    if set(metrics) - {PERPLEXITY}:
        raise ValueError(f"metric ({', '.join(metrics)}): {PERPLEXITY} scores the text itself and stands alone")
    if not isinstance(record.prompt, str):
        raise ValueError(f"metric ({PERPLEXITY}) needs a text or a prompt, not messages")
    for name in ("choices", "target"):
        if getattr(record, name) is not None:
            raise ValueError(f"{name} and {PERPLEXITY} of the text exclude each other")
    return Question("text", TEXT_METRICS)


def _choice_question(record: PromptRecord, metrics: tuple[str, ...]) -> Question:
    choices, answer = record.choices, record.answer
    if metrics:
        raise ValueError(f"metric ({', '.join(metrics)}) is for generations; choices are scored by log-likelihood")
    if record.target is not None:
        raise ValueError("choices and target exclude each other; the right choice is the answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"choices ({choices!r}) must be at least 2 texts, none of them empty")
    if answer is None or answer == []:
        raise ValueError("has choices but no answer: the right one's index from 0, or its text")
    answers = answer if isinstance(answer, list) else [answer]
    return Question(
        "choice", CHOICE_METRICS, choices=tuple(choices), right=frozenset(_place(a, choices) for a in answers)
    )


def _place(answer: Any, choices: Sequence[str]) -> int:
    if isinstance(answer, str):
        if answer not in choices:
            raise ValueError(f"answer ({answer!r}) is not among the choices")
        return choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise ValueError(f"answer ({answer!r}) must be an index or the text of a choice, or a list of these")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer ({answer}) must lie in 0 … {len(choices) - 1}: there are {len(choices)} choices")
    return answer


def _generation_question(record: PromptRecord, metrics: tuple[str, ...]) -> Question:
    targets = record.target if isinstance(record.target, list) else [record.target]
    if not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"target ({record.target!r}) must be a text or a list of texts")
    if not metrics:
        raise ValueError(f"has a target but no metric: {', '.join(GENERATION_METRICS)}")
    for name in metrics:
        _CHECKS.get(name, _nothing)(targets)
    return Question("generation", metrics, targets=tuple(targets))


def score_generation(question: Question, generation: str) -> dict[str, float]:
    """Score by metric; with several targets the best one's."""
    return {
        name: max(GENERATION_METRICS[name](generation, target) for target in question.targets)
        for name in question.metrics
    }


def score_choices(
    question: Question, logprobs: Sequence[float], tokens: Sequence[int], sizes: Sequence[int]
) -> dict[str, float]:
    """1.0 or 0.0: is a right choice the likeliest, by the sum, by the mean of its tokens, by the mean of its bytes.

    Args:
        logprobs: sums of the choices' tokens, nats.
        tokens, sizes: of the choices; sizes are UTF-8 bytes.
    """
    per_token = [value / count for value, count in zip(logprobs, tokens, strict=True)]
    per_byte = [value / size for value, size in zip(logprobs, sizes, strict=True)]
    picks = [likeliest(values) for values in (logprobs, per_token, per_byte)]
    return {name: float(pick in question.right) for name, pick in zip(CHOICE_METRICS, picks, strict=True)}


def likeliest(values: Sequence[float]) -> int:
    """Index of the largest value, the first of those within ``TIE``."""
    most = max(values)
    return next(i for i, value in enumerate(values) if value >= most - TIE)


def score_text(logprob: float, tokens: int, size: int) -> dict[str, float]:
    """Nats per token, perplexity (e to that), and bits per UTF-8 byte, of a text or of several together.

    Args:
        logprob: sum over all tokens, nats.
        tokens, size: of the text; the size is in UTF-8 bytes.
    """
    return {
        "nats_per_token": -logprob / tokens,
        "perplexity": perplexity(-logprob / tokens),
        "bits_per_byte": -logprob / (math.log(2) * size),
    }


def perplexity(nats_per_token: float) -> float:
    """e to the mean, held below float64's end so that a hopeless model has a number too."""
    return math.exp(min(nats_per_token, _LARGEST_EXPONENT))


def exact_match(generation: str, target: str) -> float:
    """Equal but for white space around."""
    return float(generation.strip() == target.strip())


def contains(generation: str, target: str) -> float:
    """The target is somewhere in the generation."""
    return float(target in generation)


def regex(generation: str, target: str) -> float:
    """The target, a Python regular expression, matches somewhere; ValueError where it backtracks without an end."""
    try:
        return float(_compiled(target).search(generation, timeout=MOST_MATCHING_S) is not None)
    except TimeoutError:
        raise ValueError(f"target ({shown(target)}): took over {MOST_MATCHING_S:g} s to match; it backtracks") from None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    """The pattern of the library that can stop matching; ValueError says why it is none."""
    import regex as library

    counts = [int(count) for part in re.findall(r"\{(\d*),?(\d*)\}", pattern) for count in part if count.isdigit()]
    if len(pattern) > MOST_PATTERN or max(counts, default=0) > MOST_REPEATS:
        raise ValueError(f"longer than {MOST_PATTERN} characters, or repeats more than {MOST_REPEATS} times")
    try:
        return library.compile(pattern)
    except (library.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(str(error)) from None


def numeric(generation: str, target: str) -> float:
    """Both end in the same number (``final_number``)."""
    found = final_number(generation)
    return float(found is not None and found == final_number(target))


def final_number(text: str) -> Decimal | None:
    """The number after the first ``####`` (GSM8K's mark), else the last one; None without any.

    Thousands commas, currency and percent signs are dropped: ``-$1,234.50`` is -1234.5, ``50%`` is 50. A number whose
    exponent is beyond ``MOST_EXPONENT`` is none.
    """
    _, _, marked = text.partition("####")
    match = _NUMBER.search(marked)
    if match is None:
        match = next(reversed(list(_NUMBER.finditer(text))), None)
    if match is None:
        return None
    if abs(int(match["exponent"][1:] if match["exponent"] else 0)) > MOST_EXPONENT:
        return None
    sign = "-" if match["minus"] or match["inner"] else ""
    return Decimal(sign + match["digits"].replace(",", "") + (match["exponent"] or ""))


def rouge_l(generation: str, target: str) -> float:
    """ROUGE-L's F1 of google's rouge-score: longest common subsequence of lower-case words of a-z and 0-9."""
    return float(_rouge_scorer().score(target, generation)["rougeL"].fmeasure)


def chrf(generation: str, target: str) -> float:
    """sacrebleu's chrF2 of the one sentence, over 100."""
    return _chrf_metric().sentence_score(generation, [target]).score / 100


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("metric (rouge_l) needs rouge-score: pip install 'mixtralkit[eval]'") from None
    return RougeScorer(["rougeL"], use_stemmer=False)


@functools.cache
def _chrf_metric() -> Any:
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise ValueError("metric (chrf) needs sacrebleu: pip install 'mixtralkit[eval]'") from None
    return CHRF()


def _check_patterns(targets: Sequence[str]) -> None:
    for target in targets:
        try:
            _compiled(target)
        except ValueError as error:
            raise ValueError(f"target ({shown(target)}) is no regular expression: {error}") from None


def _check_numbers(targets: Sequence[str]) -> None:
    for target in targets:
        if final_number(target) is None:
            raise ValueError(f"target ({target!r}) has no number, which metric numeric compares")


def _nothing(targets: Sequence[str]) -> None:
    pass


GENERATION_METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "regex": regex,
    "numeric": numeric,
    "rouge_l": rouge_l,
    "chrf": chrf,
}
_CHECKS: Mapping[str, Callable[[Sequence[str]], Any]] = {
    "regex": _check_patterns,
    "numeric": _check_numbers,
    "rouge_l": lambda _: _rouge_scorer(),
    "chrf": lambda _: _chrf_metric(),
}
