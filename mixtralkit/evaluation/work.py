"""From a record to the requests that answer it, and from their completions to its line of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mixtralkit.engine.requests import Completion, Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation.likelihood import Ids, Pair, check_finite, check_pair, score_request, windows
from mixtralkit.evaluation.prompt_sets import PromptRecord
from mixtralkit.evaluation.scoring import Question, question_of, score_choices, score_generation, score_text
from mixtralkit.mixtral import Mixtral, encode_prompt


@dataclass(frozen=True)
class AnswerOptions:
    """What decides the answers, beside the model and the records.

    Attributes:
        max_gen_len: most tokens of a generation, where the record does not say.
        stop: texts that end a generation, beside the record's own ``stop``.
        temperature, top_p, top_k, min_p, seed, presence_penalty, frequency_penalty, repetition_penalty, logit_bias: how
            it is drawn (``SamplingOptions``); at temperature 0 it is the likeliest.
        window, context: tokens of a piece of a text, and fewest before each scored token (``likelihood.windows``).
    """

    max_gen_len: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[str, ...] = ()
    window: int = 1024
    context: int = 512

    def __post_init__(self) -> None:
        if self.max_gen_len < 1:
            raise ValueError(f"max_gen_len ({self.max_gen_len}) must be at least 1")
        SamplingOptions(**self.sampling)
        windows((), 0, self.window, self.context)

    @property
    def sampling(self) -> dict[str, Any]:
        """The keywords of ``Mixtral.request`` that say how to draw."""
        return {name: getattr(self, name) for name in SamplingOptions.__dataclass_fields__}


@dataclass(frozen=True)
class Work:
    """One record's need of the model: a generation from ``prompt``, or the likelihoods of ``pairs``.

    Attributes:
        name: what errors call it: the file, and the line.
        sizes: UTF-8 bytes of each choice, or of the text.
        max_gen_len, stop: of a generation.
    """

    name: str
    question: Question
    prompt: Ids = ()
    max_gen_len: int = 0
    stop: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    sizes: tuple[int, ...] = ()

    @cached_property
    def sequences(self) -> tuple[Ids, ...]:
        """Token ids of its requests: the prompt, or the pairs' sequences without repetition."""
        if self.question.kind == "generation":
            return (self.prompt,)
        return tuple(dict.fromkeys(context + continuation for context, continuation in self.pairs))

    @property
    def longest(self) -> int:
        """Most tokens that one of its requests may come to."""
        return max(map(len, self.sequences)) + self.max_gen_len

    def check(self, max_seq_len: int) -> None:
        """ValueError that names the record unless it fits the model."""
        for i, pair in enumerate(self.pairs):
            what = f"choice {i}" if self.question.kind == "choice" else f"piece {i} of the text"
            check_pair(pair, f"{self.name}: {what}", max_seq_len)
        room = max_seq_len - min(self.max_gen_len, 1)
        if len(self.prompt) > room:
            raise ValueError(
                f"{self.name}: the prompt has {len(self.prompt)} tokens, which leaves no room for an answer in "
                f"max_seq_len ({max_seq_len})"
            )

    def requests(self, mixtral: Mixtral, first_id: int, options: AnswerOptions) -> list[Request]:
        """One for each of its sequences, with ids from ``first_id`` on."""
        if self.question.kind == "generation":
            return [mixtral.request(first_id, self.prompt, self.max_gen_len, self.stop, **options.sampling)]
        return [score_request(mixtral, first_id + i, sequence) for i, sequence in enumerate(self.sequences)]

    def ran(self, index: int, completion: Completion) -> tuple[Ids, int | None]:
        """What its request ``index`` ran: token ids, and the first place of an answer or a choice, None for a text."""
        sequence = self.sequences[index]
        if self.question.kind == "generation":
            return (*sequence, *completion.tokens), len(sequence)
        if self.question.kind == "text":
            return sequence, None
        return sequence, next(
            len(context) for context, continuation in self.pairs if context + continuation == sequence
        )

    def result(self, mixtral: Mixtral, completions: Sequence[Completion]) -> dict[str, Any]:
        """Its line of results, from the completions of its requests in their order."""
        if self.question.kind == "generation":
            (done,) = completions
            return {
                "generation": done.text,
                "tokens": done.tokens,
                "logprobs": done.logprobs,
                "finish_reason": done.finish_reason,
                "scores": score_generation(self.question, done.text),
            }
        logprobs = self._logprobs(mixtral, completions)
        tokens = [len(continuation) for _, continuation in self.pairs]
        if self.question.kind == "choice":
            return {
                "choice_logprobs": logprobs,
                "choice_tokens": tokens,
                "choice_bytes": list(self.sizes),
                "scores": score_choices(self.question, logprobs, tokens, self.sizes),
            }
        total, count, (size,) = math.fsum(logprobs), sum(tokens), self.sizes
        return {
            "logprob": total,
            "num_tokens": count,
            "num_bytes": size,
            "scores": score_text(total, count, size),
        }

    def _logprobs(self, mixtral: Mixtral, completions: Sequence[Completion]) -> list[float]:
        """The sum of each pair's continuation, nats."""
        of = {s: done.prompt_logprobs for s, done in zip(self.sequences, completions, strict=True)}
        sums = []
        for context, continuation in self.pairs:
            values = of[context + continuation][len(context) :]
            check_finite(values, self.name, mixtral)
            sums.append(math.fsum(values))
        return sums


