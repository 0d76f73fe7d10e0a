"""Text to token ids and back with a sentencepiece model, whole or token by token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

_SPACE = "\u2581"  # sentencepiece's visible space
# Bytes that are no UTF-8 come out of the decoder as lone surrogates; each is shown as one replacement character.
_REPLACED = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")


class Tokenizer:
    """A sentencepiece tokenizer as Llama and Mistral use it.

    Text never becomes a control id: ``"<s>"`` in ``encode``'s text is three characters.
    """

    def __init__(self, model_path: str | Path) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise ValueError(f"tokenizer ({path}): no such file")
        self.path = path
        try:
            self.sp_model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError:
            raise ValueError(f"tokenizer ({path}): not a sentencepiece model") from None
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"tokenizer ({path}): has no begin (<s>) or end (</s>) token")

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError unless the model's vocabulary is this tokenizer's."""
        if self.n_words != vocab_size:
            raise ValueError(
                f"tokenizer ({self.path}) has {self.n_words} tokens, but the model's vocab_size is {vocab_size}"
            )

    def encode(self, s: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of ``s``, with the begin and end tokens as asked."""
        if not isinstance(s, str):
            raise ValueError(f"text to encode must be a string, not {type(s).__name__}")
        # A lone surrogate (half of a broken pair in JSON) has no UTF-8 form.
        text = s.encode("utf-8", "replace").decode("utf-8")
        ids = self.sp_model.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Sequence[int]) -> str:
        """Text of the ids: control ids (and ``pad_id`` -1) are nothing, the first word's leading space is dropped."""
        stream = TextStream(self)
        return "".join([*(stream.push(token) for token in t), stream.finish()])

    @cached_property
    def piece_bytes(self) -> list[bytes]:
        """UTF-8 bytes that each id adds to a text."""
        model, pieces = self.sp_model, []
        for token in range(self.n_words):
            piece = model.id_to_piece(token)
            if model.is_control(token):
                pieces.append(b"")
            elif model.is_byte(token):
                pieces.append(bytes([int(piece[1:-1], 16)]))
            elif model.is_unknown(token):
                pieces.append(model.decode([token]).encode())
            else:
                pieces.append(piece.replace(_SPACE, " ").encode())
        return pieces

    @cached_property
    def drops_first_space(self) -> bool:
        """True where encoding puts a space before the first word, so that decoding takes it away."""
        space = self.sp_model.piece_to_id(_SPACE)
        return self.sp_model.is_unknown(space) or self.sp_model.decode([space]) == ""


class TextStream:
    """Decodes one token after the other; the deltas joined are ``decode`` of all.

    A character whose bytes come as several tokens appears when its last byte is there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._at_start = tokenizer.drops_first_space

    def push(self, token: int) -> str:
        """The text that ``token`` completes, which may be empty."""
        if token == -1:
            return ""
        if not 0 <= token < self._tokenizer.n_words:
            raise ValueError(f"token id ({token}) must lie in 0 … {self._tokenizer.n_words - 1}")
        data = self._tokenizer.piece_bytes[token]
        if not data:
            return self.finish()  # a control token ends an unfinished character, as in sentencepiece
        if self._at_start:
            self._at_start = False
            if self._tokenizer.sp_model.id_to_piece(token).startswith(_SPACE):
                data = data[1:]
        return self._utf8.decode(data).translate(_REPLACED)

    def finish(self) -> str:
        """What an unfinished character leaves: replacement characters, or nothing."""
        return self._utf8.decode(b"", final=True).translate(_REPLACED)
