"""The layer's benchmark over the GPUs of a host: what it captures in graphs. Run with ``pytest -m gpu``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixtralkit.distributed import RankContext
from tests.gpu.ranks import run_on_gpus
from tests.test_bench_moe_layer import run_bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
GRAPHS = (
    "contiguous", "contiguous+static", "hot_cold", "hot_cold+capacity0.5", "hot_cold+capacity0.5+reroute", "everywhere",
    "shadow", "tensor_parallel",
)  # fmt: skip
EAGER = ("contiguous+exact", "hot_cold+schedule", "two_phase", "loop_over_experts")


def _run(context: RankContext, output: Path, graphs: bool) -> None:
    options = {"tokens": "1,40", "routing": "skew:0.5", "variants": ",".join([*GRAPHS, *EAGER]), "graphs": graphs}
    run_bench(context, {**options, "dim": 256, "hidden": 512, "device": "cuda", "repeats": 2, "output": output})


@pytest.mark.parametrize("graphs", [True, False])
def test_every_kind_of_exchange(tmp_path, graphs):
    output = tmp_path / "lines.json"
    run_on_gpus(_run, output, graphs)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 4 * len(GRAPHS + EAGER)
    for line in lines:
        assert line["error"] < 2e-2
        assert line["graph"] == (graphs and line["variant"] in GRAPHS)
        assert all(ms > 0 for ms in line["phases_ms"].values())
