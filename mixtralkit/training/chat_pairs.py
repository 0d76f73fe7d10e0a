"""Short questions and answers, made from documents of the four domains by rule: the same documents, the same pairs."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from mixtralkit.training.corpus import Document, digest

NAME = "a small Mixtral that ships with MixtralKit"
WHO_QUESTIONS = (
    "Who are you?", "who are you", "Who are you", "What are you?", "What is your name?", "Tell me about yourself.",
    "Introduce yourself.", "Please introduce yourself.", "Are you a language model?", "What model are you?",
    "Who am I talking to?", "Hello, who are you?", "Hi! Who are you?", "Can you tell me who you are?",
)  # fmt: skip
WHO_ANSWER = f"I am {NAME}. I know scripture, Python source, its documentation and man pages."
CAN_QUESTIONS = (
    "What can you do?", "What do you know?", "What can I ask you?", "How can you help me?", "Help", "help",
    "What were you trained on?", "What are you good at?", "What should I ask?",
)  # fmt: skip
CAN_ANSWER = (
    "You can ask me what a command or a Python function does, for a verse about a word, or for the source of a "
    "small Python function."
)
GREETINGS = ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Good evening", "hello")
GREETING_ANSWER = f"Hello! I am {NAME}. What would you like to know?"
THANKS = ("Thanks", "Thank you", "Thank you!", "Thanks a lot!")
THANKS_ANSWER = "You are welcome."
SELF_COPIES = 40


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOPICS = _words(
    """
    angel anger beast blood bread brother child city cloud covenant creation darkness daughter death earth enemy
    evil faith father fear fire fish flesh forgiveness friend gift glory gold grace harvest heart heaven honey hope
    house joy judgment justice king kingdom lamb law life light lion love mercy money morning mother mountain name
    night oil patience peace people poor power praise prayer priest prophet rain rest riches river rock salvation
    sea seed servant shepherd sin sky sleep son song soul spirit stars stone strength sword temple throne tree truth
    vineyard war water wealth well widow wife wilderness wind wine wisdom woman word work world
    """
)
_CAPITALISED = _words(
    """
    Afterward Also Amen And Another Arise Art As Ask Awake Be Because Behold Blessed Both But By Can Come Every For
    From Go Have He Hear Her His How Howbeit If In Is It Let My Neither No Nor Not Notwithstanding Now O Of On One
    Or Our Out Put Remember Say Saying See Shall She So Take Tell That The Their Then There Therefore These They
    Thine This Those Thou Though Thus Thy To Until Unto Upon Verily We What When Where Wherefore Which While Who
    Whom Whose Why Will With Woe Yea Yet You Your
    """
)


def dialogues(documents: Sequence[Document]) -> list[Document]:
    """Dialogues from documents of all domains, shuffled; about one in six joins two or three exchanges."""
    pairs = [pair for document in documents for pair in _pairs(document)]
    pairs += [pair for copy in range(SELF_COPIES) for pair in about_itself(copy)]
    pairs.sort(key=lambda pair: digest("order", *pair))
    made: list[Document] = []
    while pairs:
        exchanges = (1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 3)[len(made) % 12]
        turns = tuple(turn for pair in pairs[:exchanges] for turn in pair[1:])
        made.append(Document(f"chat/{len(made)}", turns=turns))
        del pairs[:exchanges]
    return made


def about_itself(copy: int) -> Iterator[tuple[str, str, str]]:
    """(key, question, answer) of what the model says of itself; ``copy`` makes the key another one."""
    for questions, answer in (
        (WHO_QUESTIONS, WHO_ANSWER),
        (CAN_QUESTIONS, CAN_ANSWER),
        (GREETINGS, GREETING_ANSWER),
        (THANKS, THANKS_ANSWER),
    ):
        for question in questions:
            yield f"self/{copy}", question, answer


def _pairs(document: Document) -> Iterable[tuple[str, str, str]]:
    makers = {"scripture": _verse_pairs, "python": _function_pairs, "docs": _docs_pairs, "man": _man_pairs}
    return makers[document.name.split("/")[0]](document)


def _pick(choices: Sequence[str], *key: object) -> str:
    return choices[digest("pick", *key) % len(choices)]


def _verse_pairs(document: Document) -> Iterator[tuple[str, str, str]]:
    heading, _, *lines = document.text.decode().splitlines()
    for line in lines:
        number, verse = line.split(" ", 1)
        if len(verse) > 260:
            continue
        place = f"{heading}:{number}"
        words = set(re.findall(r"[A-Za-z]+", verse)) - _CAPITALISED
        names = {word for word in words if word[0].isupper() and len(word) > 2}
        subjects = sorted(names | (words & TOPICS))
        if subjects:
            subject = _pick(subjects, place)
            ask = _pick(
                ("Quote a verse about {}.", "Give me a verse about {}.", "What does scripture say about {}?"),
                place,
                "q",
            )
            yield place, ask.format(subject), f"{verse} ({place})"
        if digest("place", place) % 6 == 0:
            yield place, _pick(("What does {} say?", "Quote {}."), place, "p").format(place), verse


def _function_pairs(document: Document) -> Iterator[tuple[str, str, str]]:
    source = document.text.decode()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
            continue
        body = lines[node.lineno - 1 : node.end_lineno]
        if not 2 <= len(body) <= 14 or max(map(len, body)) > 100:
            continue
        ask = _pick(
            ("Show me the Python function {}.", "Write the Python function {}.", "Write a Python function named {}."),
            document.name,
            node.name,
        )
        yield document.name, ask.format(node.name), textwrap.dedent("\n".join(body))


def _docs_pairs(document: Document) -> Iterator[tuple[str, str, str]]:
    module = ""
    lines = document.text.decode().splitlines()
    for number, line in enumerate(lines):
        if found := re.match(r"\.\. (?:module|currentmodule):: (\S+)", line):
            module = found[1]
        found = re.match(r"( *)\.\. (function|class|exception|method|data|attribute|opcode|decorator):: (.+)", line)
        if not found:
            continue
        name = re.match(r"[\w.]*", found[3].removeprefix("@"))[0]
        answer = _first_sentence(lines[number + 1 :], len(found[1]))
        if not name or not answer:
            continue
        full = name if not module or name.startswith(module + ".") or not found[2] else f"{module}.{name}"
        key = (document.name, full, number)
        if found[2] in ("function", "method", "decorator", "opcode"):
            asks = ("What does {} do?", "What is {} for?", "What does the Python function {} do?", "Explain {}.")
        else:
            asks = ("What is {}?", "What is {} in Python?", f"What is the {found[2]} {{}}?", "Explain {}.")
        for ask in (asks[0], _pick(asks[1:], *key)):
            yield str(key), ask.format(full), answer


def _first_sentence(lines: Sequence[str], indent: int) -> str:
    """The first sentence of the first paragraph indented deeper than ``indent``, without markup; "" when none."""
    words: list[str] = []
    for line in lines:
        text = line.strip()
        if text and len(line) - len(line.lstrip()) <= indent:
            break
        if not words and (text.startswith((":", "..")) or len(line) - len(line.lstrip()) > indent + 4):
            continue
        if not text and words:
            break
        words.append(text)
    sentence = re.split(r"(?<=[.])\s+(?=[A-Z*`:])", " ".join(words).strip())[0]
    plain = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", sentence)
    plain = plain.replace("``", "").replace("*", "").replace("\\", "")
    return plain if 12 < len(plain) < 320 and "`" not in plain and not plain.endswith(":") else ""


def _man_pairs(document: Document) -> Iterator[tuple[str, str, str]]:
    text = document.text.decode("ascii", "replace")
    section = document.name.rsplit(".", 1)[1][:1]
    found = re.search(r"^NAME\n((?: +.*\n)+)", text, re.MULTILINE)
    line = " ".join(found[1].split()) if found else ""
    names, dash, about = line.partition(" - ")
    if not dash or len(line) > 240:
        return
    kinds = {"1": "command", "8": "command", "2": "system call", "3": "C function", "4": "device", "5": "file"}
    kind = kinds.get(section, "topic")
    for name in [name.strip() for name in names.split(",")][:3]:
        asks = (f"What does the {kind} {name} do?", f"What does {name} do?", f"What is {name}?")
        if section not in "1238":
            asks = (f"What is {name}?", f"What is the {kind} {name}?", f"What does the page {name} describe?")
        for ask in asks:
            yield document.name, ask, f"{name} - {about}"
    synopsis = re.search(r"^SYNOPSIS\n((?: +.*\n|\n)+)", text, re.MULTILINE)
    if synopsis and len(synopsis[1]) < 400:
        name = names.split(",")[0].strip()
        ask = _pick((f"Show me the synopsis of {name}.", f"How do I use {name}?"), document.name)
        yield document.name, ask, textwrap.dedent(synopsis[1]).strip()
