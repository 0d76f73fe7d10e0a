"""The schedule is off where rows travel through the GPUs' memory, on all ranks alike."""

from __future__ import annotations

import warnings

import pytest
import torch

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.reference import moe_reference
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.plan import contiguous
from tests.configs import small_config
from tests.moe.layers import Whole, build, run_layer
from tests.ranks import run_ranks

ROWS = (70, 0, 1)


def _chunks(context: RankContext) -> list[int]:
    """In how many parts layers with the schedule run, with and without memory that all ranks reach."""
    whole, plan, chunks = Whole(), contiguous(1, 8, context.world_size), []
    x_TD = whole.rows(6, context.rank)
    plain_TD, _ = run_layer(build(whole, plan, context), x_TD)
    memory = SymmetricExchange.create(context, 6, whole.dim, whole.top_k, torch.float32)
    for symmetric in (None, memory):
        layer = build(whole, plan, context, options=MoEOptions(FasterOptions(schedule=True)), symmetric=symmetric)
        for known in ({}, {"per_rank": 6}, {"per_rank": 6, "decode": True}):
            y_TD, report = run_layer(layer, x_TD, **known)
            torch.testing.assert_close(y_TD, plain_TD)
            chunks.append(len(report.handles))
    return chunks


def _uneven(context: RankContext) -> list[int]:
    """In how many parts the schedule runs where ranks have unlike numbers of rows; their sums are those without it."""
    whole, plan, parts = Whole(), contiguous(1, 8, context.world_size), []
    x_TD = whole.rows(ROWS[context.rank], context.rank)
    oracle_TD = moe_reference(x_TD, *whole.weights(), whole.top_k)
    memory = SymmetricExchange.create(context, max(ROWS), whole.dim, whole.top_k, torch.float32)
    for symmetric in (None, memory):
        layer = build(whole, plan, context, options=MoEOptions(FasterOptions(schedule=True)), symmetric=symmetric)
        for known in ({}, {"per_rank": max(ROWS)}):
            y_TD, report = run_layer(layer, x_TD, **known)
            torch.testing.assert_close(y_TD, oracle_TD)
            parts.append(len(report.handles))
    return parts


def test_ranks_with_other_numbers_of_rows_decide_alike():
    """Were it decided by a rank's own rows, the collectives would not match and this would hang."""
    assert run_ranks(_uneven, 3) == [[2, 2, 2, 1]] * 3


CASES = [  # schedule, memory that all reach, force: what a model's prompts take
    (True, True, False, "symmetric"),
    (False, True, False, "symmetric"),
    (True, True, True, "exact"),
    (True, False, False, "exact"),
]


def _models(context: RankContext) -> list[tuple[str, list[str]]]:
    """The dispatcher of a prompt, and what making the model says about the schedule on this rank."""
    config, found = small_config(), []
    plan = contiguous(config.n_layers, config.num_experts, context.world_size)
    layout = RankLayout(config, ParallelConfig("dp", "ep"), plan, context.rank)
    for schedule, reach, force, _ in CASES:
        faster = FasterOptions(schedule=schedule, schedule_force=force)
        options = MoEOptions(faster, symmetric_rows=8 if reach else None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = Transformer(layout, context, options=options)
        said = [str(warning.message) for warning in caught if "schedule" in str(warning.message)]
        found.append((model.dispatchers.name(True, False), said))
    return found


def _both(context: RankContext):
    return _chunks(context), _models(context)


def test_chunks_only_where_they_may_pay_and_rank_0_says_so():
    """Decided by what all ranks know: by a rank's own rows, the collectives might not match."""
    for rank, (chunks, found) in enumerate(run_ranks(_both, 2)):
        assert chunks == [2, 2, 1, 2, 1, 1]
        assert [name for name, _ in found] == [name for *_, name in CASES]
        assert [len(said) for _, said in found] == [int(rank == 0), 0, 0, 0]
        assert all("FMOE_FASTER_SCHEDULE_FORCE=1" in text for _, said in found for text in said)


def test_cpus_do_not_reach_each_others_gpus():
    assert not RankContext().gpus_reach_each_other()


def test_the_switch_is_read_as_the_others_are():
    assert FasterOptions.of({"FMOE_FASTER_SCHEDULE_FORCE": "ON"}).schedule_force
    with pytest.raises(ValueError, match="FMOE_FASTER_SCHEDULE_FORCE"):
        FasterOptions.of({"FMOE_FASTER_SCHEDULE_FORCE": "perhaps"})
