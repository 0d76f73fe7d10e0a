import pytest

from mixtralkit.training.corpus import Document, load_corpus, read_documents, split, write_documents


def test_documents_round_trip(tmp_path):
    documents = [Document("a", "über\u2028\n".encode()), Document("b", turns=("q\n", "a"))]
    write_documents(tmp_path / "train" / "d.jsonl", documents)
    assert read_documents(tmp_path / "train" / "d.jsonl") == documents


def test_split_depends_on_names_alone():
    documents = [Document(f"page/{i}", b"x") for i in range(2000)]
    parts = split(documents, 5.0)
    assert 60 < len(parts["heldout"]) < 140
    assert len(parts["train"]) + len(parts["heldout"]) == 2000
    assert split(documents[::-1], 5.0)["heldout"] == parts["heldout"][::-1]


def test_plain_file_is_a_domain_that_holds_out_its_end(tmp_path):
    text = b"".join(b"line %d \xff\n" % i for i in range(1000))
    (tmp_path / "enwik8").write_bytes(text)
    parts = load_corpus([tmp_path / "enwik8"], 10.0)["enwik8"]
    assert parts["train"][0].text + parts["heldout"][0].text == text
    assert parts["train"][0].text.endswith(b"\n")
    assert abs(parts["heldout"][0].num_bytes - len(text) / 10) < 20


def test_bad_inputs_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_corpus([tmp_path / "none"])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="'a' has no"):
        load_corpus([tmp_path / "a.txt"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("x" * 500)
    with pytest.raises(ValueError, match="two domains are named 'a'"):
        load_corpus([tmp_path / "a.txt", tmp_path / "b" / "a.txt"])
    (tmp_path / "d.jsonl").write_text('{"name": "a", "text": "b"}\n{"name": 1\n')
    with pytest.raises(ValueError, match=r"d\.jsonl: line 2"):
        read_documents(tmp_path / "d.jsonl")
