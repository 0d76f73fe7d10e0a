"""Text in domains: reading, writing and splitting it. A document is what is split off whole for the held-out part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtralkit.whole_file import writing

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Document:
    """One text, or one dialogue.

    ``turns`` is empty for a text; else it alternates question and answer, and ``text`` is empty. ``text`` is bytes
    because a file need not be UTF-8. ``name`` decides the split.
    """

    name: str
    text: bytes = b""
    turns: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the text, or of the questions and answers together."""
        return len(self.text) + sum(len(turn.encode()) for turn in self.turns)


def digest(*parts: object) -> int:
    """A number below 2**32 that depends on ``parts`` only: the same on every machine and in every run."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def split(documents: Sequence[Document], heldout_percent: float = 4.0) -> dict[str, list[Document]]:
    """Documents of each split, in their order; a document's name alone decides, so the split never moves."""
    parts: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        heldout = digest("split", document.name) < heldout_percent / 100 * 2**32
        parts["heldout" if heldout else "train"].append(document)
    return parts


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """One JSON object a line: ``name`` and ``text``, or ``name`` and ``turns``. Texts must be UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for document in documents:
            body = {"turns": document.turns} if document.turns else {"text": document.text.decode()}
            file.write(json.dumps({"name": document.name, **body}, ensure_ascii=False) + "\n")


def read_documents(path: Path) -> list[Document]:
    """Reads what ``write_documents`` wrote; ValueError names file and line."""
    documents = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                body = json.loads(line)
                turns = tuple(body.get("turns", ()))
                documents.append(Document(body["name"], body.get("text", "").encode(), turns))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}: line {number} is not an object with name and text or turns") from None
    return documents


def load_corpus(paths: Sequence[str | Path], heldout_percent: float = 4.0) -> dict[str, dict[str, list[Document]]]:
    """Domain → split → documents, from prepared folders and plain files.

    A prepared folder holds ``train/DOMAIN.jsonl`` and ``heldout/DOMAIN.jsonl``. Any other folder's files are one
    domain of its name, a document each, split by name. A plain file is a domain of its own whose last
    ``heldout_percent`` are held out. Domains come in the order of their names.
    """
    corpus: dict[str, dict[str, list[Document]]] = {}
    for path in map(Path, paths):
        for domain, parts in _load_path(path, heldout_percent).items():
            if domain in corpus:
                raise ValueError(f"text: two domains are named {domain!r}; rename one of the files")
            corpus[domain] = parts
    for domain, parts in corpus.items():
        for name in SPLITS:
            if not any(document.num_bytes for document in parts[name]):
                raise ValueError(
                    f"text: domain {domain!r} has no {name} text; give more files or another heldout_percent"
                )
    return dict(sorted(corpus.items()))


def _load_path(path: Path, heldout_percent: float) -> dict[str, dict[str, list[Document]]]:
    if not path.exists():
        raise ValueError(f"text: {path} does not exist")
    if (path / SPLITS[0]).is_dir():
        files = sorted((path / SPLITS[0]).glob("*.jsonl"))
        return {file.stem: {name: read_documents(path / name / file.name) for name in SPLITS} for file in files}
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        documents = [Document(str(file.relative_to(path)), file.read_bytes()) for file in files]
        return {path.resolve().name: split(documents, heldout_percent)}
    text = path.read_bytes()
    cut = len(text) - round(len(text) * heldout_percent / 100)
    cut = text.rfind(b"\n", 0, cut) + 1 or cut  # not in the middle of a line, where there are lines
    return {path.stem: {"train": [Document(path.name, text[:cut])], "heldout": [Document(path.name, text[cut:])]}}
