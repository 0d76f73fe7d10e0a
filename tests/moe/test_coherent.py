"""Rows that move with their experts: what they become is the oracle's, wherever they live."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.dispatch import coherent
from mixtralkit.moe.reference import moe_reference
from mixtralkit.planning.plan import contiguous
from tests.moe.layers import Whole, build, random_plan
from tests.ranks import run_ranks


def _three_layers(context: RankContext, whole: Whole, random: bool):
    """Rows pass the same layer three times without going home; also counts the exchanges of the sums."""
    plan = random_plan(3, 8, context.world_size) if random else contiguous(1, 8, context.world_size)
    layer = build(whole, plan, context)
    x_TD = whole.rows([11, 0, 5, 8][context.rank], context.rank)
    ids_T = torch.arange(len(x_TD)) + 100 * context.rank
    second_exchanges = 0
    original = coherent.all_to_all

    def counted(*args):
        nonlocal second_exchanges
        second_exchanges += 1
        return original(*args)

    coherent.all_to_all = counted
    for _ in range(3):
        x_TD, ids_T = layer.forward_moving(x_TD, ids_T)
    return x_TD, ids_T, second_exchanges


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("random", [False, True])
def test_moving_rows_equal_the_oracle(top_k, random):
    whole = Whole(top_k=top_k)
    results = run_ranks(_three_layers, 4, whole, random)
    found = {int(i): x for xs, ids, _ in results for x, i in zip(xs, ids, strict=True)}
    assert len(found) == 24
    for rank, tokens in enumerate([11, 0, 5, 8]):
        expected = whole.rows(tokens, rank)
        for _ in range(3):
            expected = moe_reference(expected, *whole.weights(), top_k)
        for row, x_D in enumerate(expected):
            torch.testing.assert_close(found[100 * rank + row], x_D, rtol=1e-4, atol=1e-4)
    if top_k == 1:
        assert all(count == 0 for *_, count in results), "with one choice a row there is one exchange a layer"
