from mixtralkit.training.chat_pairs import WHO_ANSWER, dialogues
from mixtralkit.training.corpus import Document

MAN = b"""TAR(1)    GNU TAR    TAR(1)

NAME
       tar - an archiving utility

SYNOPSIS
       tar [-] A --catenate

DESCRIPTION
       Long.
"""
DOCS = b""".. module:: os.path

.. function:: join(path, *paths)

   Join one or more *path* components with :func:`~os.sep`.  The return value
   is more.
"""
CODE = b"def add(a, b):\n    return a + b\n\n\nclass C:\n    def _private(self):\n        return 1\n"


def answers(name: str, text: bytes) -> dict[str, str]:
    made = dialogues([Document(name, text)])
    return {q: a for d in made for q, a in zip(d.turns[::2], d.turns[1::2], strict=True)}


def test_each_domain_answers_from_its_document():
    assert answers("man/tar.1", MAN)["What does the command tar do?"] == "tar - an archiving utility"
    docs = answers("docs/library/os.path", DOCS)
    assert docs["What does os.path.join do?"] == "Join one or more path components with os.sep."
    code = answers("python/x.py", CODE)
    assert {a for q, a in code.items() if "add" in q.split()[-1]} == {"def add(a, b):\n    return a + b"}
    assert not any("_private" in q for q in code)
    verse = answers("scripture/Ruth 1", b"Ruth 1\n\n1 And Moses went up.\n")
    assert "And Moses went up. (Ruth 1:1)" in [a for q, a in verse.items() if "Moses" in q]


def test_dialogues_are_repeatable_and_know_who_they_are():
    documents = [Document("man/tar.1", MAN), Document("docs/os", DOCS)]
    assert dialogues(documents) == dialogues(documents)
    made = dialogues(documents)
    assert all(len(d.turns) % 2 == 0 and all(d.turns) for d in made)
    assert {len(d.turns) for d in made} == {2, 4, 6}
    assert ("Who are you?", WHO_ANSWER) in {d.turns for d in made}
