"""Text to token ids and back, whole or token by token, as the tokenizer's file and the files beside it say."""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mixtralkit.checkpoint.gguf_vocabulary import keys_of
from mixtralkit.checkpoint.gguf_vocabulary import statements as of_gguf
from mixtralkit.checkpoint.statements import Statements
from mixtralkit.engine.pieces import SPACE, JsonPieces, SentencePieces
from mixtralkit.json_file import read_text

# Bytes that are no UTF-8 come out of the decoder as lone surrogates; each is shown as one replacement character.
_REPLACED = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")
_FILES = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1", "tokenizer.json")
_PADDING = 64  # rows that an embedding may have behind the last token without a word


class Tokenizer:
    """A tokenizer, and what the files beside it say: added tokens, end tokens, the chat template.

    Text never becomes a control id of a sentencepiece model: ``"<s>"`` in ``encode``'s text is three characters. Added
    tokens are found in it, as are all special ones by the ``tokenizers`` library where ``tokenizer.json`` is read.

    Args:
        model_path: a sentencepiece model, a ``tokenizer.json``, or a GGUF file with a vocabulary.
        statements: of the files beside; None for none.
        vocab_size: the model's; added tokens beyond it are left out, with a warning.
        chat_template: a jinja template that goes before the folder's, a file.
        stop_token_ids: more ids that end an answer.

    Attributes:
        n_words: ids that it knows, 0 … n_words - 1; the model may have more, which have no text.
        bos_id, eos_id, pad_id: of the begin, end and padding tokens; -1 for none.
        end_ids: ids that end an answer.
        add_bos: whether a text begins with ``bos_id``.
        version: of Mistral's control tokens: 1, where ``[INST]`` is text, or 2 or 3, where it is a token.
        chat_template, template_from: a jinja template and where it is from; None for Mistral's own.
    """

    def __init__(
        self,
        model_path: str | Path,
        statements: Statements | None = None,
        vocab_size: int | None = None,
        chat_template: str | Path | None = None,
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        path, said = Path(model_path), statements or Statements()
        if not path.exists():
            raise ValueError(f"tokenizer ({path}): no such file")
        self.path = path
        self._pieces = JsonPieces(path) if path.suffix == ".json" else SentencePieces(path)
        self.sp_model = self._pieces.model if isinstance(self._pieces, SentencePieces) else None
        if vocab_size is not None and self._pieces.size > vocab_size and self.sp_model is not None:
            raise self._too_many(vocab_size)
        self._added = {
            id: token for id, token in said.added.items()
            if id >= self._pieces.size or self._pieces.piece(id) != token.content
        }  # fmt: skip
        if vocab_size is not None:
            self._leave_out(vocab_size)
        self.n_words: int = max([self._pieces.size, *(id + 1 for id in self._added)])
        self._names, self._special, self._legacy = said.names, said.special, said.legacy
        self.bos_id: int = self._named("bos_token", self._pieces.bos_id)
        self.eos_id: int = self._named("eos_token", self._pieces.eos_id)
        self.unk_id: int = self._pieces.unk_id
        self.pad_id: int = self._pieces.pad_id
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"tokenizer ({path}): has no begin (<s>) or end (</s>) token")
        self.end_ids = self._end_ids(said, stop_token_ids, vocab_size)
        self.add_bos: bool = self._pieces.adds_bos if said.add_bos is None else said.add_bos
        self.chat_template, self.template_from = said.chat_template, said.template_from
        if chat_template is not None:
            self.chat_template, self.template_from = read_text(chat_template, 1 << 20), Path(chat_template)
        self.version = self._mistral_version()

    @classmethod
    def beside(
        cls,
        folder: str | Path,
        path: str | Path | None = None,
        vocab_size: int | None = None,
        chat_template: str | Path | None = None,
        stop_token_ids: Iterable[int] = (),
    ) -> Tokenizer:
        """The tokenizer of the checkpoint in ``folder``, with all that its side files say.

        Args:
            folder: or a GGUF file, which says all of it.
            path: a tokenizer's file, or a folder with one; None finds it in ``folder``. The files beside it are read,
                and end tokens are those of ``folder``. Of a GGUF file, the vocabulary and all that it says are.

        Raises:
            ValueError: naming the file and what is wrong with it.
        """
        folder = Path(folder)
        path = folder if path is None else Path(path)
        if path.is_dir():
            found = next((path / name for name in _FILES if (path / name).exists()), None)
            found = found or min(path.glob("*.gguf"), default=None)
            if found is None and (path / "tekken.json").exists():
                raise ValueError(f"tokenizer ({path / 'tekken.json'}): Mistral's tekken is not read")
            path = found or path / _FILES[0]
        said = Statements() if folder.is_file() else Statements.read(folder, path.parent)
        if path.suffix == ".gguf":
            own = of_gguf(path, keys_of(path))
            said = own if said.end_ids is None else replace(own, end_ids=said.end_ids)
        for note in said.notes:
            warnings.warn(note, stacklevel=2)
        return cls(path, said, vocab_size, chat_template, stop_token_ids)

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError where this tokenizer has ids that the model does not; a warning where the model has many more."""
        if self.n_words > vocab_size:
            raise self._too_many(vocab_size)
        if vocab_size - self.n_words >= max(_PADDING, self.n_words // 4):
            warnings.warn(
                f"tokenizer ({self.path}) has {self.n_words} tokens, the model's vocab_size is {vocab_size}: the ids "
                "between have no text",
                stacklevel=2,
            )

    def encode(self, s: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of ``s``, with the begin and end tokens as asked."""
        return [self.bos_id] * bos + self._encode(s, self._added_pattern) + [self.eos_id] * eos

    def encode_rendered(self, s: str) -> list[int]:
        """Token ids of a rendered chat template, in which the special tokens stand by name."""
        return self._encode(s, self._special_pattern)

    def encode_inside(self, s: str) -> list[int]:
        """Token ids of a text that goes on from another; special tokens are not found in it."""
        return self._pieces.encode_inside(s)

    def decode(self, t: Sequence[int]) -> str:
        """Text of the ids: control ids (and ``pad_id`` -1) are nothing, the first word's leading space is dropped."""
        stream = TextStream(self)
        return "".join([*(stream.push(token) for token in t), stream.finish()])

    def piece(self, id: int) -> str:
        """What an id is called in the tokenizer's files; empty where none names it."""
        if id in self._added:
            return self._added[id].content
        return self._pieces.piece(id) if 0 <= id < self._pieces.size else ""

    def id_of(self, piece: str) -> int | None:
        """The id that the tokenizer's files call ``piece``, or None."""
        added = next((id for id, token in self._added.items() if token.content == piece), None)
        return self._pieces.id_of(piece) if added is None else added

    @property
    def special_names(self) -> dict[str, str]:
        """Texts of the special tokens by role, as chat templates use them."""
        return {"bos_token": self.piece(self.bos_id), "eos_token": self.piece(self.eos_id), **self._names}

    @cached_property
    def piece_bytes(self) -> list[bytes]:
        """UTF-8 bytes that each id adds to a text."""
        pieces = [*self._pieces.piece_bytes(), *[b""] * (self.n_words - self._pieces.size)]
        for id, token in self._added.items():
            pieces[id] = b"" if token.special else token.content.encode("utf-8", "replace")
        return pieces

    @cached_property
    def drops_first_space(self) -> bool:
        """True where encoding puts a space before the first word, so that decoding takes it away."""
        return self._pieces.drops_first_space()

    def begins_with_space(self, token: int) -> bool:
        """Whether the token is one whose space the beginning of a text loses."""
        return token not in self._added and self.piece(token).startswith(SPACE)

    def _encode(self, s: str, pattern: re.Pattern[str] | None) -> list[int]:
        if not isinstance(s, str):
            raise ValueError(f"text to encode must be a string, not {type(s).__name__}")
        # A lone surrogate (half of a broken pair in JSON) has no UTF-8 form.
        text = s.encode("utf-8", "replace").decode("utf-8")
        if pattern is None or self.sp_model is None:
            return self._pieces.encode(text)
        ids: list[int] = []
        for i, part in enumerate(pattern.split(text)):
            if i % 2:
                ids.append(self._ids_by_name[part if part in self._ids_by_name else part.strip()])
            elif part:
                is_whole = self._legacy or (i == 0 and not part.startswith((" ", SPACE)))
                ids += self._pieces.encode(part) if is_whole else self._pieces.encode_inside(part)
        return ids

    @cached_property
    def _ids_by_name(self) -> dict[str, int]:
        names = {self.piece(id): id for id in (self.bos_id, self.eos_id, self.unk_id) if id >= 0}
        controls = self._pieces.controls if self.sp_model is not None else ()
        named = {self.piece(id): id for id in controls if self.piece(id) in self._special}
        return {**names, **named, **{token.content: id for id, token in self._added.items()}}

    @cached_property
    def _added_pattern(self) -> re.Pattern[str] | None:
        return self._pattern([token.content for token in self._added.values()])

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        return self._pattern([name for name in self._ids_by_name if name])

    def _pattern(self, names: list[str]) -> re.Pattern[str] | None:
        """One group for any of these tokens, the longest first, with the white space that it takes."""
        sides = {token.content: token for token in self._added.values()}
        parts = []
        for name in sorted(filter(None, names), key=len, reverse=True):
            token = sides.get(name)
            left, right = (r"\s*" if token and strips else "" for strips in
                           (token and token.lstrip, token and token.rstrip))  # fmt: skip
            word = (r"\b", r"\b") if token and token.single_word else ("", "")
            parts.append(f"{left}{word[0]}{re.escape(name)}{word[1]}{right}")
        return re.compile(f"({'|'.join(parts)})") if parts else None

    def _named(self, role: str, otherwise: int) -> int:
        """The id of the token that the files name for a role."""
        name = self._names.get(role)
        id = None if name is None else self.id_of(name)
        return otherwise if id is None else id

    def _end_ids(self, said: Statements, more: Iterable[int], vocab_size: int | None) -> frozenset[int]:
        stated = {self.eos_id} if said.end_ids is None else set(said.end_ids)
        if "eos_token" in said.names:
            stated.add(self.eos_id)
        for id in more:
            if isinstance(id, bool) or not isinstance(id, int) or id < 0 or (vocab_size and id >= vocab_size):
                raise ValueError(f"stop_token_ids ({id!r}) must be token ids below vocab_size ({vocab_size})")
            stated.add(id)
        return frozenset(stated)

    def _mistral_version(self) -> int:
        """By the file's name where it says so, as in mistral-common, else by whether ``[INST]`` is a control token."""
        if self.path.suffix in (".v1", ".v2", ".v3"):
            return int(self.path.suffix[2:])
        ids = [self.id_of(name) for name in ("[INST]", "[/INST]")]
        return 3 if all(id is not None and self.piece_bytes[id] == b"" for id in ids) else 1

    def _leave_out(self, vocab_size: int) -> None:
        beyond = {id: token.content for id, token in self._added.items() if id >= vocab_size}
        if beyond:
            names = ", ".join(f"{name} ({id})" for id, name in list(beyond.items())[:8])
            warnings.warn(f"added tokens beyond vocab_size ({vocab_size}) are left out: {names}", stacklevel=3)
            self._added = {id: token for id, token in self._added.items() if id < vocab_size}

    def _too_many(self, vocab_size: int) -> ValueError:
        size = max(self._pieces.size, getattr(self, "n_words", 0))
        return ValueError(f"tokenizer ({self.path}) has {size} tokens, but the model's vocab_size is {vocab_size}")


