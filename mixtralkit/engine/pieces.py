"""The two kinds of tokenizer: a sentencepiece model, and ``tokenizer.json`` of the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from mixtralkit.checkpoint.gguf_vocabulary import keys_of, sentencepiece_model
from mixtralkit.json_file import conform, parse_json, read_bytes, shown

SPACE = "\u2581"  # sentencepiece's visible space
_MOST_BYTES = 256 << 20
_APART = "☺"  # no piece joins it to what follows, as in mistral-common


class SentencePieces:
    """A sentencepiece model as Llama and Mistral use it, in a file of its own or a GGUF's keys.

    Text never becomes a control id.
    """

    def __init__(self, path: Path) -> None:
        content = sentencepiece_model(path, keys_of(path)) if path.suffix == ".gguf" else _content(path)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, ValueError):
            raise ValueError(f"tokenizer ({path}): not a sentencepiece model") from None
        self.size: int = self.model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = self.model.bos_id(), self.model.eos_id(), self.model.pad_id()
        self.unk_id: int = self.model.unk_id()
        self.adds_bos = True

    def id_of(self, piece: str) -> int | None:
        """The id of a piece as it is written in the file, or None."""
        id = self.model.piece_to_id(piece)
        return id if self.model.id_to_piece(id) == piece else None

    def piece(self, id: int) -> str:
        return self.model.id_to_piece(id)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text that does not begin a text: no space comes before its first word."""
        before = self.model.encode(_APART)
        return self.model.encode(_APART + text)[len(before) :]

    @cached_property
    def controls(self) -> frozenset[int]:
        return frozenset(id for id in range(self.size) if self.model.is_control(id))

    def piece_bytes(self) -> Iterator[bytes]:
        """UTF-8 bytes that each id adds to a text."""
        for id in range(self.size):
            piece = self.model.id_to_piece(id)
            if self.model.is_control(id):
                yield b""
            elif self.model.is_byte(id):
                yield bytes([int(piece[1:-1], 16)])
            elif self.model.is_unknown(id):
                yield self.model.decode([id]).encode()
            else:
                yield piece.replace(SPACE, " ").encode()

    def drops_first_space(self) -> bool:
        space = self.model.piece_to_id(SPACE)
        return self.model.is_unknown(space) or self.model.decode([space]) == ""


class JsonPieces:
    """``tokenizer.json``: ids are those of the ``tokenizers`` library, which finds added tokens in a text itself."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        content = _content(path)
        try:
            self._content = conform(parse_json(content), dict)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer ({path}): is no tokenizer.json ({' '.join(str(error).split())})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._decodes, self._strips = _decoder(path, self._content.get("decoder"))
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._pieces = {id: piece for piece, id in vocabulary.items()}
        self.size: int = max(self._pieces, default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self.controls = frozenset(id for id, token in added.items() if token.special)
        self.bos_id = self._first("<s>", "<|begin_of_text|>")
        self.eos_id = self._first("</s>", "<|end_of_text|>", "<|endoftext|>")
        self.unk_id = self._first("<unk>")
        self.pad_id = -1
        self.adds_bos = self._tokenizer.encode("a").ids[:1] == [self.bos_id]

    def _first(self, *names: str) -> int:
        return next((id for id in map(self.id_of, names) if id is not None), -1)

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def piece(self, id: int) -> str:
        return self._pieces.get(id, "")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text that does not begin a text: no space comes before its first word."""
        return self.encode(_APART + text)[len(self.encode(_APART)) :]

    def piece_bytes(self) -> Iterator[bytes]:
        """UTF-8 bytes that each id adds to a text."""
        for id in range(self.size):
            if id in self.controls or id not in self._pieces:
                yield b""
            elif id in self._added:
                yield self._added[id].encode()
            elif self._decodes == "ByteLevel":
                yield bytes(_BYTE_OF.get(letter, 63) for letter in self._pieces[id])
            else:
                yield _of_metaspace(self._pieces[id], self._decodes == "ByteFallback")

    def drops_first_space(self) -> bool:
        return self._strips


def _of_metaspace(piece: str, has_bytes: bool) -> bytes:
    is_byte = has_bytes and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    try:
        return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()
    except ValueError:
        return piece.encode()


def _decoder(path: Path, decoder: Any) -> tuple[str, bool]:
    """How pieces become bytes, ``ByteLevel``, ``ByteFallback`` or ``Metaspace``; whether a text's first space goes."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, Mapping) else []
    kinds = [step.get("type") if isinstance(step, Mapping) else None for step in steps]
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "ByteLevel"}
    if not kinds or set(kinds) - known or ("ByteLevel" in kinds and len(kinds) > 1):
        raise ValueError(
            f"tokenizer ({path}): decoder ({shown(kinds)}) is not read; known are {', '.join(sorted(known))}"
        )
    if "ByteLevel" in kinds:
        return "ByteLevel", False
    replaces = [(step.get("pattern"), step.get("content")) for step in steps if step["type"] == "Replace"]
    if any(pair != ({"String": SPACE}, " ") for pair in replaces):
        raise ValueError(f"tokenizer ({path}): decoder: Replace ({shown(replaces)}) is not read")
    strips = any(step["type"] == "Strip" and step.get("content") == " " and step.get("start") for step in steps)
    strips |= any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps)
    return "ByteFallback" if "ByteFallback" in kinds else "Metaspace", strips


def _byte_letters() -> dict[str, int]:
    """The letter of each byte in byte-level vocabularies, as GPT-2 chose them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF = _byte_letters()


def _content(path: Path) -> bytes:
    try:
        content = read_bytes(path, _MOST_BYTES)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"tokenizer ({path}): {reason}") from None
    return content
