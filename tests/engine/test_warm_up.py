"""What is done before the first request: graphs of decode steps, a step of the largest size; nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtralkit.distributed import RankContext
from mixtralkit.engine import runner
from mixtralkit.engine.expert_rows import ExpertRows
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.graphs import Run
from mixtralkit.engine.requests import Request
from mixtralkit.engine.runner import Runner
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.shapes import bucket_sizes
from mixtralkit.engine.tokenizer import Tokenizer
from tests.engine.parts import engine_config, make_model
from tests.ranks import run_ranks

BUDGET = 40


class Captured:
    """Graphs that only remember which were captured, and when one was made late."""

    is_on = True

    def __init__(self, *_: object) -> None:
        self.keys: list[tuple] = []

    def run(self, key, function, rehearse, may_capture=True) -> Run:
        if key not in self.keys:
            rehearse()
            self.keys.append(key)
        return Run(function(), True)


def _run(context: RankContext, folder: Path, attention: str, warms_up: bool) -> tuple:
    with pytest.MonkeyPatch.context() as patch:
        made, rows = [], []
        patch.setattr(runner, "Graphs", lambda *args: made.append(Captured()) or made[-1])
        launch = Runner.launch

        def launched(own, plan, *args):
            rows.append([sum(len(chunk.ids) for chunk in chunks) for chunks in plan.chunks])
            return launch(own, plan, *args)

        patch.setattr(Runner, "launch", launched)
        model = make_model(context, engine_config(max_batch_size=6), attention)
        engine = Engine(model, Tokenizer(folder / "tokenizer.model"), BUDGET)
        engine.expert_rows = ExpertRows(model)
        if warms_up:
            engine.warm_up(BUDGET)
            assert rows.pop() == [BUDGET] * model.ranks_with_own_sequences
            assert not engine.expert_rows.read().any()
            found = engine.snapshot()
            assert (found.steps, found.running, found.pages_used, found.prompt_tokens) == (0, 0, 0, 0)
        before = list(made[0].keys) if made else []
        requests = [Request(i, (5, 6 + i), 4 + 3 * i, SamplingOptions(temperature=0.7 * (i % 2))) for i in range(9)]
        answers = [(done.tokens, done.text) for done in engine.complete(requests)]
        return answers, before, made[0].keys, len(made)


@pytest.mark.parametrize(("world_size", "attention"), [(1, "tp"), (2, "tp"), (2, "dp"), (2, "coherent")])
def test_no_graph_is_captured_while_requests_run(folder, world_size, attention):
    cold = run_ranks(_run, world_size, folder, attention, False)
    warm = run_ranks(_run, world_size, folder, attention, True)
    sizes = bucket_sizes(3 if attention == "dp" else 6)
    for (answers, _, some, _), (same, before, after, made) in zip(cold, warm, strict=True):
        assert same == answers
        assert sorted(before) == sorted((rows, draws, False, False, False) for rows in sizes for draws in (False, True))
        assert after == before
        assert made == 1
        assert set(some) <= set(before)


def test_a_step_on_a_cpu_is_small(folder):
    engine = Engine(make_model(RankContext(), engine_config()), Tokenizer(folder / "tokenizer.model"))
    engine.warm_up()
    assert engine.complete([Request(0, (5, 6), 3, SamplingOptions(temperature=0))])[0].tokens
