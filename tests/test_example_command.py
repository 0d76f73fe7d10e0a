"""tools/example.py as typed: prompts to blocks or files, chat, bad input, on one rank and under torchrun."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mixtralkit import Mixtral
from mixtralkit.cli.generate import generate
from tests.engine.parts import engine_config, make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "example.py"
RULE = "=" * 30


def environ(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def command(ranks: int, *arguments: object) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*start, str(TOOL), *map(str, arguments)]


def run(ranks: int, *arguments: object, text: str = "", **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(ranks, *arguments), env=environ(**more), input=text, capture_output=True, text=True, timeout=250
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), engine_config(max_seq_len=256))


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Prompt {i}:"}) + "\n" for i in range(count)))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prints_mixtralkits_blocks(folder, capsys):
    generate(model=folder, tokenizer=folder / "tokenizer.model", max_gen_len=6, temperature=0)
    blocks = capsys.readouterr().out.split(f"{RULE}Example START{RULE}\n\n[Prompt]:\n")[1:]
    assert len(blocks) == 3
    dialog = [{"role": "user", "content": "Who are you?"}]
    answer = Mixtral.build(folder).chat_completion([dialog], temperature=0, max_gen_len=6)[0]
    expected = answer["generation"]["content"]
    assert blocks[0] == f"Who are you?\n\n[Response]:\n{expected}\n\n{RULE}Example END{RULE}\n\n"


def test_more_prompts_than_a_batch_are_written_in_order_and_continued(folder, tmp_path, capsys):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 11), tmp_path / "out.jsonl"
    settings = {"model": folder, "prompts": prompts, "output": output, "max_gen_len": 5, "max_batch_size": 2}
    generate(**settings)
    assert "11/11" in capsys.readouterr().err, "a bar shows when there is more than one batch"
    whole = output.read_bytes()
    results = read_lines(output)
    assert [r["id"] for r in results] == [f"p{i}" for i in range(11)]
    assert set(results[0]) == {"id", "prompt", "generation", "tokens", "logprobs", "finish_reason"}
    output.write_bytes(whole[: len(whole) // 2])
    generate(**settings)
    again = read_lines(output)
    for result, expected in zip(again, results, strict=True):
        assert result.pop("logprobs") == pytest.approx(expected.pop("logprobs"), abs=1e-4)
    assert again == results
    whole = output.read_bytes()
    assert "already has" in capsys.readouterr().err
    generate(**settings)
    assert output.read_bytes() == whole


def test_a_text_file_and_dialogs_are_prompts_too(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    generate(model=folder, prompts=tmp_path / "p.txt", max_gen_len=3)
    assert "[Prompt]:\ntwo\n" in capsys.readouterr().out
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_gen_len": 2}))
    generate(model=folder, prompts=tmp_path / "p.jsonl", output=tmp_path / "out.jsonl")
    assert len(read_lines(tmp_path / "out.jsonl")[0]["tokens"]) <= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature \\(-1.0\\)"),
        ({"top_p": 2.0}, "top_p \\(2.0\\)"),
        ({"top_k": -2}, "top_k \\(-2\\)"),
        ({"max_gen_len": 0}, "max_gen_len \\(0\\)"),
        ({"max_batch_size": 0}, "max_batch_size \\(0\\)"),
        ({"max_seq_len": 4}, "prompt 0 has \\d+ tokens, more than max_seq_len \\(4\\)"),
        ({"dtype": "int4"}, "dtype \\('int4'\\)"),
        ({"device": "tpu"}, "device \\('tpu'\\)"),
        ({"num_gpus": 4}, "num_gpus \\(4\\) must equal the number of ranks \\(1\\)"),
        ({"prompts": Path("nowhere.jsonl")}, "nowhere.jsonl: cannot be read"),
        ({"tokenizer": Path("nowhere.model")}, "tokenizer \\(nowhere.model\\): no such file"),
        ({"model": Path("nowhere")}, "nowhere"),
        ({"plan": Path("nowhere.json")}, "nowhere.json: cannot be read"),
    ],
)
def test_bad_input_is_named(folder, options, says):
    with pytest.raises(ValueError, match=says):
        generate(**{"model": folder, "max_gen_len": 3, **options})


def test_a_vocabulary_that_does_not_fit_is_named(folder, tmp_path):
    other = make_checkpoint(tmp_path, engine_config(vocab_size=300))
    with pytest.raises(ValueError, match="has 384 tokens, but the model's vocab_size is 300"):
        generate(model=other, max_gen_len=3)


def test_two_ranks_print_what_one_prints_and_flags_are_accepted(folder):
    alone = run(1, "-m", folder, "-t", folder / "tokenizer.model", "--max_gen_len", 8)
    assert (alone.returncode, alone.stderr) == (0, "")
    both = run(
        2, "-m", folder, "-t", folder / "tokenizer.model", "--max_gen_len", 8,
        FMOE_FASTER_SCHEDULE_ENABLE="1", FMOE_FASTER_SHADOW_ENABLE="ON", FMOE_FASTER_GROUP_SIZE="4",
    )  # fmt: skip
    assert (both.returncode, both.stdout) == (0, alone.stdout), both.stderr


def test_errors_are_one_sentence_on_any_ranks(folder, tmp_path, command_line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{broken\n')
    alone = command_line("generate", "-m", folder, "--prompts", tmp_path / "p.jsonl")
    sentence = f"error: {tmp_path}/p.jsonl, line 2: not JSON"
    assert alone.returncode == 1
    assert alone.stderr.startswith(sentence)
    assert alone.stderr.count("\n") == 1
    both = run(2, "-m", folder, "--prompts", tmp_path / "p.jsonl")
    assert both.returncode != 0
    assert both.stderr.count(sentence[7:]) == 1
    assert "Traceback" not in both.stderr.split("torch/distributed/elastic")[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(folder, command_line):
    done = command_line("generate", "-m", folder, "--max_gen_len", 3, "--output", "/dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        "error: /dev/full: result 0 could not be written (No space left on device); 0 results are kept\n"
    )


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_leaves_whole_lines(folder, tmp_path):
    prompts, output = write_prompts(tmp_path / "p.jsonl", 3000), tmp_path / "out.jsonl"
    arguments = ("-m", folder, "--prompts", prompts, "--output", output, "--max_gen_len", 60)
    process = subprocess.Popen(
        command(2, *arguments), env=environ(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") > 3)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if str(TOOL) in p.cmdline()]
        start = time.monotonic()
        max(ranks, key=lambda p: int(p.environ()["RANK"])).send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - start < 30
    assert process.returncode != 0
    written = output.read_text().split("\n")
    for line in written[:-1]:
        json.loads(line)
    assert 3 < len(written) < 3000


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lines", [None, 0, 3])
def test_ctrl_c_at_any_moment_is_one_sentence_and_loses_nothing(folder, tmp_path, ranks, lines):
    """Typed while modules are loaded, once the run is known, and after some answers; then the run goes on."""
    prompts, output, trace = write_prompts(tmp_path / "p.jsonl", 60), tmp_path / "out.jsonl", tmp_path / "t.npz"
    arguments = ("-m", folder, "--prompts", prompts, "--output", output, "--max_gen_len", 40)
    process = subprocess.Popen(
        command(ranks, *arguments, "--record_routing", trace), env=environ(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        if lines is None:
            wait_until(lambda: any("torch/lib" in part.path for part in psutil.Process(process.pid).memory_maps()))
        else:
            wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") >= lines)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    if ranks == 1:  # torchrun ends with a traceback of its own
        assert process.returncode == 130
        assert said.endswith("error: interrupted\n")
        assert "Traceback" not in said
    assert not list(tmp_path.glob("*.unfinished"))
    kept = output.read_text().split("\n")[:-1] if output.exists() else []
    assert all(map(json.loads, kept))
    generate(model=folder, prompts=prompts, output=output, max_gen_len=40)
    assert output.read_text().split("\n")[: len(kept)] == kept
    assert [line["id"] for line in read_lines(output)] == [f"p{i}" for i in range(60)]


def test_chat_reads_piped_turns_alike_on_one_rank_and_two(folder):
    turns = "Who are you?\n\nAnd then?\n/reset\nWho are you?\n/quit\nnever read\n"
    alone = run(1, "chat", "-m", folder, "--max_gen_len", 8, text=turns)
    assert alone.returncode == 0, alone.stderr
    model = Mixtral.build(folder)
    dialog = [{"role": "user", "content": "Who are you?"}]
    first = model.chat_completion([dialog], max_gen_len=8)[0]["generation"]
    second = model.chat_completion([[*dialog, first, {"role": "user", "content": "And then?"}]], max_gen_len=8)[0]
    answers = [first["content"], second["generation"]["content"], first["content"]]
    assert alone.stdout == "".join(answer + "\n" for answer in answers)
    assert run(2, "chat", "-m", folder, "--max_gen_len", 8, text=turns).stdout == alone.stdout


def test_chat_leaves_old_turns_out_and_refuses_a_question_too_long(folder):
    done = run(1, "chat", "-m", folder, "--max_gen_len", 4, "--max_seq_len", 48, text="x" * 90 + "\n" + "one\n" * 5)
    assert done.returncode == 0
    assert "too many for max_seq_len 48" in done.stderr
    assert "oldest turn is left out" in done.stderr


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_answer_and_not_the_chat(folder, ranks):
    """The child gets a terminal of its own, so that Ctrl-C is typed as a person types it."""
    arguments = command(ranks, "chat", "-m", folder, "--max_gen_len", 250, "--temperature", 2, "--top_p", 1)
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(arguments[0], arguments, environ(TERM="dumb"))
    try:
        talk = Terminal(terminal)
        talk.until("> ")
        talk.type("Who are you?\n")
        talk.until("you?\r\n")
        talk.some()
        talk.type("\x03")
        talk.until("\n> ")
        assert len(talk.seen.split("you?\r\n")[-1]) < 1200
        talk.type("\x03")
        time.sleep(0.3)
        talk.type("/reset\n")
        talk.until("> ", skip=talk.seen.count("> "))
        talk.type("/quit\n")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, talk.seen
    finally:
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGKILL)
        os.close(terminal)


class Terminal:
    """The far end of a terminal."""

    def __init__(self, file: int) -> None:
        self._file, self.seen = file, ""
        os.set_blocking(file, False)

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def read(self) -> str:
        try:
            self.seen += os.read(self._file, 65536).decode(errors="replace")
        except (BlockingIOError, OSError):
            time.sleep(0.02)
        return self.seen

    def until(self, text: str, skip: int = 0) -> None:
        wait_until(lambda: self.read().count(text) > skip)

    def some(self) -> None:
        length = len(self.seen)
        wait_until(lambda: len(self.read()) > length)


def wait_until(condition, limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
