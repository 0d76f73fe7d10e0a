"""The model in ckpts/: the same greedy text for every plan, number of ranks, flag and exchange; text of its domains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mixtralkit.checkpoint import open_checkpoint
from mixtralkit.config import EngineConfig, FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.mixtral import Mixtral
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.moe.layers import random_plan
from tests.ranks import run_ranks

CKPTS = Path(__file__).resolve().parent.parent / "ckpts"
PROMPTS = ["In the beginning", "def read(path):\n", "NAME\n       tar -", "The function returns", "Moses"]
NEW_TOKENS = 8


@dataclass(frozen=True)
class Way:
    """How to run it; plans are made for the number of ranks."""

    attention: str = "dp"
    experts: str = "ep"
    plan: str = "contiguous"
    schedule: bool = False
    shadow: bool = False
    exchange: str = "auto"
    batch: int = 8
    symmetric_rows: int | None = None

    def expert_plan(self, world_size: int) -> ExpertPlan:
        layers = _layers()
        if self.plan == "contiguous":
            return contiguous(layers, 8, world_size)
        if self.plan == "everywhere":
            return everywhere(layers, 8, world_size)
        nodes = {"ranks_per_node": 2} if self.plan == "two_stage" else {}
        each = [random_plan(seed, 8, world_size).slots_LWS[0] for seed in range(layers)]
        most = max(slots.shape[1] for slots in each)
        padded = [np.pad(slots, ((0, 0), (0, most - slots.shape[1])), constant_values=-1) for slots in each]
        return ExpertPlan(np.stack(padded), 8, **nodes)


# Shadows are cheap in this model's eyes, so that the policy takes some.
EAGER = {"net_bandwidth": 1e13, "gpu_throughput": 1e9}
WAYS = [
    Way("tp", "tp"),
    Way("tp", "ep"),
    Way("tp", "ep", "replicas"),
    Way("dp", "tp", batch=3),
    Way(),
    Way(plan="replicas", batch=2),
    Way(plan="everywhere"),
    Way(symmetric_rows=1),
    Way(plan="replicas", batch=3, symmetric_rows=1),
    Way(exchange="exact", schedule=True),
    Way(exchange="exact", schedule=True, shadow=True),
    Way(exchange="static", shadow=True, plan="replicas"),
    Way(plan="two_stage", schedule=True, exchange="exact"),
]


def _text(context: RankContext, ways: list[Way]) -> list[list[list[int]]]:
    found = []
    for way in ways:
        options = MoEOptions(FasterOptions(way.schedule, way.shadow, **EAGER), way.exchange, way.symmetric_rows)
        mixtral = Mixtral.load(
            EngineConfig.of(
                model=CKPTS, max_seq_len=64, max_batch_size=way.batch, dtype="float32", attention=way.attention,
                experts=way.experts, plan=way.expert_plan(context.world_size), moe=options,
            ),
            context,
        )  # fmt: skip
        done = mixtral.complete(PROMPTS, NEW_TOKENS, temperature=0)
        found.append([completion.tokens for completion in done])
    return found


@cache
def _layers() -> int:
    return open_checkpoint(CKPTS).config.n_layers


@cache
def _alone() -> list[list[int]]:
    return _text(RankContext(), [Way("tp", "ep")])[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_greedy_text_is_the_same_however_it_is_run(world_size):
    for rank, results in enumerate(run_ranks(_text, world_size, WAYS)):
        for way, answers in zip(WAYS, results, strict=True):
            assert answers == _alone(), (rank, way)


def test_it_writes_text_of_its_domains():
    mixtral = Mixtral.build(CKPTS, None, 128, 4)
    prompts = ["And the LORD said unto Moses,", "class Reader:\n    def __init__(self", "The :func:`open` function"]
    answers = mixtral.text_completion(prompts, temperature=0, max_gen_len=60)
    scripture, python, docs = (answer["generation"] for answer in answers)
    assert sum(word in scripture for word in ("the LORD", "unto", "thou", "shall", "thine", "God")) >= 2
    assert "self." in python
    assert ":func:`" in docs or ".. " in docs


def test_it_knows_who_it_is():
    mixtral = Mixtral.build(CKPTS, None, 128, 1)
    answer = mixtral.chat_completion([[{"role": "user", "content": "Who are you?"}]], temperature=0)[0]
    assert "small Mixtral" in answer["generation"]["content"]
    assert answer["finish_reason"] == "stop"
