"""Runs a function on the GPUs of this host, a process each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mixtralkit.distributed import RankContext

RANKS = min(4, torch.cuda.device_count())


def run_on_gpus(function: Callable[..., Any], *args: Any) -> None:
    """Calls ``function(context, *args)`` on ``RANKS`` NCCL ranks. ``function`` is of a module's top level."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (str(Path(folder, "store")), function, args), nprocs=RANKS)


def _main(rank: int, store: str, function: Callable[..., Any], args: tuple) -> None:
    torch.cuda.set_device(rank)
    torch.manual_seed(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    environ = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    function(RankContext.start("cuda", environ), *args)
    torch.cuda.synchronize()
    dist.destroy_process_group()
