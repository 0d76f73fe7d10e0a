"""``mixtralkit prompt-sets``: configs/prompts/heldout.jsonl from the text that ``prepare-text`` prepared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from mixtralkit.cli.run import command
from mixtralkit.config import shipped
from mixtralkit.config.options import Natural
from mixtralkit.training.corpus import Document, load_corpus
from mixtralkit.training.questions import IsKnown, Record, Sizes, answers, continuations, exchanges, passages
from mixtralkit.training.tokens import TokenSet
from mixtralkit.whole_file import check_free, writing

# Documents whose licence lets parts of them stand here (configs/prompts/README.md): of the man pages OpenSSL's, of
# Python's library what the Python Software Foundation licenses.
OPEN = {"scripture": "*", "python": "*", "docs": "*", "man": "*ssl"}
NOT_OPEN = "python/sqlite3/*"
CHAT = "chat"


@command
def prompt_sets(
    text: Path,
    tokens: Path | None = None,
    output: Path | None = None,
    questions: Natural = 100,
    texts: Natural = 5,
    overwrite: bool = False,
) -> None:
    """Writes OUTPUT/heldout.jsonl (questions and texts of every domain) and OUTPUT/token-counts.json.

    Only held-out documents are used, and of these only continuations that the training text does not have anywhere.
    The counts, of the training tokens, are what a unigram baseline needs.

    Args:
        text: folder that prepare-text wrote.
        tokens: the encoded text; left out, tokens.npz in that folder.
        output: folder for the two files; left out, configs/prompts.
        questions: of each domain, at most.
        texts: of each domain but chat, which has as many bytes of short ones.
        overwrite: replace the two files where they are there already.
    """
    output = shipped("prompts") if output is None else output
    lines, counts = output / "heldout.jsonl", output / "token-counts.json"
    for path in (lines, counts):
        check_free(path, overwrite)
    corpus = load_corpus([text])
    missing = sorted({*OPEN, CHAT} - set(corpus))
    if missing:
        raise ValueError(f"text ({text}) has no domain {', '.join(missing)}; prepare-text makes them all")
    counted = TokenSet.load(text / "tokens.npz" if tokens is None else tokens)
    sizes = Sizes()
    is_known = _search([document for name in OPEN for document in corpus[name]["train"]])
    records: list[Record] = []
    open_documents: list[Document] = []
    for domain, pattern in OPEN.items():
        documents = [
            document
            for document in corpus[domain]["heldout"]
            if fnmatch(document.name, pattern) and not fnmatch(document.name, NOT_OPEN)
        ]
        records += continuations(domain, documents, questions, is_known, sizes)
        records += passages(domain, documents, texts, sizes)
        open_documents += documents
    known_answers = {turn for document in corpus[CHAT]["train"] for turn in document.turns[1::2]}
    records += answers(CHAT, open_documents, questions, known_answers.__contains__, sizes)
    records += exchanges(CHAT, open_documents, texts * sizes.passage, known_answers.__contains__, sizes)
    output.mkdir(parents=True, exist_ok=True)
    _write_lines(lines, records)
    _write_counts(counted, counts)
    for domain in (*OPEN, CHAT):
        own = [record for record in records if record["domain"] == domain]
        asked = sum("choices" in record for record in own)
        print(f"{domain:10} {asked:4} questions {len(own) - asked:4} texts")


def _search(documents: Iterable[Document]) -> IsKnown:
    whole = "\0".join(document.text.decode() for document in documents)
    return lambda text: text in whole


def _write_lines(path: Path, records: Iterable[Record]) -> None:
    with writing(path) as unfinished:
        unfinished.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def _write_counts(tokens: TokenSet, path: Path) -> None:
    counts = sum(np.bincount(ids, minlength=tokens.vocab_size) for ids in tokens.train.values())
    with writing(path) as unfinished:
        unfinished.write_text(json.dumps({"counts": counts.tolist()}, separators=(",", ":")) + "\n", encoding="utf-8")
