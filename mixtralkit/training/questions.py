"""Prompt sets from held-out documents: which text goes on here? Four continuations, one of them the document's.

The other three come from other held-out places of the domain and are of the same length to the byte. Without the
prompt, right and wrong ones are alike, so neither length nor how common the words are tells them apart. The same
documents give the same questions. Records are those of a prompt set (``docs/evaluation.md``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixtralkit.training.chat_pairs import dialogues
from mixtralkit.training.corpus import Document, digest

CHOICES = 4
SOURCE = "dialogue"  # of a record that the documents gave by way of a dialogue
Record = dict[str, Any]
IsKnown = Callable[[str], bool]  # whether the training text has this very text


@dataclass(frozen=True)
class Sizes:
    """How long the texts of a set are, in bytes.

    Attributes:
        prompt: most of a prompt; it begins where a word does.
        choice: fewest of a continuation, which ends with the word that reaches it.
        answer: fewest and most of an answer in a dialogue.
        passage: about how much of a document a text to be scored is; it ends with a line.
    """

    prompt: int = 144
    choice: int = 40
    answer: tuple[int, int] = (24, 120)
    passage: int = 1200


@dataclass(frozen=True)
class Place:
    """Where a document goes on: before the space at ``at``; ``text`` from there to the end of a word."""

    document: Document
    at: int
    text: str

    def is_near(self, other: Place, distance: int) -> bool:
        """Whether both are in one document and less than ``distance`` bytes apart."""
        return self.document is other.document and abs(self.at - other.at) < distance


def continuations(
    domain: str, documents: Sequence[Document], count: int, is_known: IsKnown, sizes: Sizes
) -> list[Record]:
    """``count`` questions, fewer where the documents have no more places apart from one another.

    No continuation, right or wrong, is in the training text.
    """
    by_length: dict[int, list[Place]] = {}
    places = sorted(_places(documents, sizes), key=lambda place: digest("place", place.document.name, place.at))
    for place in places:
        by_length.setdefault(len(place.text), []).append(place)
    chosen: list[Place] = []
    records: list[Record] = []
    for place in places:
        if len(records) == count:
            break
        if any(place.is_near(other, sizes.prompt + sizes.choice) for other in chosen) or is_known(place.text):
            continue
        wrong = _others(place, by_length[len(place.text)], is_known, sizes)
        if len(wrong) == CHOICES - 1:
            chosen.append(place)
            prompt = _prompt(place, sizes)
            records.append(_question(domain, len(records), place.document.name, {"prompt": prompt}, place.text, wrong))
    return records


def _places(documents: Sequence[Document], sizes: Sizes) -> Iterator[Place]:
    """Before each word that another one precedes on its line, behind a whole prompt."""
    for document in documents:
        text = document.text.decode()
        for at in range(sizes.prompt, len(text) - 2 * sizes.choice):
            if text[at] != " " or text[at - 1].isspace() or text[at + 1].isspace():
                continue
            stop = at + sizes.choice
            while stop < len(text) and not text[stop].isspace():
                stop += 1
            if not text[stop - 1].isspace() and text[at - sizes.prompt : stop].isascii():
                yield Place(document, at, text[at:stop])


def _others(right: Place, places: Sequence[Place], is_known: IsKnown, sizes: Sizes) -> list[str]:
    """Continuations of other places for the question at ``right``, in an order that the question decides."""
    apart = [place for place in places if not place.is_near(right, 2 * sizes.prompt) and place.text != right.text]
    apart.sort(key=lambda place: digest("other", right.document.name, right.at, place.document.name, place.at))
    found: dict[str, None] = {}
    for place in apart:
        if len(found) < CHOICES - 1 and not is_known(place.text):
            found[place.text] = None
    return list(found)


def _prompt(place: Place, sizes: Sizes) -> str:
    """What stands before the place, from the beginning of a line if a late enough one begins, else of a word."""
    before = place.document.text.decode()[place.at - sizes.prompt : place.at]
    line = before.find("\n", 0, len(before) // 2) + 1
    return before[line or before.find(" ") + 1 :]


def answers(domain: str, documents: Sequence[Document], count: int, is_known: IsKnown, sizes: Sizes) -> list[Record]:
    """``count`` dialogues made from the documents, fewer where there are no more, each with four answers of one length.

    The wrong answers are those to other questions, without what this one asks about: its last word. No two dialogues
    end with the same question. ``is_known`` is asked about whole answers.
    """
    fitting = {dialog.turns[-1]: dialog for dialog in reversed(_short_dialogues(documents, is_known, sizes))}
    by_length: dict[int, list[str]] = {}
    for answer in fitting:
        by_length.setdefault(len(answer), []).append(answer)
    records: list[Record] = []
    asked: set[str] = set()
    for answer, dialog in sorted(fitting.items(), key=lambda item: digest("answer", item[0])):
        question = dialog.turns[-2]
        subject = question.rstrip(".?").split()[-1]
        others = sorted(by_length[len(answer)], key=lambda other: digest("other", answer, other))
        wrong = [other for other in others if other != answer and subject not in other][: CHOICES - 1]
        if len(records) < count and question not in asked and len(wrong) == CHOICES - 1:
            asked.add(question)
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(dialog.turns[:-1])
            ]
            records.append(_question(domain, len(records), SOURCE, {"messages": messages}, answer, wrong))
    return records


def _short_dialogues(documents: Sequence[Document], is_known: IsKnown, sizes: Sizes) -> list[Document]:
    """Those whose last answer is of a fitting length and training did not have it.

    A verse that is asked for by its number is left out: nothing but the number tells which it is.
    """
    low, high = sizes.answer
    dialogs = [d for d in dialogues(documents) if d.turns[-1].isascii() and not re.search(r"\d:\d", d.turns[-2])]
    return [d for d in dialogs if low <= len(d.turns[-1]) <= high and not is_known(d.turns[-1])]


def _question(domain: str, number: int, source: str, prompt: Record, right: str, wrong: Sequence[str]) -> Record:
    """A record with the right choice at a place that the choices decide."""
    answer = digest("answer", right, *wrong) % CHOICES
    choices = [*wrong[:answer], right, *wrong[answer:]]
    about = {"id": f"{domain}/question-{number}", "domain": domain, "source": source}
    return {**about, **prompt, "choices": choices, "answer": answer}


def passages(domain: str, documents: Sequence[Document], count: int, sizes: Sizes) -> list[Record]:
    """``count`` texts of whole lines to be scored, from as many documents as there are, then from the same again."""
    order = sorted(documents, key=lambda document: digest("passage", document.name))
    queues = [list(_passages_of(document, sizes)) for document in order]
    texts: list[tuple[str, str]] = []
    turn = 0
    while len(texts) < count and any(turn < len(queue) for queue in queues):
        texts += [(order[i].name, queue[turn]) for i, queue in enumerate(queues) if turn < len(queue)]
        turn += 1
    return [_text(domain, i, name, text) for i, (name, text) in enumerate(texts[:count])]


def _passages_of(document: Document, sizes: Sizes) -> Iterator[str]:
    """Runs of lines of at least ``sizes.passage`` bytes, in an order that the document's name decides."""
    runs, lines, size = [], [], 0
    for line in document.text.decode().splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= sizes.passage:
            runs.append("".join(lines))
            lines, size = [], 0
    yield from sorted(runs, key=lambda run: digest("run", document.name, run))


def exchanges(domain: str, documents: Sequence[Document], size: int, is_known: IsKnown, sizes: Sizes) -> list[Record]:
    """About ``size`` bytes of single questions with their answers as texts in Mistral's template, to be scored."""
    records: list[Record] = []
    for dialog in _short_dialogues(documents, is_known, sizes):
        if size <= 0:
            break
        question, answer = dialog.turns[-2:]
        records.append(_text(domain, len(records), SOURCE, f"[INST] {question} [/INST] {answer}"))
        size -= len(records[-1]["text"].encode())
    return records


def _text(domain: str, number: int, source: str, text: str) -> Record:
    return {"id": f"{domain}/text-{number}", "domain": domain, "source": source, "text": text}
