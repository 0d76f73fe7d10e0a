"""A request, how far it has come, and what it gives in the end."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import msgspec
import numpy as np

from mixtralkit.engine.sampler import Asked, SamplingOptions
from mixtralkit.engine.tokenizer import TextStream, Tokenizer

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        id: unique among the requests of a run; with the seed it decides what is drawn, so the same id gives the same
            text in any batch.
        prompt: token ids, at least one.
        max_gen_len: most tokens to generate; the model's ``max_seq_len`` or the cache's room may end it earlier.
        stop: texts that end the answer; they are not part of its text.
        prompt_logprobs: also give the log-probabilities of the prompt's tokens.
        stop_token_ids: ids that end the answer, beside the tokenizer's own.
        draw_id: takes the place of ``id`` in what is drawn.
        logprobs: events carry each token with its log-probability.
        top_logprobs: how many of the likeliest tokens are told with each token, the prompt's too where
            ``prompt_logprobs`` asks for these.
        ignore_eos: the tokenizer's end tokens are tokens like others.
        min_tokens: no end token comes before so many others.
        json_schema: a JSON text that the answer is to fit.
        grammar: llguidance's grammar (Lark) that the answer is to fit, instead.
        routed_experts: also tell which experts each token took. The whole prompt is computed for it.
    """

    id: int
    prompt: tuple[int, ...]
    max_gen_len: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    stop_token_ids: tuple[int, ...] = ()
    draw_id: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    json_schema: str | None = None
    grammar: str | None = None
    routed_experts: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.max_gen_len, bool) or not isinstance(self.max_gen_len, int) or self.max_gen_len < 0:
            raise ValueError(f"max_gen_len ({self.max_gen_len!r}) must be a whole number of at least 0")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop ({self.stop!r}) must be texts of at least one character")
        if not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs ({self.top_logprobs}) must lie in 0 … {MOST_TOP_LOGPROBS}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ValueError(f"min_tokens ({self.min_tokens!r}) must be a whole number of at least 0")
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("json_schema and grammar cannot both bound an answer")
        if self.bound is not None and (self.min_tokens or self.ignore_eos):
            name = "json_schema" if self.grammar is None else "grammar"
            raise ValueError(f"{name} needs an answer that ends where it fits: no min_tokens and no ignore_eos")

    @property
    def drawn_by(self) -> tuple[int, int]:
        """What, with the position, decides what is drawn."""
        return self.sampling.seed, self.id if self.draw_id is None else self.draw_id

    @property
    def asks(self) -> bool:
        """Whether logits are changed before its tokens are chosen."""
        return self.sampling.asks or self.min_tokens > 0 or self.bound is not None

    @property
    def bound(self) -> tuple[str, bool] | None:
        """What the answer is to fit, and whether it is a grammar and no JSON schema; None for any text."""
        if self.grammar is not None:
            return self.grammar, True
        return None if self.json_schema is None else (self.json_schema, False)


@dataclass(frozen=True)
class Abort:
    """The request with this id is not wanted any more. ``untold``: its answer has ended, and nothing is told of it."""

    id: int
    untold: bool = False


Top = tuple[tuple[int, float], ...]  # token ids and their log-probabilities, the likeliest first


def check_prompt(id: int, prompt: Many[int], max_seq_len: int, vocab_size: int) -> None:
    """ValueError that names prompt ``id`` unless it fits the model."""
    if not prompt:
        raise ValueError(f"prompt {id} is empty")
    if len(prompt) > max_seq_len:
        raise ValueError(f"prompt {id} has {len(prompt)} tokens, more than max_seq_len ({max_seq_len})")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ValueError(f"prompt {id} has token ids outside 0 … {vocab_size - 1}")


