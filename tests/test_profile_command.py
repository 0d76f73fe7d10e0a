"""tools/profile_experts.py: a prompt set to a trace, its table and its picture, and the popularity of a trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixtralkit.cli import profile as tool
from mixtralkit.planning.popularity import PathPopularity
from mixtralkit.planning.synthetic import RoutingProcess
from mixtralkit.planning.trace import RoutingTrace
from tests.engine.parts import engine_config, make_checkpoint
from tests.ranks import run_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), engine_config(max_seq_len=128))
    prompts = ["In the beginning", "def add(first, second):", "Who are you?"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return folder


def test_on_two_ranks_as_on_one(folder, tmp_path, capsys):
    one, two, plot = tmp_path / "one.npz", tmp_path / "two.npz", tmp_path / "loads.png"
    tool.profile(folder / "prompts.jsonl", one, model=folder, plot=plot, max_gen_len=5)
    lines = capsys.readouterr().out.splitlines()
    words = ("-m", folder, "--prompts", folder / "prompts.jsonl", "--output", two, "--max_gen_len", 5)
    done, other = run_command(2, "profile", *words, "--attention", "dp", "--device", "cpu")
    assert done.returncode == other.returncode == 0, done.stderr
    assert other.stdout == ""
    a, b = RoutingTrace.load(one), RoutingTrace.load(two)
    for name in ("experts", "sequence", "position"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert done.stdout.splitlines()[1:] == lines[1:]
    assert len(lines) == 2 + a.num_layers
    assert set(a.sequence) == {0, 1, 2}
    assert (a.meta["model"], a.meta["prompts"]) == (folder.name, "prompts.jsonl")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_table_has_the_loads():
    ids = np.array([[0, 1], [0, 2], [0, 1], [0, 3]])[:, None]
    line = tool.table(RoutingTrace(ids, 4)).splitlines()[1]
    assert line.split() == ["0", "50.0", "25.0", "12.5", "12.5", "2.00", "0.50", "1.75", "100.0%"]


def test_popularity_of_a_trace(tmp_path, capsys):
    process = RoutingProcess.random(4, 4, affinity=1.0, memory=2)
    process.trace(4000, top_k=1, sequence_length=100).save(tmp_path / "t.npz")
    tool.popularity(tmp_path / "t.npz", path_length=2, batch=50, output=tmp_path / "profile.npz")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    tokens = [float(row[2].rstrip("%")) for row in rows]
    assert tokens[0] < tokens[1] < tokens[2]
    assert PathPopularity.load(tmp_path / "profile.npz").path_length == 2


def test_a_trace_of_one_layer_has_no_paths(tmp_path):
    RoutingProcess.random(1, 4).trace(100).save(tmp_path / "t.npz")
    with pytest.raises(ValueError, match="a trace of 1 layer has no paths to learn from"):
        tool.popularity(tmp_path / "t.npz")
