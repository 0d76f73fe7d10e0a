"""tools/evaluate.py as typed: runs on one rank and under torchrun, comparison, routing report, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtralkit.cli.evaluate import evaluate
from mixtralkit.planning.trace import RoutingTrace
from tests.engine.parts import engine_config, make_checkpoint
from tests.ranks import run_command

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "evaluate.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), engine_config(max_seq_len=128))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    records = []
    for i in range(5):
        domain = "ab"[i % 2]
        records += [
            {"id": f"c{i}", "prompt": f"{i} + {i} ->", "choices": [" 1", f" {2 * i}"], "answer": 1, "domain": domain},
            {"id": f"g{i}", "prompt": f"Who is {i}?", "target": "I", "metric": "contains", "domain": domain},
            {"id": f"t{i}", "text": "In the beginning God created the heaven. " * (1 + i), "domain": domain},
        ]
    path = tmp_path_factory.mktemp("set") / "set.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder, prompts) -> Path:
    output = tmp_path_factory.mktemp("run") / "whole"
    evaluate(prompts, model=folder, output=output, max_gen_len=4)
    return output


def start(ranks: int, *arguments: object) -> subprocess.Popen:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, str(TOOL), *map(str, arguments)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=250)
    return process.returncode, out, err


def scores(output: Path) -> list[dict]:
    return [json.loads(line)["scores"] for line in (output / "results.jsonl").read_text().splitlines()]


def test_two_ranks_score_as_one_and_write_a_report(folder, prompts, whole, tmp_path):
    code, out, err = finished(
        start(2, "-m", folder, "-t", folder / "tokenizer.model", "--prompts", prompts, "--output", tmp_path / "run",
              "--attention", "dp", "--max_gen_len", 4, "--max_batch_size", 3, "--routing_report", tmp_path / "report")
    )  # fmt: skip
    assert code == 0, err
    for found, expected in zip(scores(tmp_path / "run"), scores(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert out.count("group") == 1, "rank 0 prints the table"
    assert "domain=b" in out
    assert "15/15" in err
    assert "record/s" in err
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"trace.npz", "report.json", "load.png", "ranks.png", "tokens.html"} <= written
    assert json.loads((tmp_path / "report" / "report.json").read_text())["load"]["domains"].keys() == {"a", "b"}


def test_a_killed_run_goes_on_to_the_same_files(folder, prompts, whole, tmp_path):
    """Killed as soon as lines are there; whatever the moment, the files end as those of the unbroken run."""
    output = tmp_path / "run"
    arguments = ("-m", folder, "--prompts", prompts, "--output", output, "--max_gen_len", 4)
    process = start(1, *arguments)
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if (output / "results.jsonl").exists() and (output / "results.jsonl").stat().st_size:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    assert not (output / "summary.json").exists() or process.returncode == 0
    evaluate(prompts, model=folder, output=output, max_gen_len=4)
    for name in ("run.json", "results.jsonl", "summary.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_the_table_is_that_of_the_summary_and_needs_no_output(folder, prompts, whole, capsys):
    evaluate(prompts, model=folder, max_gen_len=4)
    first = capsys.readouterr().out
    evaluate(prompts, model=folder, output=whole, max_gen_len=4)
    captured = capsys.readouterr()
    assert captured.out == first
    assert "already has 15 of 15 results" in captured.err
    measures = json.loads((whole / "summary.json").read_text())["measures"]
    assert len(first.splitlines()) == 1 + len(measures) + 1
    assert first.splitlines()[-1] == "texts in windows of 128 tokens, at least 64 of them context"


def test_the_routing_of_the_whole_set_is_recorded_where_results_are_there(folder, prompts, whole, tmp_path, capsys):
    """``--record_routing`` and ``--moe_report`` are those of every command that runs a model."""
    evaluate(prompts, model=folder, output=whole, max_gen_len=4, record_routing=tmp_path / "t.npz", moe_report=True)
    trace = RoutingTrace.load(tmp_path / "t.npz")
    assert len(set(trace.sequence.tolist())) > 15, "choices are sequences of their own"
    header, *layers = capsys.readouterr().err.splitlines()[-4:]
    assert header.split()[0] == "layer"
    assert {int(line.split()[1].replace(",", "")) for line in layers} == {trace.experts.shape[0] * trace.top_k}


def test_compare_prints_and_writes_the_differences(folder, prompts, whole, tmp_path, capsys):
    evaluate(prompts, model=folder, output=tmp_path / "shorter", max_gen_len=1)
    capsys.readouterr()
    evaluate(compare=(whole, tmp_path / "shorter"), output=tmp_path / "difference.json")
    out = capsys.readouterr().out
    assert "mcnemar" in out
    assert "permutation" in out
    differences = json.loads((tmp_path / "difference.json").read_text())["differences"]
    assert {d["difference"] for d in differences if d["metric"] != "contains"} == {0.0}


def test_a_capacity_drops_rows_and_makes_another_run(folder, prompts, tmp_path, command_line):
    """Under dp and ep a cold expert's rows over its capacity are dropped, which the layers report and scores show."""
    arguments = ("evaluate", "-m", folder, "--prompts", prompts, "--output", tmp_path / "run", "--max_gen_len", 4)
    arguments += ("--attention", "dp", "--device", "cpu")
    cut, other = run_command(2, *arguments, "--cold_capacity_factor", 0.25)
    assert (cut.returncode, other.returncode) == (0, 0), cut.stderr
    header, *rows = [
        line.split() for line in cut.stderr.splitlines() if line.startswith("layer") or line[:5].strip().isdigit()
    ]
    dropped = header.index("dropped")
    assert sum(int(row[dropped].replace(",", "")) for row in rows) > 0
    again = command_line(*arguments)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "holds a run of another setting: " in again.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": None}, "prompts is missing"),
        ({"prompts": Path("nowhere.jsonl")}, "nowhere.jsonl: cannot be read"),
        ({"model": Path("nowhere")}, "nowhere: no such folder"),
        ({"max_batch_size": 0}, r"max_batch_size \(0\)"),
        ({"max_gen_len": 0}, r"max_gen_len \(0\)"),
        ({"max_seq_len": 129}, r"max_seq_len \(129\) must lie in 1 … 128"),
        ({"max_seq_len": 8}, r"set.jsonl, line \d+: .* max_seq_len \(8\)"),
        ({"window": 200}, r"window \(200\) must be at most max_seq_len \(128\)"),
        ({"window": 8, "text_context": 8}, r"context \(8\) must lie in 1 … 7"),
        ({"dtype": "int4"}, r"dtype \('int4'\)"),
        ({"cold_capacity_factor": -1.0}, r"cold_capacity_factor \(-1.0\)"),
        ({"overflow": "keep"}, r"overflow \('keep'\)"),
        ({"num_gpus": 4}, r"num_gpus \(4\) must equal"),
        ({"compare": (Path("a"),)}, "compare needs two folders of finished runs, not 1"),
        ({"compare": (Path("a"), Path("b"))}, "a: no such folder"),
        ({"compare": (Path("a"), Path("b")), "output": Path("c")}, r"output \(c\) must be a .json file"),
    ],
)
def test_bad_input_is_one_sentence(folder, prompts, options, says):
    with pytest.raises(ValueError, match=says) as caught:
        evaluate(**{"prompts": prompts, "model": folder, **options})
    assert "\n" not in str(caught.value)
