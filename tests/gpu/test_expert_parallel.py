"""Ranks with their own sequences and experts on the shipped checkpoint. Run with ``pytest -m gpu``."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.config import EngineConfig, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.runner import Runner
from mixtralkit.planning.plan import ExpertPlan, contiguous
from tests.gpu.ranks import RANKS, SHARED, run_on_gpus
from tests.gpu.steps import counted_steps
from tests.gpu.test_engine import CKPTS, PROMPTS, answers, told
from tests.moe.layers import random_plan

pytestmark = pytest.mark.gpu
LAYERS, EXPERTS = 6, 8
BY_NCCL = MoEOptions(exchange="exact")
MANY = 6 if SHARED else len(PROMPTS)  # prompts of a run
BATCHES = [(1, len(PROMPTS)), (2 * RANKS, len(PROMPTS)), (3 * RANKS, len(PROMPTS))]  # and prompts
if SHARED:
    BATCHES = [(1, 2), (2 * RANKS, len(PROMPTS))]


def hot_cold() -> ExpertPlan:
    """Expert 0 on every rank."""
    plain = contiguous(1, EXPERTS, RANKS).slots_LWS[0].tolist()
    return _each_layer([[sorted({0, *experts}) for experts in plain]] * LAYERS)


def anyhow() -> ExpertPlan:
    """Every layer otherwise: replicas, ranks with unequal numbers of experts."""
    return _each_layer([random_plan(seed, EXPERTS, RANKS).slots_LWS[0].tolist() for seed in range(LAYERS)])


def _each_layer(experts_LW: list[list[list[int]]]) -> ExpertPlan:
    padded = [[own + [-1] * (EXPERTS - len(own)) for own in layer] for layer in experts_LW]
    return ExpertPlan(np.array(padded), EXPERTS)


PLANS = {"contiguous": lambda: contiguous(LAYERS, EXPERTS, RANKS), "hot_cold": hot_cold, "anyhow": anyhow}


def load(context: RankContext, plan: str, batch: int, dtype: str = "float32", options=None, graphs=True) -> Mixtral:
    torch.backends.cuda.matmul.allow_tf32 = False
    return Mixtral.load(
        EngineConfig.of(
            model=CKPTS, max_seq_len=256, max_batch_size=batch, dtype=dtype, attention="dp", experts="ep",
            plan=PLANS[plan](), moe=options or MoEOptions(), cuda_graphs=graphs,
        ),
        context,
    )  # fmt: skip


def load_plain(context: RankContext, plan: str, batch: int) -> Mixtral:
    """With exact exchanges by NCCL, launched one by one; or whole on every rank where NCCL has no way."""
    if not SHARED:
        return load(context, plan, batch, options=BY_NCCL)
    alone = RankContext(device=context.device)
    return Mixtral.build(CKPTS, None, 256, batch, dtype="float32", context=alone, cuda_graphs=False)


def memory_of(mixtral: Mixtral):
    return mixtral.model.dispatchers.by_name["symmetric"].exchange.memory


def _same_text(context: RankContext, plan: str) -> None:
    for batch, count in BATCHES:  # also ranks without a sequence
        plain, ahead = load_plain(context, plan, batch), load(context, plan, batch)
        for temperature in (0.0, 0.7):
            wanted = answers(plain, temperature, count, stop=("\n\n", "and the"))
            with counted_steps() as kinds:
                got = answers(ahead, temperature, count, stop=("\n\n", "and the"))
            assert kinds["graph"] > 20
            assert not kinds["launched"]
            assert told(got) == told(wanted)
            for one, other in zip(got, wanted, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
        assert memory_of(ahead) is not None


@pytest.mark.parametrize("plan", PLANS)
def test_float32_text_is_that_without_graphs(plan):
    run_on_gpus(_same_text, plan)


def _same_bits(context: RankContext, dtype: str) -> None:
    for temperature in (0.0, 0.7):
        wanted, got = (
            answers(load(context, "anyhow", 2 * RANKS, dtype, graphs=graphs), temperature, MANY)
            for graphs in (False, True)
        )
        assert [(c.tokens, c.logprobs) for c in got] == [(c.tokens, c.logprobs) for c in wanted]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_gives_the_bits_of_its_kernels(dtype):
    run_on_gpus(_same_bits, dtype)


def _late(context: RankContext) -> None:
    """Every rank starts its steps late at random; a second run takes the graphs of the first."""
    mixtral, own = load(context, "hot_cold", 2 * RANKS, "bfloat16"), random.Random(context.rank)
    wanted = told(answers(mixtral, count=MANY))
    captured = dict(mixtral.engine._runner._graphs._captured)
    launch = Runner.launch

    def late(*args):
        if own.random() < 0.3:
            torch.cuda._sleep(own.randrange(3_000_000))
        return launch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "launch", late)
        for _ in range(2 if SHARED else 5):
            assert told(answers(mixtral, count=MANY)) == wanted
    assert mixtral.engine._runner._graphs._captured == captured


def test_ranks_that_come_late_get_the_same_text():
    run_on_gpus(_late)


def _without_waiting(context: RankContext) -> None:
    mixtral, launch = load(context, "anyhow", 2 * RANKS, "bfloat16"), Runner.launch
    wanted = told(answers(mixtral, 0.7, MANY))  # captures

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "launch", watched)
        assert told(answers(mixtral, 0.7, MANY)) == wanted


def test_launches_never_wait_for_the_device():
    run_on_gpus(_without_waiting)


def _prompts_too(context: RankContext) -> None:
    wanted = told(answers(load_plain(context, "anyhow", 8)))
    mixtral = load(context, "anyhow", 8)
    assert told(answers(mixtral)) == wanted
    done = int(memory_of(mixtral).calls[1])
    mixtral.complete(PROMPTS[:8], 1, temperature=0)  # one step, of prompts only
    assert int(memory_of(mixtral).calls[1]) == done + LAYERS


def test_prompts_go_the_same_way():
    run_on_gpus(_prompts_too)


def _interrupted(context: RankContext) -> None:
    mixtral = load(context, "contiguous", 2 * RANKS)
    wanted = told(answers(mixtral))
    asked = iter(range(10**6))
    events = mixtral.stream(PROMPTS, 40, should_stop=lambda: next(asked) == 9, temperature=0)
    ends = [event.completion for event in events if event.finish_reason]
    assert {c.finish_reason for c in ends} >= {"interrupted"}
    assert told(answers(mixtral)) == wanted


def test_an_interrupted_stream_and_the_next_one():
    run_on_gpus(_interrupted)
