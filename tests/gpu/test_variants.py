"""What the project exists for decodes in graphs: capacities, shadows, plans between steps. Run with ``pytest -m gpu``.

The shipped checkpoint in float32: the text of graphs is that of the same steps kernel by kernel, and steps replay.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.config import EngineConfig, FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.planning import replicas
from tests.engine.test_plan_manager import AsManySlots
from tests.gpu.ranks import RANKS, SHARED, run_on_gpus
from tests.gpu.steps import counted_steps
from tests.gpu.test_engine import CKPTS, PROMPTS, answers, told
from tests.gpu.test_expert_parallel import PLANS, hot_cold

pytestmark = pytest.mark.gpu
COUNT = 6 if SHARED else len(PROMPTS)
# copies cost nothing, so that shadows come as soon as one expert has more rows than another
EAGER_SHADOWS = FasterOptions(shadow=True, net_bandwidth=1e18, gpu_throughput=1e9)
CUT = replace(hot_cold(), cold_capacity_factor=0.5)
VARIANTS = {
    "plain": (PLANS["anyhow"](), MoEOptions()),
    "drop": (CUT, MoEOptions()),
    "reroute": (replace(CUT, overflow="reroute"), MoEOptions()),
    "shadow": (PLANS["contiguous"](), MoEOptions(faster=EAGER_SHADOWS, shadow_memory_gb=0.01)),
    "static": (CUT, MoEOptions(exchange="static")),
    "managed": (PLANS["contiguous"](), MoEOptions()),
}


def load(context: RankContext, name: str, graphs: bool) -> Mixtral:
    torch.backends.cuda.matmul.allow_tf32 = False
    plan, options = VARIANTS[name]
    mixtral = Mixtral.load(
        EngineConfig.of(
            model=Path(CKPTS), max_seq_len=256, max_batch_size=2 * RANKS, dtype="float32", attention="dp", experts="ep",
            plan=plan, moe=options, cuda_graphs=graphs,
        ),
        context,
    )  # fmt: skip
    if name == "managed":
        mixtral.engine.plan_manager = PlanManager(mixtral.model, AsManySlots().on(RANKS), update_step=8)
    return mixtral


def _same_text(context: RankContext, name: str) -> None:
    if name == "shadow":  # of a few prompts no batch would be large enough to want copies
        replicas.SMALL_BATCH_CHOICES = 0
    plain, ahead = (load(context, name, graphs) for graphs in (False, True))
    for temperature in (0.0, 0.7):
        with counted_steps() as kinds:
            wanted = told(answers(plain, temperature, COUNT))
        assert kinds["launched"] > 20
        assert not kinds["graph"]
        with counted_steps() as kinds:
            got = told(answers(ahead, temperature, COUNT))
        assert got == wanted
        assert kinds["graph"] > 20
        # amid a pass over the layers no new graph is made, so those steps may be launched
        assert name == "managed" or not kinds["launched"]
    symmetric = ahead.model.dispatchers.by_name.get("symmetric")
    assert (name == "static") == (symmetric is None or symmetric.exchange.memory is None)
    if name == "shadow":
        assert ahead.model.store.copies
    if name == "managed":
        assert ahead.engine.plan_manager.statistics.layers_moved > 6
        assert ahead.engine.plan_manager.statistics.layers_relocated == 0


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "static" or not SHARED])  # its sums need NCCL
def test_graphs_give_the_text_of_their_kernels(name):
    run_on_gpus(_same_text, name)


def _exact(context: RankContext) -> None:
    """One rank that has every expert, its steps launched: the oracle of what cuts no choice."""
    alone = RankContext(device=context.device)
    whole = Mixtral.build(CKPTS, None, 256, 2 * RANKS, dtype="float32", context=alone, cuda_graphs=False)
    wanted = told(answers(whole, count=COUNT))
    for name in ("plain", "shadow", "managed"):
        assert told(answers(load(context, name, True), count=COUNT)) == wanted


def test_nothing_but_a_capacity_changes_the_text():
    run_on_gpus(_exact)
