"""benchmarks/host_memory: a tiny model whose places are ordinary memory, replayed choices, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.host_memory import bench_host_memory as bench
from benchmarks.host_memory import plot_host_memory as plot
from tests.configs import small_config


@pytest.fixture
def architecture(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small_config(dim=64, hidden_dim=128, max_seq_len=256).to_mistral()))
    return path


def test_lines_of_a_tiny_model(architecture: Path, tmp_path: Path) -> None:
    """Hits and misses are those of the replayed choices: the popular experts of the first half stay."""
    rng, trace, output = np.random.default_rng(0), tmp_path / "trace.npy", tmp_path / "lines.json"
    choices = np.stack([rng.permutation(8)[:2] for _ in range(60 * 3)]).reshape(60, 3, 2).astype(np.int8)
    choices[:, 0] = [0, 1]  # a layer that always finds its own
    np.save(trace, choices)
    bench.bench_host_memory(
        architecture, "int8", (24.0,), trace, 12, 6, ("2x9",), 80, "cpu", places=12, device="cpu", profile=True,
        output=output,
    )  # fmt: skip
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["measured"] for line in lines] == ["machine", "rates", "decode", "decode", "decode", "prompt"]
    rates, decode = lines[1], lines[3]
    assert rates["bus_gb_s"] > 0
    assert rates["expert_mb"] > 0
    assert (decode["routing"], decode["batch"], decode["places"]) == ("trace", 1, 12)
    held = bench.popular_tiers(choices[:30].astype(np.int64), 8, 12)
    assert held[0][:2] == ("gpu", "gpu")
    assert sum(row.count("gpu") for row in held) == 12
    assert decode["hits"] + decode["misses"] == pytest.approx(6), "two experts in each of three layers"
    wanted = [sum(held[layer][e] == "gpu" for layer in range(3) for e in token[layer]) for token in choices[30:]]
    assert min(wanted) <= decode["hits"] <= max(wanted)
    assert decode["hit_rate"] == pytest.approx(decode["hits"] / 6, abs=1e-3)
    missing_ms = decode["misses"] * rates["expert_mb"] / (rates["bus_gb_s"] + rates["cpu_gb_s"].get("1", 0))
    assert decode["missing_ms"] == pytest.approx(missing_ms, rel=0.05)
    assert decode["bound_ms"] == max(decode["missing_ms"], decode["resident_ms"])
    assert decode["of_bound"] == pytest.approx(decode["step_ms"] / decode["bound_ms"], rel=0.01)
    assert set(decode["host_ms"]) == set(bench.Clock.NAMES)
    assert lines[-1]["hits"] + lines[-1]["misses"] == 18, (
        "all of two layers, and two of the last, which goes on with one row"
    )


def test_a_trace_must_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((5, 2, 2), np.int8))
    with pytest.raises(ValueError, match=r"trace .*: shape \(5, 2, 2\) must be \[tokens, 3, 2\]"):
        bench.read_routing(tmp_path / "wrong.npy", small_config())


def test_the_picture_is_drawn_of_committed_and_of_written_lines(tmp_path: Path, capsys) -> None:
    committed = Path(__file__).parent.parent / "benchmarks/results/host-memory-h200.json"
    written = tmp_path / "lines.json"
    written.write_text("\n".join(json.dumps(line) for line in plot.read_lines(committed)))
    for path in (committed, written):
        plot.plot_host_memory(path, tmp_path / "a" / "picture.png")
        assert (tmp_path / "a" / "picture.png").read_bytes()[1:4] == b"PNG"
    table = capsys.readouterr().out.splitlines()
    assert table[: len(table) // 2] == table[len(table) // 2 :]
    assert "| 53.3 | 18.8 | 8.5 | 2.21 | 84.1% | 10.2 |" in table[2]
