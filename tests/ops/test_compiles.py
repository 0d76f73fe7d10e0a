"""The kernels are accepted by Triton's compiler, for GPUs that this machine need not have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "experts", "kernels"),
    [(90, "plain", 50), (90, "packed", 40), (80, "plain packed", 40), (89, "packed", 15)],
)
def test_kernels_compile(capability, experts, kernels, tmp_path):
    """A name that was a number in one branch and a pointer in the other passed the interpreter and no compiler."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environ["DISABLE_LLVM_OPT"] = "1"  # which takes half of the time, and refuses nothing
    command = [sys.executable, "-m", "tests.ops.compile_for_gpus", str(capability), *experts.split()]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) > kernels
    assert max(shared) <= {80: 163, 89: 99, 90: 227}[capability] * 1024  # of a multiprocessor
