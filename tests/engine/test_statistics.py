"""The run's totals against what can be counted without the layers."""

from __future__ import annotations

import numpy as np
import pytest

from mixtralkit.config import ParallelConfig
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.statistics import MoEStatistics
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.engine.parts import engine_config, make_tokenizer
from tests.ranks import run_ranks

PROMPTS = [(5, 6, 7, 8, 9), (11, 12), (13, 14, 15)]


def _run(context, folder, attention: str, plan: ExpertPlan):
    config = engine_config()
    model = Transformer(RankLayout(config, ParallelConfig(attention, "ep"), plan, context.rank), context)
    model.initialize(3, std=0.15)
    statistics = MoEStatistics(model)
    engine = Engine(model, Tokenizer(folder / "tokenizer.model"), observe=statistics)
    requests = [Request(i, ids, 4, SamplingOptions(0.0, 1.0, 0, 0.0, 1)) for i, ids in enumerate(PROMPTS)]
    done = engine.complete(requests)
    steps = sum(len(ids) for ids in PROMPTS) + sum(len(completion.tokens) - 1 for completion in done)
    return steps, statistics.totals(), statistics.table()


@pytest.mark.parametrize("attention", ["tp", "dp"])
def test_every_token_is_counted_once_whoever_runs_it(tmp_path, attention):
    make_tokenizer(tmp_path)
    config = engine_config()
    for plan in (contiguous(config.n_layers, 8, 2), everywhere(config.n_layers, 8, 2)):
        for tokens, totals, table in run_ranks(_run, 2, tmp_path, attention, plan):
            assert [layer.choices for layer in totals] == [2 * tokens] * config.n_layers
            assert all(layer.dropped == layer.rerouted == layer.shadows == 0 for layer in totals)
            sends = attention == "dp" and not plan.holds_LWE.all(1).any()
            assert all((layer.sent > 0) == sends for layer in totals)
            assert len(table.splitlines()) == 1 + config.n_layers


def test_dropped_choices_are_counted(tmp_path):
    """With no capacity at all, every choice of an expert that is elsewhere is dropped."""
    make_tokenizer(tmp_path)
    config = engine_config()
    slots = np.tile(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), (config.n_layers, 1, 1))
    plan = ExpertPlan(slots, 8, cold_capacity_factor=0.0)
    for _, totals, _ in run_ranks(_run, 2, tmp_path, "dp", plan):
        assert all(0 < layer.dropped < layer.choices for layer in totals)
        assert all(layer.sent == 0 for layer in totals)
