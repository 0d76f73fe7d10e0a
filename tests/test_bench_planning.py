"""benchmarks/plans/bench_planning.py: what it prints, and files that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plans.bench_planning import bench_planning


def pair_weights(path: Path, **changes: object) -> Path:
    """Four experts on two ranks in three layers; tokens go from an expert to the one with its number."""
    arrays = {"W": np.tile(np.eye(4), (2, 1, 1)), "better": np.tile([0, 0, 1, 1], (3, 1)), "world": np.array(2)}
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


def printed(capsys, *arguments: object, **options: object) -> dict:
    bench_planning(*arguments, **options)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_poured_counts_its_cases_and_says_on_which_machine(capsys):
    found = printed(capsys, "poured", matrices=2, first=1)
    assert found["results"]["matrices"] == 2
    assert found["results"]["heavier"] == 0
    assert {"cores", "python", "date"} <= found.keys()


def test_placements_of_pair_weights(tmp_path, capsys):
    path = pair_weights(tmp_path / "pairs.npz")
    (found,) = printed(capsys, "affinity", (path,))["results"]
    assert (found["file"], found["crossings"], found["given"]) == ("pairs.npz", 0, 0)
    quarter, half = printed(capsys, "replicas", (path,))["results"]
    assert (quarter["slots"], half["slots"], half["together"]) == (3, 3, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"better": None}, r"pairs\.npz: lacks better"),
        ({"W": np.eye(4)}, r"pairs\.npz: W \(4, 4\) and better \(3, 4\) must be"),
        ({"world": np.array(3)}, r"pairs\.npz: world \(3\) must be a number of ranks that divides the 4 experts"),
        ({"W": np.zeros((2, 4, 4))}, r"pairs\.npz: W must be numbers of at least 0"),
    ],
)
def test_files_that_are_not_pair_weights(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        bench_planning("affinity", (pair_weights(tmp_path / "pairs.npz", **changes),))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("affinity",), r"files \(none\) must name pair weights for affinity"),
        (("replicas", (Path("nowhere.npz"),)), r"^nowhere\.npz: cannot be read \(No such file or directory\)$"),
        (("sizes",), r"what \('sizes'\) must be one of poured, size, affinity, replicas"),
        (("poured", (), 0), r"matrices \(0\) must be at least 1"),
        (("poured", (), 1, -1), r"first \(-1\) must be at least 0"),
    ],
)
def test_what_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        bench_planning(*arguments)
