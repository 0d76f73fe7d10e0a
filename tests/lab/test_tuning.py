"""Settings that were tuned: found for a shape and a number of rows, swept, written beside what is there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import tuning
from lab.timing import times_ms
from lab.tune_kernels import save
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.layout import RankLayout
from mixtralkit.ops import runtime
from mixtralkit.planning.plan import contiguous
from tests.configs import small_config

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def gpu(tmp_path, monkeypatch) -> SimpleNamespace:
    """A device that says it is a GPU, and the folder its settings are in."""
    monkeypatch.setattr(runtime, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for cached in (runtime.tuned, runtime._settings):
        cached.cache_clear()
    yield torch.device("cuda", 0)
    for cached in (runtime.tuned, runtime._settings):
        cached.cache_clear()


def entry(rows: int, number: int, **shape: int) -> dict:
    return {"kernel": "linear", "shape": shape or {"outputs": 8, "inputs": 4}, "rows": rows, "settings": {"a": number}}


def test_the_next_number_of_rows_up_counts(gpu, tmp_path):
    """Settings of 256 rows were once taken for 16,384 and cost prefill a fifth of its speed."""
    entries = [entry(4, 40), entry(1, 10), entry(16, 160), entry(2, 0, outputs=9, inputs=4)]
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"entries": entries}))
    found = [runtime.tuned("linear", gpu, rows, inputs=4, outputs=8)["a"] for rows in (1, 2, 4, 5, 16)]
    assert found == [10, 40, 40, 160, 160]
    assert runtime.tuned("linear", gpu, 17, inputs=4, outputs=8) is None
    assert runtime.tuned("linear", gpu, 1, outputs=8, inputs=5) is None
    assert runtime.tuned("other", gpu, 1, outputs=8, inputs=4) is None


def test_no_file_no_settings(gpu):
    assert runtime.tuned("linear", gpu, 1, outputs=8, inputs=4) is None
    assert runtime.tuned("linear", CPU, 1, outputs=8, inputs=4) is None


def test_files_in_the_tree_are_what_the_kernels_ask_for():
    for path in runtime.TUNED.glob("*.json"):
        for entry in json.loads(path.read_text())["entries"]:
            assert entry["kernel"] in {*tuning.KERNELS, "all_reduce"}, path
            assert entry["rows"] >= 1
            assert all(isinstance(value, int) for value in entry["settings"].values())


def test_the_file_that_is_written_is_the_one_that_is_read(gpu, tmp_path):
    path = runtime.settings_file(gpu)
    save(path, gpu, [entry(4, 1), entry(1, 2)])
    save(path, gpu, [entry(4, 3), entry(4, 4, outputs=9, inputs=4)])
    assert runtime.tuned("linear", gpu, 4, outputs=8, inputs=4) == {"a": 3}
    assert runtime.tuned("linear", gpu, 1, outputs=8, inputs=4) == {"a": 2}
    content = json.loads(path.read_text())
    assert [e["rows"] for e in content["entries"]] == [1, 4, 4]
    assert content["gpu"] == "NVIDIA H200"


# --- what is swept


def layouts(config: ModelConfig, *worlds: int) -> list[RankLayout]:
    plans = [contiguous(config.n_layers, config.num_experts, world) for world in worlds]
    return [RankLayout(config, ParallelConfig("tp", "tp"), plan) for plan in plans]


def test_cases():
    config = ModelConfig.from_file(ROOT / "configs" / "models" / "mixtral-8x7b.json")
    cases = tuning.cases_of(["linear", "experts_grouped"], layouts(config, 1, 4), [1, 64, 256], torch.bfloat16, 256)
    linear = [dict(case.shape) for case in cases if case.kernel == "linear" and case.rows == 1]
    assert [(s["outputs"], s["inputs"]) for s in linear] == [
        (6144, 4096), (4096, 4096), (32000, 4096), (1536, 4096), (4096, 1024), (8000, 4096),
    ]  # fmt: skip
    grouped = {(dict(case.shape)["hidden"], case.rows) for case in cases if case.kernel == "experts_grouped"}
    assert grouped == {(14336, 64), (14336, 256), (3584, 64), (3584, 256)}
    assert len(set(map(str, cases))) == len(cases)


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_candidates_run_and_are_right(kernel):
    """The contract of a kernel's module: candidates for its shapes, and a launcher that takes them."""
    config = small_config(dim=64, hidden_dim=48)
    rows = max(3, tuning.KERNELS[kernel].rows[0])
    case = tuning.cases_of([kernel], layouts(config, 1), [rows], torch.float32, 8)[0]
    candidates = case.candidates()
    assert candidates
    assert all(isinstance(value, int) for settings in candidates for value in settings.values())
    (work,) = case.work(CPU, beyond_caches=False)
    expected = work.reference()
    assert tuning._is_right(work, None, expected, torch.float32)
    assert tuning._is_right(work, candidates[-1], expected, torch.float32)


def test_sweep_leaves_out_what_fails_and_what_is_wrong(monkeypatch):
    """The default's time was once a real one, and beat the only right candidate's on a busy machine."""
    module = importlib.import_module(tuning.KERNELS["linear"].module)

    def launch(x_TI, w_OI, settings=None, **other):
        if settings == {"kind": 0}:
            raise RuntimeError("out of resource: shared memory")
        y_TO = tuning.linear_reference(x_TI, w_OI, **other)
        return y_TO * 1.01 if settings == {"kind": 1} else y_TO

    monkeypatch.setattr(module, "linear_small", launch)
    monkeypatch.setattr(module, "candidates", lambda rows, **shape: [{"kind": kind} for kind in range(3)])
    monkeypatch.setattr(tuning, "_ms", lambda work, settings, device, repeats: 2.0 if settings is None else 1.0)
    case = tuning.Case("linear", (("outputs", 12), ("inputs", 8)), 2, torch.float32)
    best = tuning.sweep(case, CPU)
    assert best.settings == {"kind": 2}
    assert (best.tried, best.failed) == (3, 2)
    assert tuning.compile_candidates(case, case.candidates(), CPU)[0].startswith("RuntimeError: out of resource")
    monkeypatch.setattr(module, "candidates", lambda rows, **shape: [{"kind": 0}])
    assert tuning.sweep(case, CPU) is None


def test_parts_of_different_candidates_go_together():
    """Launches of their own are varied one at a time: the best of each makes settings that nobody listed."""

    def one(ms: float, up: int, down: int, block: int = 8) -> tuning.Timed:
        return tuning.Timed(ms, {"block": block, "up_a": up, "down_a": down})

    found = [one(1.0, 1, 0), one(1.1, 0, 5), one(1.2, 9, 9, block=16), one(1.3, 0, 0), one(1.4, 2, 0), one(1.5, 3, 0)]
    new = tuning.crossed(found)
    assert {(s["up_a"], s["down_a"]) for s in new} == {(1, 5), (2, 5)}
    assert all(s["block"] == 8 for s in new)
    assert tuning.crossed([tuning.Timed(1.0, {"a": 1}), tuning.Timed(1.0, {"a": 2})]) == []


def test_calls_take_turns():
    seen = []
    times = times_ms([lambda: seen.append(0), lambda: seen.append(1)], CPU, repeats=3)
    assert seen == [0, 1] * 3
    assert len(times) == 3
    assert all(ms > 0 for ms in times)