@dataclass(frozen=True)
class Completion:
    """An answer.

    ``tokens`` are the generated ids without the end token, ``logprobs`` theirs. ``prompt_logprobs`` are those of the
    prompt's tokens, 0.0 for the first, which nothing predicts; None unless asked for. ``finish_reason`` is
    ``"stop"`` (end token or stop string), ``"length"``, ``"interrupted"``, ``"aborted"`` or ``"error"``.
    ``token_texts`` are what each token adds to an answer that goes on from its prompt; joined they are ``text``, but
    for the space that its first word loses. ``end_token`` is the one that ended it, None where none did; ``end`` tells
    its log-probability too.
    ``top_logprobs`` and ``prompt_top_logprobs`` are the likeliest tokens at each place, None unless asked for.
    ``cached_tokens`` of the prompt had not to be computed. ``routed_experts``, where asked for, are the experts that
    each token took, int16 [tokens, L, K] by falling weight: of the prompt's and the answer's that the model was given,
    which are all but the last token, unless an end token followed it.
    """

    id: int
    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float] | None
    text: str
    finish_reason: str
    token_texts: list[str] = field(default_factory=list)
    end_token: int | None = None
    top_logprobs: list[Top] | None = None
    prompt_top_logprobs: list[Top] | None = None
    cached_tokens: int = 0
    end: Token | None = None
    routed_experts: np.ndarray | None = None

    @property
    def texts(self) -> list[str]:
        """What each token adds to ``text``; joined they are it."""
        lost, texts = sum(map(len, self.token_texts)) - len(self.text), []
        for text in self.token_texts:
            texts.append(text[lost:])
            lost -= len(text) - len(texts[-1])
        return texts


@dataclass(slots=True)
class Token:
    """A token of an answer and what it adds to its text; ``top`` are the likeliest ones in its place."""

    id: int
    logprob: float
    text: str
    top: Top = ()


class StreamEvent(msgspec.Struct, gc=False):  # made for every token: a dataclass would take three times as long
    """More text of an answer; the last event of a request carries the reason and the whole answer.

    ``tokens`` are those whose text is certain now, where the request asks for them; of all events together they are
    the answer's, and their texts joined its text. ``error`` is a sentence where the reason is ``"error"``, ``cause``
    the exception if making the text was what failed. ``routed_experts`` are those known since the event before.
    """

    id: int
    text: str
    finish_reason: str | None = None
    completion: Completion | None = None
    tokens: tuple[Token, ...] = ()
    error: str | None = None
    routed_experts: np.ndarray | None = None
    cause: Exception | None = None


class StopFilter:
    """Holds back text that may be the beginning of a stop string; the earliest stop string ends it."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._beginnings = {s[:n] for s in stop for n in range(1, len(s))}
        self._longest = max(map(len, self._beginnings), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain now."""
        if not self._stop:
            return text
        self._held += text
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        longest = min(self._longest, len(self._held))
        held = next((n for n in range(longest, 0, -1) if self._held[-n:] in self._beginnings), 0)
        return self._take(len(self._held) - held)

    def finish(self) -> str:
        """The text that was held back, when no more comes."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text


@dataclass(eq=False)
class Progress:
    """How far a request has come, in tokens alone: what deciding needs. ``ends`` are the ids that end it."""

    request: Request
    limit: int
    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)
    routed: int = 0  # positions whose experts are known, where the request asks for them
    cached_tokens: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        self.ends = frozenset(self.request.stop_token_ids)
        if not self.request.ignore_eos:
            self.ends |= self.tokenizer.end_ids

    @property
    def length(self) -> int:
        """Tokens so far, prompt and answer."""
        return len(self.request.prompt) + len(self.tokens)

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids of positions start … stop-1."""
        prompt = self.request.prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        return (*prompt[start:], *self.tokens[max(0, start - len(prompt)) : stop - len(prompt)])

    @property
    def asked(self) -> Asked | None:
        """What the request asks of the logits, if anything."""
        request = self.request
        if not request.asks:
            return None
        return Asked(request.sampling, request.prompt, tuple(self.tokens), request.min_tokens, tuple(self.ends))

    def take(self, token: int) -> None:
        """The next token, which may be the last."""
        if token in self.ends:
            self.ended = True
            return
        self.tokens.append(token)
        self.ended = len(self.tokens) >= self.limit


