"""The capacity cut of many steps at once against the layer's own code a step at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtralkit.moe import capacity
from mixtralkit.moe.gate import Routing
from mixtralkit.planning.capacity import cut_trace
from mixtralkit.planning.dispatch_cost import once_per_member
from mixtralkit.planning.plan import ExpertPlan
from tests.moe.layers import random_plan


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
@pytest.mark.parametrize("seed", range(10))
def test_the_cut_is_the_layers(seed, overflow):
    """To the choice, where a row's next-best experts are those after its first by id, as a trace has to take them."""
    rng = np.random.default_rng(seed)
    tokens, places = 20 + seed, 3
    plan = ExpertPlan(random_plan(seed, 8, places).slots_LWS, 8, cold_capacity_factor=0.7, overflow=overflow)
    logits = torch.tensor(rng.normal(size=(places * tokens, 8)) + np.eye(8)[2], dtype=torch.float32)
    chosen, experts = logits.topk(2)
    weights = chosen.softmax(-1).half().float()
    logits = -10.0 - (torch.arange(8) - experts[:, :1]) % 8.0
    logits = logits.scatter(1, experts, chosen)
    home_SE = plan.holds_LWE[0]
    place_T = np.repeat(np.arange(places), tokens)
    found_TK, dropped, rerouted = cut_trace(plan, home_SE, experts.numpy(), weights.numpy(), place_T)
    limit = capacity.cold_capacity(plan, tokens, 2)
    expected, lost, moved = [], 0, 0
    for place in range(places):
        rows = slice(place * tokens, (place + 1) * tokens)
        routing = Routing(experts[rows], weights[rows], logits[rows])
        cut = capacity.cut_to_capacity(routing, torch.tensor(home_SE[place]), limit, overflow)
        expected.append(cut.experts_TK.numpy())
        lost, moved = lost + int(cut.dropped), moved + int(cut.rerouted)
    assert (found_TK == np.concatenate(expected)).all()
    assert (dropped, rerouted) == (lost, moved)
    assert dropped + rerouted > 0
    for place in range(places):
        mine_TK = found_TK[place_T == place]
        counts_E = np.bincount(mine_TK[mine_TK >= 0], minlength=8)
        assert (counts_E[~home_SE[place]] <= limit).all()
        assert all(len({*row[row >= 0]}) == (row >= 0).sum() for row in mine_TK), "an expert twice in a row"


def test_once_per_member():
    members = np.array([[2, 2, 1], [-1, 3, 3], [0, -1, 0], [1, 2, 3]])
    assert once_per_member(members).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, False],
        [True, True, True],
    ]
