"""The schedule turns itself off where GPUs reach each other's memory, on all ranks alike."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from mixtralkit.config import FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.planning.plan import contiguous
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


def test_cpus_do_not_reach_each_others_gpus():
    assert not RankContext().gpus_reach_each_other()


def test_the_switch_is_read_as_the_others_are():
    assert FasterOptions.from_env({"FMOE_FASTER_SCHEDULE_FORCE": "ON"}).schedule_force
    with pytest.raises(ValueError, match="FMOE_FASTER_SCHEDULE_FORCE"):
        FasterOptions.from_env({"FMOE_FASTER_SCHEDULE_FORCE": "perhaps"})