@dataclass(eq=False)
class Answer(Progress):
    """What a request has so far: its text too, and what is told with it."""

    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Top] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=lambda: [0.0])
    prompt_top_logprobs: list[Top] = field(default_factory=lambda: [()])
    experts: list[np.ndarray] = field(default_factory=list)
    deltas: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stream = TextStream(self.tokenizer, keeps_space=True)  # stop texts are found with the first word's space
        self._stops = StopFilter(self.request.stop)
        self._texts: list[str] = []
        self._certain = 0  # characters of these that no stop text can take any more
        self._told = self._told_certain = 0  # tokens that events have carried, and their characters
        self._told_experts = 0
        self._loses_space: bool | None = None  # known with the first token that has a text

    def accept(self, token: int, logprob: float, top: Top = ()) -> StreamEvent | None:
        """Takes the next token; the event is None when it completes no text and ends nothing."""
        if token in self.ends:
            return self.finish("stop", end=Token(token, logprob, "", top))
        request = self.request
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if request.top_logprobs:
            self.top_logprobs.append(top)
        if self._loses_space is None and token < self.tokenizer.n_words and self.tokenizer.piece_bytes[token]:
            self._loses_space = self.tokenizer.drops_first_space and self.tokenizer.begins_with_space(token)
        delta = text = self._stream.push(token)
        self._texts.append(text)
        if request.stop or not self._certain:
            delta = self._shown(self._stops.push(text))
            if self._stops.stopped:
                return self.finish("stop", delta)
        else:
            self._certain += len(text)
        if len(self.tokens) >= self.limit:
            return self.finish("length", delta)
        if not delta:
            return None
        self.deltas.append(delta)
        told = self._newly_told() if request.logprobs else ()
        return StreamEvent(request.id, delta, None, None, told, None, self._new_experts() if self.experts else None)

    def end(self, reason: str, error: str | None = None, cause: Exception | None = None) -> StreamEvent:
        """The last event, also where making the text is what failed."""
        try:
            event = self.finish(reason, error=error)
        except Exception:
            self.ended = True
            done = Completion(self.request.id, self.tokens, self.logprobs, None, "".join(self.deltas), reason)
            event = StreamEvent(self.request.id, "", reason, done, error=error)
        event.cause = cause
        return event

    def finish(self, reason: str, delta: str = "", end: Token | None = None, error: str | None = None) -> StreamEvent:
        """The last event, with whatever text was held back."""
        if not self._stops.stopped:
            rest = self._stream.finish()
            if rest:
                self._texts[-1] += rest
            delta += self._shown(self._stops.push(rest) + self._stops.finish())
        self.deltas.append(delta)
        self.ended = True
        request, texts = self.request, cut(self._texts, self._certain)
        told = self._newly_told(texts) if request.logprobs else ()
        completion = Completion(
            request.id, self.tokens, self.logprobs, self.prompt_logprobs if request.prompt_logprobs else None,
            "".join(self.deltas), reason, texts, end and end.id, self.top_logprobs if request.top_logprobs else None,
            self.prompt_top_logprobs if request.top_logprobs and request.prompt_logprobs else None, self.cached_tokens,
            end, np.concatenate(self.experts) if self.experts else None,
        )  # fmt: skip
        return StreamEvent(request.id, delta, reason, completion, told, error, self._new_experts())

    def _new_experts(self) -> np.ndarray | None:
        """Those that no event has carried yet."""
        new, self._told_experts = self.experts[self._told_experts :], len(self.experts)
        return np.concatenate(new) if new else None

    def _shown(self, certain: str) -> str:
        """Text that is certain now as the answer has it: without the space of its first word."""
        is_first, self._certain = self._certain == 0, self._certain + len(certain)
        return certain[1:] if is_first and self._loses_space else certain

    def _newly_told(self, texts: Many[str] | None = None) -> tuple[Token, ...]:
        """Tokens that no event has carried yet: those whose text is certain, up to the last one with any, or all with
        the ``texts`` that an answer at its end has."""
        own, end, certain = self._texts if texts is None else texts, self._told, self._told_certain
        last = len(own) - (texts is None and self._stream.is_unfinished)
        for place in range(self._told, last):
            certain += len(own[place])
            if texts is None and certain > self._certain:
                break
            if texts is not None or own[place]:
                end, self._told_certain = place + 1, certain
        found = []
        for place in range(self._told, end):
            text = own[place]
            if text and self._loses_space and not any(own[:place]):
                text = text[1:]
            top = self.top_logprobs[place] if self.top_logprobs else ()
            found.append(Token(self.tokens[place], self.logprobs[place], text, top))
        self._told = end
        return tuple(found)


def cut(texts: Many[str], length: int) -> list[str]:
    """The texts with what goes beyond ``length`` characters of all together taken away from their end."""
    kept, left = [], length
    for text in texts:
        kept.append(text[: max(left, 0)])
        left -= len(text)
    return kept


def echoed_texts(tokenizer: Tokenizer, prompt: Many[int], completion: Completion) -> list[str]:
    """What each token of the prompt and of the answer adds to the two as one text, ended where the answer is."""
    stream = TextStream(tokenizer)
    texts = [stream.push(token) for token in (*prompt, *completion.tokens)]
    alone = TextStream(tokenizer, keeps_space=True)
    whole = sum(len(alone.push(token)) for token in completion.tokens) + len(alone.finish())
    if texts:
        texts[-1] += stream.finish()
    return cut(texts, sum(map(len, texts)) - (whole - sum(map(len, completion.token_texts))))
