"""Answers that fit a JSON schema or a grammar: which tokens may come next, by llguidance (extra ``serve``)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mixtralkit.engine.tokenizer import Tokenizer

ANY_OBJECT = '{"type": "object"}'


class Grammars:
    """What a model's tokens are to grammars.

    Args:
        vocab_size: the model's; ids that the tokenizer does not know are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled = functools.lru_cache(maxsize=128)(self._compile)  # who checks is not the one who begins

    def check(self, text: str, lark: bool = False) -> None:
        """ValueError that says what is wrong with a JSON schema or a Lark grammar, or that llguidance is missing."""
        import_library()
        self._compiled(text, lark)

    def begin(self, text: str, lark: bool = False) -> Grammar:
        """The state of an answer that is to fit; ValueError as from ``check``."""
        library = import_library()
        return Grammar(library.LLMatcher(self._tokens, self._compiled(text, lark), log_level=0), self._vocab_size)

    def _compile(self, text: str, lark: bool) -> str:
        matcher, name = import_library().LLMatcher, "grammar" if lark else "json_schema"
        try:
            if lark:
                compiled = matcher.grammar_from_lark(text)
            else:
                content = json.loads(text)
                if not isinstance(content, dict):
                    raise ValueError("is no JSON object")
                # white space as json.dumps has it: a model that may write more can go on with it for ever
                compiled = matcher.grammar_from_json_schema(content, overrides={"whitespace_flexible": False})
            said = matcher.validate_grammar(compiled, self._tokens)
            if said and not said.startswith("WARNING"):
                raise ValueError(said)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} ({_short(text)}): {_short(str(error))}") from None
        return compiled

    @cached_property
    def _tokens(self) -> Any:
        library, described = import_library(), _Described(self._tokenizer, self._vocab_size)
        return library.LLTokenizer(
            library.TokenizerWrapper(described),
            eos_token=sorted(self._tokenizer.end_ids),
            slices=library.LLTokenizer.json_slices(),
        )


class _Described:
    """A tokenizer as the library asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        pieces = [*tokenizer.piece_bytes, *[b""] * (vocab_size - len(tokenizer.piece_bytes))]
        self.eos_token_id, self.bos_token_id, self._tokenizer = tokenizer.eos_id, tokenizer.bos_id, tokenizer
        self.tokens = [piece or b"\xff[%d]" % id for id, piece in enumerate(pieces)]  # those without text need names
        self.special_token_ids = [id for id, piece in enumerate(pieces) if not piece]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode_inside(text if isinstance(text, str) else text.decode("utf-8"))


class Grammar:
    """How far one answer has come."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._seen = matcher, 0
        self._mask_W = np.zeros(-(-vocab_size // 32), dtype=np.int32)

    def allowed(self, answer: Sequence[int]) -> np.ndarray:
        """The tokens that may come behind ``answer``, which goes on from that of the last call: a bit each, int32 [W].

        An end token where the answer may end there. ValueError where the library has had enough of the schema.
        """
        for token in answer[self._seen :]:
            self._matcher.consume_token(token)
        self._seen = len(answer)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(self._mask_W.ctypes.data, self._mask_W.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"json_schema or grammar: {_short(self._matcher.get_error())}")
        return self._mask_W.copy()


def import_library() -> Any:
    """llguidance; ValueError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise ValueError("json_schema needs the package llguidance: pip install 'mixtralkit[serve]'") from None
    return llguidance


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "…"
