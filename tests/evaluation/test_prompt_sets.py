"""Prompt files are read strictly; result files are written whole lines at a time and continued."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mixtralkit.evaluation.prompt_sets import PromptRecord, ResultsWriter, read_prompts

EXAMPLES = Path(__file__).resolve().parents[2] / "configs" / "prompts" / "examples.jsonl"
DIALOG = [{"role": "user", "content": "hi"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_reads_every_key_of_a_jsonl_line(tmp_path):
    lines = [
        {"prompt": "a"},
        {"id": "x", "messages": DIALOG, "max_gen_len": 3},
        {"prompt": "b", "choices": ["c", "d"], "answer": 1, "target": "t", "source": "exam"},
    ]
    path = write(tmp_path / "p.jsonl", "\n\n".join(map(json.dumps, lines)))
    assert read_prompts(path) == [
        PromptRecord(0, "a"),
        PromptRecord("x", DIALOG, 3),
        PromptRecord(2, "b", choices=["c", "d"], answer=1, target="t", more={"source": "exam"}),
    ]


def test_a_text_without_a_prompt_is_to_be_scored(tmp_path):
    lines = [{"text": "a", "domain": "man"}, {"prompt": "b", "text": "kept"}]
    path = write(tmp_path / "p.jsonl", "\n\n".join(map(json.dumps, lines)))
    found = read_prompts(path)
    assert found == [
        PromptRecord(0, "a", is_text=True, more={"domain": "man"}),
        PromptRecord(1, "b", more={"text": "kept"}),
    ]
    assert [record.line for record in found] == [1, 3]
    assert [record.prompt_key for record in found] == ["text", "prompt"]


def test_reads_a_text_file_line_by_line(tmp_path):
    path = write(tmp_path / "p.txt", "\ufefffirst line\r\n  second \n日本")
    assert read_prompts(path) == [PromptRecord(0, "first line"), PromptRecord(1, "  second "), PromptRecord(2, "日本")]


def test_the_examples_are_three_prompts():
    assert len(read_prompts(EXAMPLES)) == 3


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": }\n', "line 2: not JSON \\(Expecting value at character 12\\)"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8 \\(byte 13 of the line is 0xff\\)"),
        ("p.txt", b"a\nb\n\xc3(\n", "line 3: not UTF-8 \\(byte 1 of the line is 0xc3\\)"),
        ("p.txt", "a\n\nb", "line 2: the prompt is empty"),
        ("p.jsonl", '{"prompt": ""}', "line 1: the prompt is empty"),
        ("p.jsonl", '{"text": ""}', "line 1: the text is empty"),
        ("p.jsonl", '{"text": 3}', "line 1: text must be a text, not int"),
        ("p.jsonl", '{"prompt": "a", "messages": []}', "line 1: must have either prompt or messages"),
        ("p.jsonl", '{"prompt": 3}', "line 1: prompt must be a text, not int"),
        ("p.jsonl", '["a"]', "line 1: must be a JSON object, not list"),
        ("p.jsonl", '{"id": 1}', "line 1: must have either prompt or messages"),
        ("p.jsonl", '{"messages": []}', "line 1: a dialog must"),
        ("p.jsonl", '{"messages": [{"role": "assistant"}]}', "line 1: message 0 must have a role and a text"),
        ("p.jsonl", '{"prompt": "a", "max_gen_len": -1}', "line 1: max_gen_len \\(-1\\)"),
        ("p.jsonl", '{"prompt": "a", "id": 1.5}', "line 1: id \\(1.5\\)"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b"}', "line 2: id 1 is already that of line 1"),
        ("p.jsonl", "\n", "has no prompts"),
        ("p.csv", "a", "ends in .jsonl or .txt"),
    ],
)
def test_wrong_files_are_named_with_the_line(tmp_path, name, content, says):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name}.*{says}"):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.txt: cannot be read"):
        read_prompts(tmp_path / "missing.txt")


RECORDS = [PromptRecord(0, "a"), PromptRecord("x", DIALOG, more={"source": "exam"}), PromptRecord(2, "ü", target="t")]


def result(text: str) -> dict:
    return {"generation": text, "tokens": [5], "logprobs": [-0.5], "finish_reason": "stop"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_in_prompt_order_whatever_ends_first(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultsWriter(path, RECORDS) as writer:
        writer.add(1, result("B"))
        assert (writer.done, path.read_bytes()) == (0, b"")
        writer.add(0, result("A"))
        assert (writer.done, len(lines(path))) == (2, 2)
        writer.add(2, result("C"))
    assert lines(path) == [
        {"id": 0, "prompt": "a", **result("A")},
        {"id": "x", "messages": DIALOG, **result("B"), "source": "exam"},
        {"id": 2, "prompt": "ü", **result("C"), "target": "t"},
    ]


def test_a_results_keys_win_over_the_records_own(tmp_path):
    record = PromptRecord(0, "a", is_text=True, more={"generation": "mine", "source": "exam"})
    with ResultsWriter(tmp_path / "out.jsonl", [record]) as writer:
        writer.add(0, {"generation": "A"})
    assert lines(tmp_path / "out.jsonl") == [{"id": 0, "text": "a", "generation": "A", "source": "exam"}]


def test_a_file_that_another_run_writes_is_refused(tmp_path):
    """Ranks may live on for seconds when their launcher is killed, and then two runs wrote into one file."""
    path = tmp_path / "out.jsonl"
    with ResultsWriter(path, RECORDS) as writer:
        writer.add(0, result("A"))
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"out.jsonl: another process is writing it"):
            ResultsWriter(path, RECORDS)
        assert path.read_bytes() == before
    with ResultsWriter(path, RECORDS) as writer:
        assert writer.done == 1


def test_every_cut_of_a_results_file_is_continued(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultsWriter(path, RECORDS) as writer:
        for i in range(3):
            writer.add(i, result(f"é{i}"))
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 7), *(i for i, byte in enumerate(whole, 1) if byte == 10)]:
        path.write_bytes(whole[:cut])
        with ResultsWriter(path, RECORDS) as writer:
            assert writer.done == whole[:cut].count(b"\n")
            for i in range(writer.done, 3):
                writer.add(i, result(f"é{i}"))
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"id": 7}\n', "line 1: is not a result of these prompts \\(the result of prompt 0 belongs there\\)"),
        ('{"id": 0}\nnot json\n', "line 2: is not a result"),
        ('{"id": 0}\n{"id": "x"}\n{"id": 2}\n{"id": 3}\n', "line 4: .*no prompt is left"),
    ],
)
def test_a_file_of_other_results_is_left_alone(tmp_path, content, says):
    path = write(tmp_path / "out.jsonl", content)
    with pytest.raises(ValueError, match=says):
        ResultsWriter(path, RECORDS)
    assert path.read_text() == content


def test_an_output_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be written \\(No such file or directory\\)"):
        ResultsWriter(tmp_path / "missing" / "out.jsonl", RECORDS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_one_sentence():
    with (
        ResultsWriter("/dev/full", RECORDS) as writer,
        pytest.raises(
            OSError, match=r"/dev/full: result 0 could not be written \(No space left on device\); 0 results"
        ),
    ):
        writer.add(0, result("A"))


def test_a_disk_that_fills_up_keeps_the_lines_before(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    real_write = os.write

    def write_until_full(file: int, data: memoryview) -> int:
        room = 150 - os.fstat(file).st_size
        if room <= 0:
            raise OSError(28, "No space left on device")
        return real_write(file, data[:room])

    with ResultsWriter(path, RECORDS) as writer:
        writer.add(0, result("A"))
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", write_until_full)
        with pytest.raises(OSError, match=r"result 1 could not be written .*; 1 results are kept"):
            writer.add(1, result("B" * 300))
    assert path.read_bytes() == before