def make_works(
    records: Sequence[PromptRecord], path: str | Path, tokenizer: Tokenizer, options: AnswerOptions
) -> list[Work]:
    """What each record of the file ``path`` needs; ValueError, one sentence, names file and line."""
    works = []
    for record in records:
        name = f"{path}, line {record.line}"
        try:
            works.append(_work(name, record, question_of(record), tokenizer, options))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return works


def _work(name: str, record: PromptRecord, question: Question, tokenizer: Tokenizer, options: AnswerOptions) -> Work:
    if question.kind == "text":
        ids = tokenizer.encode(record.prompt, bos=False)
        if not ids:
            raise ValueError(f"the text ({record.prompt!r}) has no tokens")
        pairs = windows(ids, tokenizer.bos_id, options.window, options.context)
        return Work(name, question, pairs=tuple(pairs), sizes=(_size(record.prompt),))
    if question.kind == "choice":
        pairs = choice_pairs(tokenizer, record.prompt, question.choices)
        return Work(name, question, pairs=tuple(pairs), sizes=tuple(map(_size, question.choices)))
    length = options.max_gen_len if record.max_gen_len is None else record.max_gen_len
    prompt = encode_prompt(tokenizer, record.id, record.prompt)
    return Work(name, question, prompt, length, (*options.stop, *_stops(record)))


def choice_pairs(tokenizer: Tokenizer, prompt: str | list[dict[str, str]], choices: Sequence[str]) -> list[Pair]:
    """(context, continuation) of each choice, the context being the same for all.

    A choice follows a text as it is, and both are encoded together: the context is what the encoded wholes and the
    prompt have in common, so that a token which holds the prompt's last space and a choice's first word is scored. In
    a dialog a choice is the assistant's answer and is encoded by itself.
    """
    context = encode_prompt(tokenizer, 0, prompt)
    if not isinstance(prompt, str):
        return [(context, tuple(tokenizer.encode(choice, bos=False))) for choice in choices]
    wholes = [encode_prompt(tokenizer, 0, prompt + choice) for choice in choices]
    shared = min(_shared(context, whole) for whole in wholes)
    return [(whole[:shared], whole[shared:]) for whole in wholes]


def _shared(a: Ids, b: Ids) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _stops(record: PromptRecord) -> tuple[str, ...]:
    stop = record.more.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else (None,)
    if not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop ({stop!r}) must be a text or a list of texts, none of them empty")
    return stops
