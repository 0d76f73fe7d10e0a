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
        architecture, ("int8", "none"), (24.0,), trace, 12, 6, ("2x9",), 80, "cpu", places=12, device="cpu",
        profile=True, output=output, seconds=60.0,
    )  # fmt: skip
    machine, *both = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = ["rates", "decode", "decode", "decode", "prompt"]
    assert machine["measured"] == "machine"
    assert [(line["quantize"], line["measured"]) for line in both] == [(f, k) for f in ("int8", "none") for k in kinds]
    lines = [machine, *both[:5]]
    rates, decode = lines[1], lines[3]
    assert rates["bus_gb_s"] > 0
    assert rates["expert_mb"] > 0
    assert (decode["routing"], decode["batch"], decode["places"], decode["steps"]) == ("trace", 1, 12, 6)
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


def test_what_has_no_time_and_no_room_is_said(architecture: Path, tmp_path: Path) -> None:
    """No measurement begins too late; a budget that is too small for a format ends nothing else."""
    output = tmp_path / "lines.json"
    bench.bench_host_memory(
        architecture, ("int8",), (24.0, 8.0), None, 12, 6, (), 80, within=-1.0, device="cpu", output=output
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert [line["measured"] for line in lines] == ["left out"] * 4
    bench.bench_host_memory(architecture, ("int8", "none"), places=3, device="cpu", output=output)
    lines = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert [(line["quantize"], line["measured"]) for line in lines] == [("int8", "refused"), ("none", "refused")]
    assert "there must be room for 8" in lines[0]["why"]


def test_a_trace_must_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((5, 2, 2), np.int8))
    with pytest.raises(ValueError, match=r"trace .*: shape \(5, 2, 2\) must be \[tokens, 3, 2\]"):
        bench.read_routing(tmp_path / "wrong.npy", small_config())


def test_picture_and_page_of_written_and_of_kept_lines(tmp_path: Path, capsys) -> None:
    """The lines of the benchmark, and the JSON that is kept of them, give the same tables."""
    machine = {"measured": "machine", "date": "2026-12-01", "commit": None, "cores": 16, "gpu": "a GPU"}
    lines = []
    steps = {"budget_gb": 24.0, "places": 215, "step_ms": 20.0, "bound_ms": 10.0, "of_bound": 2.0, "hit_rate": 0.75}
    steps |= {"context": 2048, "misses": 10.25, "fetches": 0.5}
    for kind in ("int4:128", "none"):
        lines.append({**machine, "quantize": [kind]})
        lines.append({"measured": "rates", "bus_gb_s": 50.0, "cpu_gb_s": {"1": 60.0}, "expert_mb": 90.8})
        lines += [{"measured": "decode", "routing": r, "batch": 1, **steps} for r in ("even", "trace")]
        lines.append({"measured": "decode", "routing": "trace", "batch": 8, **steps})
        lines.append(
            {"measured": "prompt", "budget_gb": 24.0, "tokens": 2048, "places": 9, "ms": 244.0, "bus_ms": 80.1}
        )
        lines[-5:] = [{**line, "quantize": kind} for line in lines[-5:]]
    written, kept, page = tmp_path / "lines.json", tmp_path / "kept.json", tmp_path / "page.md"
    written.write_text("\n".join(map(json.dumps, lines)))
    page.write_text(f"before {plot.BEGIN}old{plot.END} after")
    plot.plot_host_memory(written, tmp_path / "a" / "picture.png", page, kept, ("abc123", "def456"))
    assert (tmp_path / "a" / "picture.png").read_bytes()[1:4] == b"PNG"
    tables = plot.render(plot.read_lines(kept))
    assert page.read_text() == f"before {plot.BEGIN}{tables}{plot.END} after"
    assert capsys.readouterr().out.strip() == tables.strip()
    for row in (
        "Experts in int4:128: a GPU, 16 cores, 2026-12-01, commit abc123; "
        "experts in bf16: a GPU, 16 cores, 2026-12-01, commit def456.", "| int4:128 | 90.8 | 50.0 | 60.0 |  | abc123 |",
        "| 24, bf16, trace | 215 | 50.0 | 20.0 | 10.0 | 2.00 | 75.0% | 10.2 | def456 |",
        "| 24, bf16, 8 behind 2,048 tokens | 215 | 400.0 | 20.0 | 10.0 | 2.00 | 75.0% | 10.2 | 0.5 | def456 |",
        "| 24, int4:128, 2,048 | 9 | 244 |  | 80 |  | abc123 |",
    ):  # fmt: skip
        assert row in tables.splitlines()
