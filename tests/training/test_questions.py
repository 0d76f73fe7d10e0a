"""Questions from documents: every promise about them is checked on made-up text; the unigram baseline by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from mixtralkit.cli.prompt_sets import OPEN, prompt_sets
from mixtralkit.training.corpus import Document, load_corpus, write_documents
from mixtralkit.training.questions import CHOICES, Sizes, answers, continuations, exchanges, passages
from mixtralkit.training.tokens import TokenSet
from mixtralkit.training.unigram import Unigram

ROOT = Path(__file__).resolve().parents[2]

SIZES = Sizes(prompt=60, choice=20, answer=(10, 80), passage=300)
WORDS = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "omicron", "pi", "rho", "sigma", "tau",
)  # fmt: skip


def _documents(count: int = 4, lines: int = 60) -> list[Document]:
    rng = random.Random(0)
    texts = ["".join(" ".join(rng.choices(WORDS, k=8)) + "\n" for _ in range(lines)) for _ in range(count)]
    return [Document(f"greek/{i}", text.encode()) for i, text in enumerate(texts)]


def _nothing(text: str) -> bool:
    return False


def test_one_choice_is_how_the_document_goes_on_and_three_are_from_elsewhere():
    documents = _documents()
    texts = {document.name: document.text.decode() for document in documents}
    records = continuations("greek", documents, 20, _nothing, SIZES)
    assert len({record["id"] for record in records}) == len(records) == 20
    assert {record["answer"] for record in records} == set(range(CHOICES))
    for record in records:
        right = record["choices"][record["answer"]]
        assert record["prompt"] + right in texts[record["source"]]
        assert len(record["prompt"]) <= SIZES.prompt
        for choice in record["choices"]:
            assert len(choice) == len(right) >= SIZES.choice
            assert choice[0] == " "
            assert any(choice in text for text in texts.values())
            assert choice == right or record["prompt"] + choice not in texts[record["source"]]
        assert len(set(record["choices"])) == CHOICES


def test_questions_of_one_document_are_apart():
    document = _documents(count=1, lines=200)[0]
    text = document.text.decode()
    records = continuations("greek", [document], 30, _nothing, SIZES)
    places = sorted(text.index(record["prompt"] + record["choices"][record["answer"]]) for record in records)
    assert len(records) == 30
    assert min(b - a for a, b in itertools.pairwise(places)) >= SIZES.choice


def test_no_choice_is_known_from_training():
    records = continuations("greek", _documents(), 20, lambda text: "alpha" in text, SIZES)
    assert records
    assert not any("alpha" in choice for record in records for choice in record["choices"])
    assert any("alpha" in record["prompt"] for record in records)


def test_the_same_documents_give_the_same_questions_in_whatever_order_they_come():
    documents = _documents()
    first = continuations("greek", documents, 10, _nothing, SIZES)
    assert continuations("greek", documents, 10, _nothing, SIZES) == first
    again = continuations("greek", documents[::-1], 10, _nothing, SIZES)
    assert [record["prompt"] for record in again] == [record["prompt"] for record in first]


def test_too_few_places_give_fewer_questions():
    assert continuations("greek", [Document("greek/0", b"too short for a prompt")], 5, _nothing, SIZES) == []


def _chapters() -> list[Document]:
    rng = random.Random(1)
    names = ("Abel", "Boaz", "Cain", "Dora", "Esau", "Ezra", "Gath", "Hoth", "Ijon", "Joab")
    verses = [f"{i + 1} And {name} went to the {rng.choice(('well', 'gate', 'land'))}." for i, name in enumerate(names)]
    return [Document("scripture/Test 1", ("Test 1\n\n" + "\n".join(verses) + "\n").encode())]


def test_answers_are_to_other_questions_and_of_the_same_length():
    records = answers("chat", _chapters(), 6, _nothing, SIZES)
    assert len({record["messages"][-1]["content"] for record in records}) == len(records) > 0
    for record in records:
        asked = record["messages"][-1]["content"]
        right = record["choices"][record["answer"]]
        assert asked.rstrip(".?").split()[-1] in right  # "Give me a verse about Joab."
        assert len({len(choice) for choice in record["choices"]}) == 1
        assert len(set(record["choices"])) == CHOICES
        assert sum(asked.rstrip(".?").split()[-1] in choice for choice in record["choices"]) == 1
        assert record["messages"][-1]["role"] == "user"
        assert ":" not in asked  # no verse by its number
    known = records[0]["choices"][0]
    rest = answers("chat", _chapters(), 6, {known}.__contains__, SIZES)
    assert not any(known in record["choices"] for record in rest)


def test_passages_are_whole_lines_of_as_many_documents_as_there_are():
    documents = _documents()
    records = passages("greek", documents, 6, SIZES)
    assert len({record["source"] for record in records[:4]}) == 4
    assert len({record["text"] for record in records}) == 6
    for record in records:
        text = next(d.text.decode() for d in documents if d.name == record["source"])
        at = text.index(record["text"])
        assert at == 0 or text[at - 1] == "\n"
        assert record["text"].endswith("\n")
        assert SIZES.passage <= len(record["text"]) < SIZES.passage + 80


def test_exchanges_are_in_the_template():
    records = exchanges("chat", _chapters(), 200, _nothing, SIZES)
    assert sum(len(record["text"]) for record in records) >= 200 > sum(len(r["text"]) for r in records[:-1])
    assert all(record["text"].startswith("[INST] ") and " [/INST] " in record["text"] for record in records)


def _prepare(folder: Path) -> None:
    """What tools/prepare_text.py leaves, of made-up text that ``chat_pairs`` can read."""
    pages = {
        "scripture": ("Test 1",),
        "python": ("ast.py", "sqlite3/dump.py"),
        "docs": ("a.rst",),
        "man": ("ls.1", "rsa.1ssl"),
    }
    rng = random.Random(2)
    for part in ("train", "heldout"):
        for domain, names in pages.items():
            start = {"scripture": "Test 1\n\n", "python": '"""\n'}.get(domain, "")
            own = []
            for name in names:
                lines = [f"{i} {' '.join(rng.choices(WORDS, k=12))}\n" for i in range(150)]
                end = '"""\n' if domain == "python" else ""
                own.append(Document(f"{domain}/{name}", (start + "".join(lines) + end).encode()))
            write_documents(folder / part / f"{domain}.jsonl", own)
        write_documents(folder / part / "chat.jsonl", [Document("chat/0", turns=("What?", "That."))])
    tokenizer = (ROOT / "ckpts" / "tokenizer.model").read_bytes()
    TokenSet.encode(load_corpus([folder]), tokenizer).save(folder / "tokens.npz")


