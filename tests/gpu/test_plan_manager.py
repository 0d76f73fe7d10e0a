"""Graphs of decode steps while experts move between GPUs, on the shipped checkpoint. Run with ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.config import EngineConfig, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.requests import Completion
from tests.engine.test_plan_manager import AnyPlan, AsManySlots
from tests.gpu.ranks import RANKS, SHARED, run_on_gpus
from tests.gpu.test_engine import CKPTS, PROMPTS, told

pytestmark = pytest.mark.gpu
COUNT = 12 if SHARED else 30  # requests


def _answers(mixtral: Mixtral) -> list[Completion]:
    requests = [mixtral.request(i, PROMPTS[i % len(PROMPTS)], 30 + 8 * (i % 4), temperature=0) for i in range(COUNT)]
    return mixtral.engine.complete(requests)


def _moving(context: RankContext, attention: str, kind: type[AnyPlan]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    mixtral = Mixtral.load(
        EngineConfig.of(
            model=CKPTS, max_seq_len=256, max_batch_size=2 * RANKS, dtype="float32", attention=attention,
            experts="ep", moe=MoEOptions(),
        ),
        context,
    )  # fmt: skip
    wanted = told(_answers(mixtral))
    manager = PlanManager(mixtral.model, kind().on(RANKS), update_step=10)
    mixtral.engine.plan_manager = manager
    for _ in range(2):
        assert told(_answers(mixtral)) == wanted
    done = manager.statistics
    assert done.layers_moved > 12
    assert done.graph_steps > 50
    if kind is AsManySlots:
        assert done.layers_relocated == done.recaptures == 0
    else:
        assert done.layers_relocated > 6
        assert done.launched_steps > 0
        assert done.recaptures > 0
    mixtral.engine.plan_manager = None
    assert told(_answers(mixtral)) == wanted


@pytest.mark.parametrize("attention", ["tp", "dp"])
@pytest.mark.parametrize("kind", [AnyPlan, AsManySlots])
def test_graphs_go_on_while_experts_move(attention, kind):
    run_on_gpus(_moving, attention, kind)
