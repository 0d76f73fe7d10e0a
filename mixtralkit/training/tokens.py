"""Text to tokens: training a sentencepiece tokenizer, encoding documents, and the file that keeps the result."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import sentencepiece

from mixtralkit.json_file import Positive, conform, parse_json, shown
from mixtralkit.npz_file import read_arrays
from mixtralkit.training.corpus import SPLITS, Document, digest
from mixtralkit.whole_file import writing

BOS_ID, EOS_ID = 1, 2
_CHUNK = 1 << 18  # characters that go to sentencepiece at once
_INVALID = re.compile("([\udc80-\udcff]+)")  # how surrogateescape shows bytes that are not UTF-8

Corpus = Mapping[str, Mapping[str, Sequence[Document]]]


def train_tokenizer(corpus: Corpus, vocab_size: int, sample_bytes: int = 3_000_000) -> bytes:
    """A byte-pair tokenizer like Mistral's: the content of a ``tokenizer.model``.

    Byte fallback, single digits, whitespace kept as it is and runs of it as pieces; ids 0, 1, 2 are unknown, begin,
    end. Learns from up to ``sample_bytes`` of each domain's training text.
    """
    model = io.BytesIO()
    trainer_log_errors_only = 2
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sample_lines(corpus, sample_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            character_coverage=0.9999,
            max_sentence_length=16384,
            unk_id=0,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            num_threads=1,
            minloglevel=trainer_log_errors_only,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size ({vocab_size}) does not suit the text: {error}") from None
    return model.getvalue()


def _sample_lines(corpus: Corpus, sample_bytes: int) -> Iterator[str]:
    for parts in corpus.values():
        left = sample_bytes
        for document in sorted(parts["train"], key=lambda document: digest("sample", document.name)):
            if left <= 0:
                break
            text = _readable(document)[:left]
            left -= len(text)
            yield from (line for line in text.splitlines() if line.strip())


def _readable(document: Document) -> str:
    if not document.turns:
        return document.text.decode("utf-8", "ignore")
    return "\n".join(_question(turn) if at % 2 == 0 else turn for at, turn in enumerate(document.turns))


def _question(text: str) -> str:
    return f"[INST] {text} [/INST]"


class Encoder:
    """Encodes whole documents with a ``tokenizer.model``; any bytes, of any length."""

    def __init__(self, model: bytes) -> None:
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer: not a sentencepiece model ({error})") from None
        self._newline = self._pieces.encode("\n")
        if self._pieces.bos_id() != BOS_ID or self._pieces.eos_id() != EOS_ID:
            raise ValueError(f"tokenizer: begin and end must be ids {BOS_ID} and {EOS_ID}, as Mistral's are")

    @property
    def vocab_size(self) -> int:
        return self._pieces.vocab_size()

    def document(self, document: Document) -> list[int]:
        """Begin, text, end; a dialogue in Mistral's template ``<s>[INST] q [/INST] a</s>[INST] …``."""
        if not document.turns:
            return [BOS_ID, *self.text(document.text), EOS_ID]
        ids = [BOS_ID]
        for at, turn in enumerate(document.turns):
            ids += self._pieces.encode(_question(turn)) if at % 2 == 0 else [*self._pieces.encode(turn), EOS_ID]
        return ids

    def text(self, text: bytes) -> list[int]:
        """Ids of ``text``; bytes that are not UTF-8 become byte pieces, so that nothing is lost."""
        ids: list[int] = []
        for run in _INVALID.split(text.decode("utf-8", "surrogateescape")):
            if _INVALID.match(run):
                raw = run.encode("utf-8", "surrogateescape")
                ids += [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in raw]
                continue
            for chunk in _chunks(run):
                ids += self._continue(chunk) if ids else self._pieces.encode(chunk)
        return ids

    def _continue(self, text: str) -> list[int]:
        """Ids of text in the middle of a document: without the space that sentencepiece puts before a text."""
        ids = self._pieces.encode("\n" + text)
        cut = len(self._newline)
        return ids[cut:] if ids[:cut] == self._newline else self._pieces.encode(text)