def test_the_command_asks_only_about_open_held_out_documents(tmp_path):
    _prepare(tmp_path)
    prompt_sets(tmp_path, output=tmp_path / "sets", questions=5, texts=2)
    records = [json.loads(line) for line in (tmp_path / "sets" / "heldout.jsonl").read_text().splitlines()]
    assert {record["source"] for record in records} == {
        "scripture/Test 1", "python/ast.py", "docs/a.rst", "man/rsa.1ssl", "dialogue",
    }  # fmt: skip
    heldout = "".join((tmp_path / "heldout" / f"{d}.jsonl").read_text() for d in OPEN)
    for record in records:
        if record["source"] != "dialogue":
            right = record["text"] if "text" in record else record["prompt"] + record["choices"][record["answer"]]
            assert json.dumps(right)[1:-1] in heldout
    counts = json.loads((tmp_path / "sets" / "token-counts.json").read_text())["counts"]
    assert sum(counts) == sum(map(len, TokenSet.load(tmp_path / "tokens.npz").train.values()))
    again = tmp_path / "again"
    prompt_sets(tmp_path, output=again, questions=5, texts=2)
    assert (again / "heldout.jsonl").read_bytes() == (tmp_path / "sets" / "heldout.jsonl").read_bytes()


def test_the_command_names_the_domains_that_are_missing(tmp_path):
    _prepare(tmp_path)
    for part in ("train", "heldout"):
        (tmp_path / part / "man.jsonl").unlink()
    with pytest.raises(ValueError, match="has no domain man;"):
        prompt_sets(tmp_path, output=tmp_path / "sets")
    assert not (tmp_path / "sets").exists()


def test_unigram_by_hand(tmp_path):
    unigram = Unigram([0, 6, 1])  # the unseen one counts as seen once, of 8
    assert unigram.logprob([1, 1, 0]) == pytest.approx(2 * math.log(6 / 8) + math.log(1 / 8))
    (tmp_path / "counts.json").write_text('{"counts": [0, 6, 1]}')
    assert Unigram.load(tmp_path / "counts.json").logprob([2]) == pytest.approx(math.log(1 / 8))
    (tmp_path / "counts.json").write_text("{}")
    with pytest.raises(ValueError, match=r"counts\.json: has no counts"):
        Unigram.load(tmp_path / "counts.json")
