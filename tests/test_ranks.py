"""The rank harness itself: it must report, and never hang."""

import os
import signal
import time

import pytest

from mixtralkit.distributed import threads_of_rank
from tests.ranks import RankError, run_ranks


def _sum(context):
    import torch

    return float(context.all_reduce(torch.tensor([context.rank + 1.0])))


def _fail_on_rank_1(context):
    if context.rank == 1:
        raise ValueError("rank 1 says no")
    context.barrier()


def _agree(context):
    with context.agreed():
        if context.rank == 1:
            raise ValueError("only here")


def _die(context):
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    context.barrier()


def _sleep(context):
    time.sleep(30)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_values_come_back_in_rank_order(world_size):
    assert run_ranks(_sum, world_size) == [world_size * (world_size + 1) / 2] * world_size


def test_a_rank_that_raises_ends_the_others():
    with pytest.raises(RankError, match=r"rank 1 says no|Connection closed"):
        run_ranks(_fail_on_rank_1, 2, timeout_s=20)


def test_agreed_raises_on_every_rank():
    with pytest.raises(RankError, match="only here"):
        run_ranks(_agree, 2, timeout_s=20)


def test_a_killed_rank_is_reported():
    with pytest.raises(RankError, match=r"exit code -9|Connection (closed|reset)"):
        run_ranks(_die, 2, timeout_s=20)


def test_a_rank_that_hangs_meets_the_limit():
    start = time.monotonic()
    with pytest.raises(RankError, match="did not end"):
        run_ranks(_sleep, 2, timeout_s=2)
    assert time.monotonic() - start < 10


def _threads(context):
    import torch

    return torch.get_num_threads()


def test_ranks_of_one_machine_share_its_cores():
    cores = threads_of_rank(1)
    assert run_ranks(_threads, 2) == [max(1, cores // 2)] * 2
    assert threads_of_rank(cores + 1) == 1
