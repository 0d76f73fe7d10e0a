"""Both shapes in which OpenAI tells log-probabilities: of completions, and of chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixtralkit.engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Told:
    """A token of an answer: ``text`` is what it adds; ``top`` are the likeliest ids with their log-probabilities.

    ``logprob`` is None for a prompt's first token, which nothing predicts.
    """

    id: int
    text: str
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


@dataclass
class Offsets:
    """Counts the characters before each token."""

    at: int = 0

    def next(self, text: str) -> int:
        """Where the text begins."""
        self.at += len(text)
        return self.at - len(text)


@dataclass
class Shapes:
    """Makes the objects; ``offsets`` go on from one chunk of a stream to the next."""

    tokenizer: Tokenizer
    offsets: Offsets = field(default_factory=Offsets)

    def completion(self, tokens: Sequence[Told]) -> dict[str, Any]:
        """As completions tell them."""
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._named(token) for token in tokens],
            "text_offset": [self.offsets.next(token.text) for token in tokens],
        }

    def chat(self, tokens: Sequence[Told]) -> dict[str, Any]:
        """As chat tells them: the bytes of all tokens joined are the content's."""
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

    def _entry(self, token: Told) -> dict[str, Any]:
        own = {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode("utf-8", "replace"))}
        top = [
            {"token": self.name(id), "logprob": logprob, "bytes": list(self._bytes(id))}
            for id, logprob in with_own_first(token)[: len(token.top)]
        ]
        return {**own, "top_logprobs": top}

    def _named(self, token: Told) -> dict[str, float]:
        named: dict[str, float] = {}
        for id, logprob in with_own_first(token):
            named.setdefault(self.name(id), logprob)
        return named

    def name(self, id: int) -> str:
        """A token's text by itself; where it is none, what the tokenizer calls it."""
        data = self._bytes(id)
        try:
            return data.decode("utf-8") or self.tokenizer.piece(id) or f"<{id}>"
        except UnicodeDecodeError:
            return self.tokenizer.piece(id) or data.decode("utf-8", "replace")

    def _bytes(self, id: int) -> bytes:
        pieces = self.tokenizer.piece_bytes
        return pieces[id] if id < len(pieces) else b""


def with_own_first(token: Told) -> list[tuple[int, float]]:
    """The likeliest tokens, among them the token itself with its own number, likeliest first."""
    others = [(id, logprob) for id, logprob in token.top if id != token.id]
    return sorted([(token.id, token.logprob), *others], key=lambda pair: -pair[1])
