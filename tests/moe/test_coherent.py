"""Rows that move with their experts: what they become is the oracle's, wherever they live, and each crosses once."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.moe.dispatch import coherent, exchange
from mixtralkit.moe.layer import MoELayer, StepRows
from mixtralkit.moe.reference import moe_reference
from mixtralkit.ops.hidden import Hidden
from mixtralkit.ops.norm.reference import rms_norm_reference
from mixtralkit.planning.plan import ExpertPlan, contiguous
from tests.moe.layers import Whole, build, random_plan
from tests.ranks import run_ranks

ROWS = [11, 0, 5, 8]
NORM = (torch.linspace(0.8, 1.2, 16), 1e-5)


@torch.no_grad()
def _three_layers(context: RankContext, cases: list[tuple[int, ExpertPlan]]):
    """Rows pass the same layer three times without going home, alone and as a residual stream."""
    return [_pass(context, Whole(top_k=top_k), plan, streams) for top_k, plan in cases for streams in (False, True)]


def _pass(context: RankContext, whole: Whole, plan: ExpertPlan, streams: bool):
    """The rows and their numbers, and how often sums crossed in an exchange of their own."""
    layer = build(whole, plan, context, attention="coherent")
    x_TD = whole.rows(ROWS[context.rank], context.rank)
    ids_T = torch.arange(len(x_TD)) + 100 * context.rank
    hidden = Hidden(x_TD, None, NORM, ids_T) if streams else Hidden(None, x_TD, ids_T=ids_T)
    second_exchanges = 0
    for _ in range(3):
        with patch.object(coherent, "all_to_all", side_effect=coherent.all_to_all) as sums:
            hidden = _one_layer(context, layer, hidden)
        second_exchanges += sums.call_count
    return (hidden.x_TD if streams else hidden.rows_TD), hidden.ids_T, second_exchanges


def _one_layer(context: RankContext, layer: MoELayer, hidden: Hidden) -> Hidden:
    """Also checks that a row leaves once for each rank that computes a part, as one row of its width."""
    sent = []

    def counted(x_ND, *arguments):
        sent.append(tuple(x_ND.shape))
        return exchange_all_to_all(x_ND, *arguments)

    exchange_all_to_all = exchange.all_to_all
    with patch.object(exchange, "all_to_all", counted):
        found, report = layer(hidden, StepRows(decode=True), NORM)
    ranks_TK, _ = layer.table.pour(report.routing.experts_TK)
    needed = sum(len({*ranks} - {context.rank}) for ranks in ranks_TK.tolist())
    top_k = ranks_TK.shape[1]
    assert sent == [(needed, 16), (needed, 3 * top_k + 1)]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_moving_rows_equal_the_oracle(world_size):
    plans = [contiguous(1, 8, world_size), random_plan(3, 8, world_size)]
    cases = [(top_k, plan) for top_k in (1, 2, 3) for plan in plans]
    results = run_ranks(_three_layers, world_size, cases)
    for number, of_ranks in enumerate(zip(*results, strict=True)):
        top_k, streams = cases[number // 2][0], bool(number % 2)
        found = {int(i): x for xs, ids, _ in of_ranks for x, i in zip(xs, ids, strict=True)}
        assert len(found) == sum(ROWS[:world_size])
        whole = Whole(top_k=top_k)
        for rank, tokens in enumerate(ROWS[:world_size]):
            expected = whole.rows(tokens, rank)
            for _ in range(3):
                rows_TD = rms_norm_reference(expected, *NORM) if streams else expected
                y_TD = moe_reference(rows_TD, *whole.weights(), top_k)
                expected = expected + y_TD if streams else y_TD
            for row, x_D in enumerate(expected):
                torch.testing.assert_close(found[100 * rank + row], x_D, rtol=1e-4, atol=1e-4)
        if top_k == 1:
            assert all(count == 0 for *_, count in of_ranks), "with one choice a row there is one exchange a layer"
