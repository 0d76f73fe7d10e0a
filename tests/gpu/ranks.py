"""Runs a function on GPUs, a process each: a GPU for every rank, or several ranks on one where there are too few.

Kernels, peer memory and graphs are the same either way. Ranks of one GPU take turns on it, so that a wait for another
rank costs milliseconds: tests do less then, and no time means anything. ``GPU_RANKS`` in the environment says how many
ranks there are, 2 to 8; without it a GPU each, up to 4, or two on a single GPU.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext
from tests.gpu.sharing import share_collectives
from tests.ranks import run_ranks

GPUS = torch.cuda.device_count()
RANKS = int(os.environ.get("GPU_RANKS", max(2, min(4, GPUS))))
SHARED = RANKS > GPUS  # some GPU has several ranks
LIMIT_S = 120.0 if SHARED else 300.0  # of one test


def run_on_gpus(function: Callable[..., Any], *args: Any) -> None:
    """Calls ``function(context, *args)`` on ``RANKS`` ranks, see ``run_ranks``: one that hangs ends the test.

    Shortly before that it writes to stderr where it hangs, which ``pytest -s`` shows.
    """
    run_ranks(function, RANKS, *args, timeout_s=LIMIT_S, join=_join)


def _join(rank: int, world_size: int, store: str) -> RankContext:
    faulthandler.dump_traceback_later(LIMIT_S - 10)
    gpu = rank % GPUS
    torch.cuda.set_device(gpu)
    torch.manual_seed(rank)
    if SHARED:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "gloo" if SHARED else "nccl"  # NCCL wants a GPU for each rank
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    context = RankContext.start("cuda", {"RANK": str(rank), "LOCAL_RANK": str(gpu), "WORLD_SIZE": str(world_size)})
    if SHARED:
        share_collectives(context)
    return context
