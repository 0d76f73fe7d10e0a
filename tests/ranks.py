"""Runs a function on real gloo ranks, one process each, with a time limit: a rank that fails ends the others."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext

_PROCESSES = mp.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "torch.distributed", "fairscale.nn.model_parallel", "tests.ranks"])


class RankError(AssertionError):
    """A rank raised, died or outlasted the limit; the text holds what it said."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Calls ``function(context, *args)`` on ``world_size`` ranks; returns their values in rank order.

    ``function`` must be importable (top level of a test file); values and arguments travel by pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [_start(function, rank, world_size, store, args) for rank in range(world_size)]
        try:
            return _collect(ranks, timeout_s)
        finally:
            for process, connection in ranks:
                process.kill()
                process.join()
                connection.close()


def _start(function, rank: int, world_size: int, store: str, args: tuple) -> tuple[Any, Connection]:
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_rank_main, args=(function, rank, world_size, store, theirs, args), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _collect(ranks: list[tuple[Any, Connection]], timeout_s: float) -> list[Any]:
    end = time.monotonic() + timeout_s
    values: dict[int, Any] = {}
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} did not end within {timeout_s:g} s")
        failures = []
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                error, values[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                ranks[rank][0].join(5)
                error = f"died with exit code {ranks[rank][0].exitcode}"
            if error:
                failures.append(f"rank {rank}: {error}")
        if failures:
            raise RankError("\n".join(failures))
    return [values[rank] for rank in range(len(ranks))]


def _rank_main(function, rank: int, world_size: int, store: str, connection: Connection, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    error, value = None, None
    try:
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        context = RankContext.start("cpu", {"RANK": str(rank), "WORLD_SIZE": str(world_size)})
        value = function(context, *args)
        context.barrier()
    except BaseException:
        error = traceback.format_exc()
    connection.send_bytes(
        pickle.dumps((error, value))
    )  # by value: torch's own pickling shares memory with the dying rank
    connection.close()
