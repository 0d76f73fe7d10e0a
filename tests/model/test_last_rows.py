"""Of the last block only the rows that are asked for go on after the attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.planning.plan import ExpertPlan
from tests.configs import small_config
from tests.engine.parts import make_model
from tests.ranks import run_ranks

PROMPTS = [(0, 0, [5, 9, 2, 7]), (1, 0, [3]), (2, 0, [8, 8, 1])]


def step(model, rows: list[int], observe=None, prompts=PROMPTS) -> tuple[torch.Tensor, list[int]]:
    """Logits, and how many rows each layer's gate saw."""
    seen = []
    hooks = [
        block.feed_forward.gate.register_forward_hook(lambda gate, given, found: seen.append(len(given[0])))
        for block in model.layers
    ]
    batch = ForwardBatch.build(prompts, "cpu")
    logits = model.step(batch, model.allocate_cache(), torch.tensor(rows, dtype=torch.int64), observe=observe)
    for hook in hooks:
        hook.remove()
    return logits, seen


@pytest.mark.parametrize("rows", [[3, 4, 7], [7], [], [7, 3]])
def test_logits_are_those_of_all_rows(rows):
    model = make_model(RankContext(), small_config())
    whole, seen = step(model, list(range(8)))
    assert seen == [8] * len(model.layers)
    some, seen = step(model, rows)
    assert seen == [8] * (len(model.layers) - 1) + [len(rows)]
    torch.testing.assert_close(some, whole[rows], rtol=1e-5, atol=1e-5)


def test_who_looks_at_the_routing_sees_all_rows():
    model, reports = make_model(RankContext(), small_config()), []
    step(model, [7], observe=lambda batch, layers: reports.extend(layers))
    assert [len(report.routing.experts_TK) for report in reports] == [8] * len(model.layers)


def test_a_capacity_counts_all_rows():
    model = make_model(RankContext(), small_config())
    plan = model.layout.plan
    capped = ExpertPlan(plan.slots_LWS, plan.num_experts, cold_capacity_factor=1.0)
    model.layout = model.store.layout = replace(model.layout, plan=capped)
    assert step(model, [7])[1] == [8] * len(model.layers)


def _own_rows(context: RankContext) -> None:
    """Ranks with several rows, one and none of which something is asked."""
    model = make_model(context, small_config(), "dp", "ep")
    own = [PROMPTS[:1], PROMPTS[1:]][context.rank]
    count = sum(len(ids) for *_, ids in own)
    whole, _ = step(model, list(range(count)), prompts=own)
    some, seen = step(model, [[], [0, 3]][context.rank], prompts=own)
    assert seen[-1] == [0, 2][context.rank]
    torch.testing.assert_close(some, whole[[[], [0, 3]][context.rank]], rtol=1e-5, atol=1e-5)


def test_ranks_with_own_rows():
    run_ranks(_own_rows, 2)
