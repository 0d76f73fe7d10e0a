"""Files are written whole or not at all, and no command replaces one that is there unless it is told to."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mixtralkit.cli.evaluate import evaluate
from mixtralkit.cli.generate import generate
from mixtralkit.cli.measure import measure
from mixtralkit.cli.plan import plan
from mixtralkit.cli.profile import popularity, profile, show
from mixtralkit.cli.prompt_sets import prompt_sets
from mixtralkit.cli.simulate import simulate
from mixtralkit.planning.convert import convert_plan
from mixtralkit.planning.plan import contiguous
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.whole_file import writing


@pytest.fixture
def trace(tmp_path) -> Path:
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(4, dtype=np.int16), (40, 3, 1)), axis=2)[:, :, :2]
    RoutingTrace(experts, 4).save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def _stopped(path: Path, error: type) -> None:
    with writing(path) as unfinished:
        unfinished.write_text("half")
        raise error


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            _stopped(path, error)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]
    with writing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "new")]


def test_links_pipes_and_places_that_cannot_be(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "a")
    with writing(tmp_path / "link") as unfinished:
        unfinished.write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "a").read_text() == "x"
    with writing(os.devnull) as device:
        device.write_text("x")
    for path in (tmp_path / "none" / "a", tmp_path):
        with pytest.raises(ValueError, match=rf"{path}: cannot be written"), writing(path) as unfinished:
            unfinished.write_text("x")


COMMANDS = {  # each with the file that it would write
    "plan": lambda trace, file: plan(trace, "contiguous", output=file),
    "plan, picture": lambda trace, file: plan(trace, "contiguous", output=trace.with_name("new"), plot=file),
    "convert-plan": lambda trace, file: convert_plan(trace.with_name("plan.json"), file),
    "simulate": lambda trace, file: simulate(trace, world_size=2, plot=file),
    "profile": lambda trace, file: profile(trace.with_name("prompts.txt"), file),
    "profile, picture": lambda trace, file: profile(trace.with_name("prompts.txt"), trace.with_name("new"), plot=file),
    "show": lambda trace, file: show(trace, plot=file),
    "popularity": lambda trace, file: popularity(trace, output=file),
    "measure": lambda trace, file: measure("name", file),
    "generate, trace": lambda trace, file: generate(record_routing=file),
    "evaluate, trace": lambda trace, file: evaluate(trace.with_name("prompts.txt"), record_routing=file),
    "evaluate, comparison": lambda trace, file: evaluate(compare=(trace, trace), output=file),
    "prompt-sets": lambda trace, file: prompt_sets(trace, output=file.parent),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_there_stays(trace, name):
    """A plan was written over the trace that it was made from, and so on; none asked."""
    contiguous(3, 4, 2).save(trace.with_name("plan.json"))
    trace.with_name("prompts.txt").write_text("a\n")
    file = trace.with_name("heldout.jsonl" if name == "prompt-sets" else "mine.json")
    file.write_text("mine")
    before = {path: path.read_bytes() for path in trace.parent.iterdir()}
    with pytest.raises(
        ValueError, match=rf"{file}: is there already; name another file, or replace it with --overwrite"
    ):
        COMMANDS[name](trace, file)
    assert {path: path.read_bytes() for path in trace.parent.iterdir()} == before


def test_overwrite_replaces(trace):
    for _ in range(2):
        plan(trace, "contiguous", world_size=2, output=trace.with_name("plan.json"), overwrite=True)
        popularity(trace, path_length=1, batch=8, output=trace.with_name("popularity.npz"), overwrite=True)
