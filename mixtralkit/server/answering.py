"""The engine's answers as OpenAI's objects: whole, or as the chunks of a stream.

A completion goes on from its prompt, so its first word keeps the space before it; a chat's answer begins without.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from mixtralkit.engine.requests import Completion, StreamEvent, Token
from mixtralkit.engine.tokenizer import TextStream, Tokenizer
from mixtralkit.server.asking import Asked
from mixtralkit.server.errors import ApiError
from mixtralkit.server.logprobs import Shapes, Told
from mixtralkit.server.protocol import AnyRequest, ChatRequest, CompletionRequest, NamedTool
from mixtralkit.server.tool_calls import ToolCalls


class Writer:
    """What completions and chat share: names, usage, errors.

    Args:
        model: the served name.
    """

    kind: str
    prefix: str

    def __init__(self, body: AnyRequest, asked: Asked, model: str, tokenizer: Tokenizer) -> None:
        self.body, self.asked, self.tokenizer = body, asked, tokenizer
        options = body.stream_options
        self.tells_usage = options is not None and options.include_usage
        self._always_usage = options is not None and options.continuous_usage_stats
        self._generated = [0] * len(asked.requests)
        self._cached = [0] * len(asked.requests)
        self._experts: dict[int, list[list[list[int]]]] = {}  # that no chunk has told yet, by answer
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}", "object": self.kind, "created": int(time.time()), "model": model,
        }  # fmt: skip

    def begin(self) -> Iterator[dict[str, Any]]:
        """The choices of chunks that come before any text."""
        return iter(())

    def choices(self, index: int, event: StreamEvent) -> Iterator[dict[str, Any]]:
        """The choices of chunks that an event gives."""
        raise NotImplementedError

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """A whole answer's choice."""
        raise NotImplementedError

    def note(self, index: int, event: StreamEvent) -> None:
        """Counts an event's tokens; ApiError for one that is the end of a request that could not be answered."""
        self._generated[index] += len(event.tokens)
        if event.routed_experts is not None and self.body.stream:
            self._experts.setdefault(index, []).extend(event.routed_experts.tolist())
        done = event.completion
        if done is not None:
            self._generated[index] = len(done.tokens) + (done.end_token is not None)
            self._cached[index] = done.cached_tokens
        if event.finish_reason == "error":
            raise ApiError(500, event.error or "the answer could not be made")
        if event.finish_reason in ("aborted", "interrupted"):
            raise ApiError(503, "the server is shutting down", code="shutting_down")

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a stream."""
        if (experts := self._experts.pop(choice["index"], None)) is not None:
            choice["routed_experts"] = experts
        more = {"usage": self.usage} if self._always_usage else {"usage": None} if self.tells_usage else {}
        return {**self.head, "choices": [choice], **more}

    def last_chunk(self) -> dict[str, Any]:
        """The chunk that tells usage."""
        return {**self.head, "choices": [], "usage": self.usage}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """An answer that is no stream."""
        choices = [self.choice(i, c) for i, c in enumerate(completions)]
        for choice, completion in zip(choices, completions, strict=True):
            if completion.routed_experts is not None:
                choice["routed_experts"] = completion.routed_experts.tolist()
        return {**self.head, "choices": choices, "usage": self.usage}

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far; an end token counts, a prompt counts once for all its answers."""
        prompt, generated = sum(map(len, self.asked.prompts)), sum(self._generated)
        return {
            "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached[:: self.asked.n])},
        }  # fmt: skip


