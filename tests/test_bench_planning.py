"""benchmarks/plans/bench_planning.py: what it prints, and files that it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plans.annealer import anneal
from benchmarks.plans.bench_planning import bench_planning, least_peak
from mixtralkit.planning.policies.poured import pour


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
    assert found["results"]["heavier_layers"] == 0
    ratios = found["results"]["all"]
    assert 0 < ratios["least_possible"] <= ratios["to_eplb"] <= 1
    assert {"cores", "python", "date", "load"} <= found.keys()


@pytest.mark.parametrize("seed", range(5))
def test_no_plan_is_below_the_least_peak(seed):
    """Against every way to put 6 experts on 3 GPUs, which the bound reaches."""
    loads_E = np.random.default_rng(seed).dirichlet(np.ones(6))
    ways = [p for p in itertools.product(range(3), repeat=6) if all(p.count(gpu) == 2 for gpu in range(3))]
    best = min(np.bincount(way, loads_E, 3).max() for way in ways)
    assert least_peak(loads_E, 6, 1, 1, 3) == pytest.approx(best)


def test_least_peak_of_whole_groups_and_of_an_expert_that_needs_copies():
    assert least_peak(np.array([4.0, 3, 2, 1]), 8, 4, 2, 4) == pytest.approx(0.25)  # 4 + 1 and 3 + 2
    assert least_peak(np.array([4.0, 3, 2, 1]), 8, 2, 2, 4) == pytest.approx(0.35)  # 4 + 3 stay together
    assert least_peak(np.array([9.0, 1]), 3, 1, 1, 3) == pytest.approx(0.45)  # two of three slots for 9


@pytest.mark.parametrize("seed", range(5))
def test_no_plan_with_replicas_is_below_the_least_peak(seed):
    """Every plan of 3 GPUs with 2 of 4 experts each, poured."""
    loads_E = np.random.default_rng(seed).dirichlet(np.full(4, 0.5))
    pairs = list(itertools.combinations(range(4), 2))
    plans = np.array([p for p in itertools.product(pairs, repeat=3) if len({e for pair in p for e in pair}) == 4])
    best = pour(plans, np.tile(loads_E, (len(plans), 1))).sum(2).max(1).min()
    assert best / 1.2 <= least_peak(loads_E, 6, 1, 1, 3) <= best * (1 + 1e-6)


def test_loads_are_not_rounded_where_plans_are_compared(capsys):
    """The 256 loads of this case, in millionths, were rounded to 2 more on the lighter plan's busiest GPU."""
    assert printed(capsys, "poured", matrices=1, first=1361)["results"]["heavier_layers"] == 0


def test_annealing_finds_experts_that_follow_each_other():
    weights_JEE = np.tile(np.eye(8) / 8, (3, 1, 1))
    ranks_LE, proposals = anneal(weights_JEE, 4, 0.3)
    assert (np.sort(ranks_LE, 1) == np.repeat(np.arange(4), 2)).all()
    assert (ranks_LE == ranks_LE[0]).all()
    assert proposals > 0


def test_placements_of_pair_weights(tmp_path, capsys):
    path = pair_weights(tmp_path / "pairs.npz")
    (found,) = printed(capsys, "affinity", (path,), anneal_s=0.1)["results"]
    assert found["annealed"] >= found["crossings"] >= found["bound"]
    assert (found["file"], found["crossings"], found["given"]) == ("pairs.npz", 0, 0)
    quarter, half = printed(capsys, "replicas", (path,))["results"]
    assert (quarter["slots"], half["slots"], half["together"]) == (3, 3, 0)


def test_replicas_of_a_routing_trace(tmp_path, capsys):
    np.save(tmp_path / "trace.npy", np.random.default_rng(0).random((60, 4, 8)).argsort(2)[:, :, :2].astype(np.int16))
    arguments = ("replicas", (tmp_path / "trace.npy",))
    quarter, half = printed(capsys, *arguments, num_experts=8, world_size=2)["results"]
    assert (quarter["slots"], half["slots"]) == (5, 6)
    assert half["together"] < quarter["together"] < quarter["then_replicas"] < quarter["placement"]
    with pytest.raises(ValueError, match=r"world_size \(3\) must divide the 8 experts of trace\.npy"):
        bench_planning(*arguments, num_experts=8, world_size=3)


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
        (("replicas",), r"files \(none\) must name pair weights for replicas"),
        (("replicas", (Path("nowhere.npz"),)), r"^nowhere\.npz: cannot be read \(No such file or directory\)$"),
        (("sizes",), r"what \('sizes'\) must be one of poured, size, affinity, replicas, auto"),
        (("poured", (), 0), r"matrices \(0\) must be at least 1"),
        (("poured", (), 1, -1), r"first \(-1\) must be at least 0"),
        (("affinity", (), 1, 0, 1.0, 0.0), r"bound \(0\.0\) must be above 0"),
    ],
)
def test_what_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        bench_planning(*arguments)
