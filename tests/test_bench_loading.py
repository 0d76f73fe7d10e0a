"""benchmarks/model/bench_loading.py: its cases on a small checkpoint, and what it refuses before it writes one."""

from __future__ import annotations

import json

import pytest

from benchmarks.model import bench_loading
from benchmarks.model.bench_loading import bench
from tests.configs import small_config


def test_cases_of_one_rank(tmp_path, capsys, monkeypatch):
    config = small_config(dim=512, head_dim=128, hidden_dim=1024, vocab_size=500)
    monkeypatch.setattr(bench_loading, "_model", lambda _: config)
    monkeypatch.setattr(bench_loading, "POOL_NUMEL", 1 << 27)
    bench(0.1, ranks=1, repeats=1, layouts="tp/ep", folder=tmp_path, output=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert [case["case"] for case in found["cases"]] == [
        f"{what}, {state}"
        for state in ("cold", "warm")
        for what in ("plain read, kept", "plain read, dropped", "load, attention tp, experts ep")
    ]
    for case in found["cases"]:
        assert case["seconds"] > 0
        assert case["asked_of_file"] == pytest.approx(1, abs=0.05), "every byte once"
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"], "the checkpoint is gone"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 0}, r"^ranks \(0\) must be at least 1$"),
        ({"repeats": 0}, r"^repeats \(0\) must be at least 1$"),
        ({"threads": 0}, r"^threads \(0\) must be at least 1$"),
        ({"size_gb": 0.0}, r"^size_gb \(0\.0\) must be a number above 0$"),
        ({"device": "gpu"}, r"^device \('gpu'\) must be cpu or cuda$"),
        ({"device": "cuda", "ranks": 10**6}, r"^ranks \(1000000\) must be at most the \d+ GPUs with device cuda$"),
        ({"layouts": "tp"}, r"^layouts \('tp'\) must be like 'tp/ep'$"),
        ({"layouts": "pp/ep"}, r"'pp'"),
        ({"layouts": "tp/ep", "ranks": 3}, r"^world size \(3\) must divide n_heads \(16\)"),
        ({"format": "mixtralkit"}, r"^layouts \('tp/tp,tp/ep,dp/ep'\) must be one for format 'mixtralkit'"),
    ],
)
def test_what_is_refused_before_anything_is_written(tmp_path, monkeypatch, options, words):
    """Ranks found out, and their traceback was printed."""
    monkeypatch.setattr(bench_loading, "_write", lambda *_: pytest.fail("a checkpoint was written"))
    with pytest.raises(ValueError, match=words):
        bench(**{"folder": tmp_path, **options})


def test_what_a_rank_says_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loading, "_write", lambda folder, *_: None)
    with pytest.raises(RuntimeError, match=r"^\S*ValueError: [^\n]*$"):
        bench(0.01, ranks=1, repeats=1, layouts="tp/ep", folder=tmp_path)
