"""The schedule turns itself off where GPUs reach each other's memory, on all ranks alike."""

from __future__ import annotations

import warnings
from unittest.mock import patch

import pytest
import torch

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import contiguous
from tests.configs import small_config
from tests.moe.layers import Whole, build
from tests.ranks import run_ranks


def _chunks(context: RankContext, reach: bool, force: bool) -> tuple[int, torch.Tensor]:
    """In how many parts the layer ran, and its rows."""
    whole = Whole()
    options = MoEOptions(FasterOptions(schedule=True, schedule_force=force))
    with patch.object(RankContext, "gpus_reach_each_other", lambda context: reach):
        layer = build(whole, contiguous(1, 8, context.world_size), context, options=options)
    y_TD, report = layer(whole.rows(6, context.rank))
    return len(report.handles), y_TD


@pytest.mark.parametrize(
    ("reach", "force", "wanted"), [(False, False, 2), (True, False, 1), (True, True, 2), (False, True, 2)]
)
def test_chunks_only_where_they_may_pay(reach, force, wanted):
    plain = run_ranks(_chunks, 2, True, False)
    for (chunks, y_TD), (_, plain_TD) in zip(run_ranks(_chunks, 2, reach, force), plain, strict=True):
        assert chunks == wanted
        torch.testing.assert_close(y_TD, plain_TD)


def _uneven(context: RankContext, rows: list[int]) -> tuple[int, torch.Tensor]:
    options = MoEOptions(FasterOptions(schedule=True))
    whole = Whole()
    with patch.object(RankContext, "gpus_reach_each_other", lambda context: True):
        layer = build(whole, contiguous(1, 8, context.world_size), context, options=options)
    y_TD, report = layer(whole.rows(rows[context.rank], context.rank))
    return len(report.handles), y_TD


def test_ranks_with_other_numbers_of_rows_decide_alike():
    """Were it decided by a rank's own rows, the collectives would not match and this would hang."""
    for count, (chunks, y_TD) in zip([70, 0, 1], run_ranks(_uneven, 3, [70, 0, 1]), strict=True):
        assert chunks == 1
        assert len(y_TD) == count


def _warnings(context: RankContext, schedule: bool, reach: bool, force: bool) -> list[str]:
    """What making a model says about the schedule on this rank."""
    config = small_config()
    plan = contiguous(config.n_layers, config.num_experts, context.world_size)
    layout = RankLayout(config, ParallelConfig("dp", "ep"), plan, context.rank)
    options = MoEOptions(FasterOptions(schedule=schedule, schedule_force=force))
    reaches = patch.object(RankContext, "gpus_reach_each_other", lambda context: reach)
    with reaches, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Transformer(layout, context, options=options)
    return [str(warning.message) for warning in caught if "schedule" in str(warning.message)]


def test_rank_0_says_once_that_it_is_off():
    (said,), silent = run_ranks(_warnings, 2, True, True, False)
    assert "FMOE_FASTER_SCHEDULE_FORCE=1" in said
    assert not silent


@pytest.mark.parametrize(
    ("schedule", "reach", "force"), [(False, True, False), (True, True, True), (True, False, False)]
)
def test_nothing_is_said_where_nothing_changes(schedule, reach, force):
    assert run_ranks(_warnings, 2, schedule, reach, force) == [[], []]


def test_cpus_do_not_reach_each_others_gpus():
    assert not RankContext().gpus_reach_each_other()


def test_the_switch_is_read_as_the_others_are():
    assert FasterOptions.of({"FMOE_FASTER_SCHEDULE_FORCE": "ON"}).schedule_force
    with pytest.raises(ValueError, match="FMOE_FASTER_SCHEDULE_FORCE"):
        FasterOptions.of({"FMOE_FASTER_SCHEDULE_FORCE": "perhaps"})