class TextStream:
    """Decodes one token after the other; the deltas joined are ``decode`` of all.

    A character whose bytes come as several tokens appears when its last byte is there.

    Args:
        keeps_space: the text goes on from another, so its first word keeps its space.
    """

    def __init__(self, tokenizer: Tokenizer, keeps_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._at_start = tokenizer.drops_first_space and not keeps_space
        self.is_unfinished = False  # bytes of a character are still to come, which may give the last token more text

    def push(self, token: int) -> str:
        """The text that ``token`` completes, which may be empty."""
        if token == -1:
            return ""
        if token < 0:
            raise ValueError(f"token id ({token}) must be at least 0")
        pieces = self._tokenizer.piece_bytes
        data = pieces[token] if token < len(pieces) else b""
        if not data:
            return self.finish()  # a control token ends an unfinished character, as in sentencepiece
        if self._at_start:
            self._at_start = False
            if self._tokenizer.begins_with_space(token):
                data = data[1:]
        if data.isascii() and not self.is_unfinished:
            return data.decode("ascii")  # most tokens; the decoder takes longer
        return self._decoded(data)

    def finish(self) -> str:
        """What an unfinished character leaves: replacement characters, or nothing."""
        return self._decoded(b"", final=True) if self.is_unfinished else ""

    def _decoded(self, data: bytes, final: bool = False) -> str:
        text = self._utf8.decode(data, final).translate(_REPLACED)
        self.is_unfinished = bool(self._utf8.getstate()[0])
        return text
