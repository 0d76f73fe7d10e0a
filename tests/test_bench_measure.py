"""benchmarks/measure.sh with commands in the place of python and torchrun that write down what they are called with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def measure(tmp_path):
    """Runs the script in ``tmp_path``; gives its result and the calls, by the name of the file that they write."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "torchrun"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $* in $PWD" >> "{tmp_path}/calls"\n')
        (programs / name).chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
        done = subprocess.run(
            ["sh", str(ROOT / "benchmarks" / "measure.sh"), *arguments], capture_output=True, text=True, cwd=tmp_path,
            env={"PATH": f"{programs}:{os.environ['PATH']}", **environment}, timeout=60,
        )  # fmt: skip
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, {Path(call.split("--output ")[1].split()[0]).stem: call for call in calls}

    return run


def test_one_gpu(measure, tmp_path):
    done, calls = measure("1", "found")
    assert done.returncode == 0, done.stderr
    assert set(calls) == {"model", "moe-kernels"}
    # a folder without / before it was taken from the repository's root
    assert all(f"--output {tmp_path}/found/" in call and call.endswith(f" in {ROOT}") for call in calls.values())
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"model.log", "moe-kernels.log"}


@pytest.mark.parametrize(
    ("gpus", "environment", "machine"), [("2", {}, "h200x2"), ("4", {}, "h200x4"), ("4", {"MACHINE": "h200"}, "h200")]
)
def test_several_gpus_choose_by_a_machine_of_as_many(measure, gpus, environment, machine):
    """It was always the machine of two."""
    done, calls = measure(gpus, "found", **environment)
    assert done.returncode == 0, done.stderr
    assert set(calls) == {"moe-layer", "model-dp", "model-tp"}
    for name in ("moe-layer", "model-dp"):
        assert f"--nproc_per_node={gpus} " in calls[name]
        assert f"--hardware configs/hardware/{machine}.json" in calls[name]


def test_no_such_machine(measure):
    done, calls = measure("16", "found")
    assert (done.returncode, done.stderr) == (1, "MACHINE (h200x16) must name a file of configs/hardware\n")
    assert not calls