def _chunks(text: str) -> Iterator[str]:
    """Pieces of about ``_CHUNK`` characters that end with a line where lines are not longer than that."""
    start = 0
    while start < len(text):
        end = start + _CHUNK
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


class _Meta(msgspec.Struct):
    heldout_bytes: dict[str, Positive]


@dataclass(frozen=True)
class TokenSet:
    """Tokens of every domain.

    Attributes:
        train, heldout: domain → uint16 ids, documents one after the other.
        heldout_bytes: domain → bytes of the held-out text, for bits per byte.
        tokenizer: content of the ``tokenizer.model`` that made the ids.
    """

    train: Mapping[str, np.ndarray]
    heldout: Mapping[str, np.ndarray]
    heldout_bytes: Mapping[str, int]
    tokenizer: bytes

    @classmethod
    def encode(cls, corpus: Corpus, tokenizer: bytes) -> TokenSet:
        """Encodes every document of the corpus."""
        encoder = Encoder(tokenizer)
        if encoder.vocab_size > 1 << 16:
            raise ValueError(f"tokenizer: vocab_size ({encoder.vocab_size}) must be at most {1 << 16}")
        streams: dict[str, dict[str, np.ndarray]] = {name: {} for name in SPLITS}
        for domain, parts in corpus.items():
            for name in SPLITS:
                ids = [np.array(encoder.document(document), np.uint16) for document in parts[name]]
                streams[name][domain] = np.concatenate(ids)
        sizes = {domain: sum(d.num_bytes for d in parts["heldout"]) for domain, parts in corpus.items()}
        return cls(streams["train"], streams["heldout"], sizes, tokenizer)

    @property
    def vocab_size(self) -> int:
        return Encoder(self.tokenizer).vocab_size

    def equals(self, other: TokenSet) -> bool:
        """Whether the other has the same tokens, of the same tokenizer."""
        mine, theirs = ((s.train, s.heldout) for s in (self, other))
        same = (self.tokenizer, dict(self.heldout_bytes)) == (other.tokenizer, dict(other.heldout_bytes))
        return same and all(
            a.keys() == b.keys() and all(np.array_equal(a[domain], b[domain]) for domain in a)
            for a, b in zip(mine, theirs, strict=True)
        )

    def save(self, path: Path) -> None:
        """Writes a compressed ``.npz``."""
        arrays = {f"{name}/{domain}": ids for name in SPLITS for domain, ids in getattr(self, name).items()}
        meta = json.dumps({"version": 1, "heldout_bytes": dict(self.heldout_bytes)})
        with writing(path) as unfinished, open(unfinished, "wb") as file:
            np.savez_compressed(file, meta=meta, tokenizer=np.frombuffer(self.tokenizer, np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> TokenSet:
        """Reads what ``save`` wrote; errors name the file."""
        try:
            arrays = read_arrays(path)
            sizes = conform(parse_json(str(arrays.pop("meta"))), _Meta).heldout_bytes
            tokenizer = arrays.pop("tokenizer").tobytes()
            for key, ids in arrays.items():
                if ids.ndim != 1 or ids.dtype != np.uint16 or key.partition("/")[0] not in SPLITS:
                    raise ValueError(f"{shown(key)} must be train/ or heldout/ with a list of uint16 ids")
            for name in SPLITS:
                if {key for key in arrays if key.startswith(f"{name}/")} != {f"{name}/{domain}" for domain in sizes}:
                    raise ValueError(f"{name}/ must be there for each of the domains {shown(sorted(sizes))}")
        except KeyError as error:
            raise ValueError(f"{path}: not a file of tokens (lacks {error.args[0]})") from None
        except ValueError as error:
            raise ValueError(f"{path}: not a file of tokens ({error})") from None
        train, heldout = (
            {key.split("/", 1)[1]: ids for key, ids in arrays.items() if key.startswith(f"{name}/")} for name in SPLITS
        )
        return cls(train, heldout, sizes, tokenizer)