class CompletionWriter(Writer):
    """``/v1/completions``."""

    kind, prefix = "text_completion", "cmpl"
    body: CompletionRequest

    def __init__(self, body: CompletionRequest, asked: Asked, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(body, asked, model, tokenizer)
        self._shapes = [Shapes(tokenizer) for _ in asked.requests]
        self._begun = [False] * len(asked.requests)
        self._held: list[list[StreamEvent]] = [[] for _ in asked.requests]
        self._prompts = [Prompt(tokenizer, ids) for ids in asked.prompts] if body.echo else []
        # a prompt's log-probabilities are known with the end of its answer
        self._waits = bool(body.echo) and body.logprobs is not None

    def begin(self) -> Iterator[dict[str, Any]]:
        if self.body.echo and not self._waits:
            for index in range(len(self.asked.requests)):
                yield self._choice(index, self._prompts[index // self.asked.n].text, (), None)

    def choices(self, index: int, event: StreamEvent) -> Iterator[dict[str, Any]]:
        if self._waits:
            if event.completion is not None:
                yield self.choice(index, event.completion)
            return
        delta, tokens = self._with_space(index, event)
        if delta or tokens or event.finish_reason:
            yield self._choice(index, delta, tokens, event.finish_reason)

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        c, text, told = completion, "".join(completion.token_texts), []
        tells = self.body.logprobs is not None
        if tells:
            tops = c.top_logprobs or [()] * len(c.tokens)
            told = [Told(*values) for values in zip(c.tokens, c.token_texts, c.logprobs, tops, strict=True)]
            told += ended_by(c)
        if self.body.echo:
            prompt = self._prompts[index // self.asked.n]
            text, told = prompt.text + text, (prompt.told(c) if tells else []) + told
        return self._choice(index, text, told, c.finish_reason)

    def _choice(self, index: int, text: str, told: Sequence[Told], reason: str | None) -> dict[str, Any]:
        logprobs = self._shapes[index].completion(told) if self.body.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _with_space(self, index: int, event: StreamEvent) -> tuple[str, list[Told]]:
        """An event's text and tokens, the answer's first word with the space that the engine takes from it."""
        if self._begun[index]:
            ended = [] if event.completion is None else ended_by(event.completion)
            return event.text, [told_of(token) for token in event.tokens] + ended
        held = self._held[index]
        held.append(event)
        told = [told_of(token) for event in held for token in event.tokens]
        if event.completion is not None:
            texts = event.completion.token_texts
            told = [Told(t.id, text, t.logprob, t.top) for t, text in zip(told, texts, strict=True)]
            return "".join(texts), told + ended_by(event.completion)
        if not event.text:  # a space alone is told with what follows
            return "", []
        self._begun[index] = True
        first = next((i for i, t in enumerate(told) if self._has_text(t.id)), None)
        if first is None or not (self.tokenizer.drops_first_space and self.tokenizer.begins_with_space(told[first].id)):
            return event.text, told
        told[first] = Told(told[first].id, " " + told[first].text, told[first].logprob, told[first].top)
        return " " + event.text, told

    def _has_text(self, id: int) -> bool:
        pieces = self.tokenizer.piece_bytes
        return id < len(pieces) and bool(pieces[id])


class Prompt:
    """A prompt's text, token by token, as ``echo`` gives it back."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        stream = TextStream(tokenizer)
        self.ids, self.texts = ids, [stream.push(id) for id in ids]
        self.texts[-1] += stream.finish()
        self.text = "".join(self.texts)

    def told(self, completion: Completion) -> list[Told]:
        """The prompt's tokens with the log-probabilities that came with its answer, if these were asked for."""
        logprobs = completion.prompt_logprobs or [0.0] * len(self.ids)
        tops = completion.prompt_top_logprobs or [()] * len(self.ids)
        return [
            Told(id, text, logprob if i else None, top)
            for i, (id, text, logprob, top) in enumerate(zip(self.ids, self.texts, logprobs, tops, strict=True))
        ]


class ChatWriter(Writer):
    """``/v1/chat/completions``."""

    kind, prefix = "chat.completion", "chatcmpl"
    body: ChatRequest

    def __init__(self, body: ChatRequest, asked: Asked, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(body, asked, model, tokenizer)
        self._shapes = Shapes(tokenizer)
        may_call = bool(body.tools) and body.tool_choice != "none"
        many = body.parallel_tool_calls is not False
        self._calls = [ToolCalls(tokenizer, many) for _ in asked.requests] if may_call else None
        # OpenAI's servers say "stop" where the request has named the function
        self._called = "stop" if isinstance(body.tool_choice, NamedTool) else "tool_calls"

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return super().chunk(choice) | {"object": "chat.completion.chunk"}

    def last_chunk(self) -> dict[str, Any]:
        return super().last_chunk() | {"object": "chat.completion.chunk"}

    def begin(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.asked.requests)):
            yield self._delta(index, {"role": "assistant", "content": ""}, (), None)

    def choices(self, index: int, event: StreamEvent) -> Iterator[dict[str, Any]]:
        told, text, calls = [told_of(token) for token in event.tokens], event.text, []
        if self._calls is not None:
            text, calls = self._calls[index].push(event)
        if text or (told and self.body.logprobs):
            yield self._delta(index, {"content": text}, told, None)
        if calls:
            yield self._delta(index, {"tool_calls": calls}, (), None)
        if event.finish_reason:
            yield self._delta(index, {}, (), self._reason(index, event.finish_reason))

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        c = completion
        tops = c.top_logprobs or [()] * len(c.tokens)
        told = [Told(*values) for values in zip(c.tokens, c.texts, c.logprobs, tops, strict=True)]
        message, reason = {"role": "assistant", "content": c.text, "refusal": None}, c.finish_reason
        if self._calls is not None:
            tokens = tuple(Token(each.id, each.logprob, each.text) for each in told)
            text, _ = self._calls[index].push(StreamEvent(c.id, c.text, c.finish_reason, c, tokens))
            if calls := self._calls[index].calls:
                message |= {"content": text or None, "tool_calls": calls}
            reason = self._reason(index, reason)
        logprobs = self._shapes.chat(told) if self.body.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _reason(self, index: int, reason: str) -> str:
        """Why an answer ended, as chat tells it: also one cut amid a call ended by its length."""
        has_called = self._calls is not None and self._calls[index].calls
        return self._called if has_called and reason == "stop" else reason

    def _delta(self, index: int, delta: dict[str, Any], told: Sequence[Told], reason: str | None) -> dict[str, Any]:
        logprobs = self._shapes.chat(told) if self.body.logprobs and told else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def ended_by(completion: Completion) -> list[Told]:
    """The end token, which has no text but a log-probability; nothing where none ended the answer."""
    return [] if completion.end is None else [told_of(completion.end)]


def told_of(token: Token) -> Told:
    """The engine's token as it is told."""
    return Told(token.id, token.text, token.logprob, token.top)
