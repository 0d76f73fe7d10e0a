"""The recorder on a GPU, where a step's routing is copied while the next one runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.engine.recorder import RoutingRecorder
from mixtralkit.planning.trace import RoutingTrace

pytestmark = pytest.mark.gpu
CKPTS = Path(__file__).resolve().parents[2] / "ckpts"
PROMPTS = ["In the beginning", "def read(path):\n", "NAME\n       tar -", "class", "The function returns"]


def test_float32_routing_is_the_cpus(tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    traces = []
    for device in ("cpu", "cuda"):
        mixtral = Mixtral.build(CKPTS, None, 256, 3, device=device, dtype="float32")
        with RoutingRecorder(mixtral.model, tmp_path / device) as mixtral.engine.observe:
            mixtral.complete(PROMPTS, 32, temperature=0)
        traces.append(RoutingTrace.load(tmp_path / device))
    on_cpu, on_gpu = traces
    np.testing.assert_array_equal(on_gpu.sequence, on_cpu.sequence)
    np.testing.assert_array_equal(on_gpu.position, on_cpu.position)
    assert (on_gpu.experts != on_cpu.experts).mean() < 1e-3  # near ties of the gate
