"""Runs a function on real ranks, one process each, with a time limit: a rank that fails ends the others."""

from __future__ import annotations

import contextlib
import io
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext
from tests import interpreter

interpreter.hasten()  # here, so that ranks are born with it
_PROCESSES = mp.get_context("forkserver")
# what ranks would import each for themselves, a second of a core and more; torch.testing wants the second in its first
# comparison
_PRELOADED = ["fairscale.nn.model_parallel", "torch.distributed.tensor", "hypothesis", "pytest", "tests.ranks"]
_PRELOADED += ["mixtralkit.mixtral", "mixtralkit.training.loop", "mixtralkit.cli.evaluate"]
_PROCESSES.set_forkserver_preload(_PRELOADED)


class RankError(AssertionError):
    """A rank raised, died or outlasted the limit; the text holds what it said."""


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Join = Callable[[int, int, str], RankContext]  # (rank, world size, path of the store)


def join_gloo(rank: int, world_size: int, store: str) -> RankContext:
    """Ranks on the CPU."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    return RankContext.start("cpu", {"RANK": str(rank), "WORLD_SIZE": str(world_size)})


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0, join: Join = join_gloo
) -> list[Any]:
    """Calls ``function(context, *args)`` on ``world_size`` ranks; returns their values in rank order.

    ``function`` and ``join``, which makes a rank's context, must be importable (top level of a test file); values and
    arguments travel by pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [_start(function, join, rank, world_size, store, args) for rank in range(world_size)]
        try:
            return _collect(ranks, timeout_s)
        finally:
            for process, connection in ranks:
                process.kill()
                process.join(10)  # a device that hangs may keep even a killed process
                connection.close()


def run_command(world_size: int, name: str, *words: object) -> list[Done]:
    """A command of ``mixtralkit`` on ranks as torchrun would start it, and how it ended on each."""
    return run_ranks(command_of_rank, world_size, name, tuple(map(str, words)))


def command_of_rank(context: RankContext, name: str, words: tuple[str, ...]) -> Done:
    """This rank's part of ``run_command``."""
    from mixtralkit.cli import COMMANDS
    from mixtralkit.cli.run import run_tool

    rank, world_size = str(context.rank), str(context.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    out, err, code = io.StringIO(), io.StringIO(), 0
    leave = mock.patch.object(os, "_exit", side_effect=SystemExit)
    with leave as left, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_tool(COMMANDS, None, {"m": "model", "t": "tokenizer"}, [name, *words], "mixtralkit")
        except SystemExit as end:
            code = left.call_args.args[0] if left.called else end.code
    return Done(code, out.getvalue(), err.getvalue())


def _start(function, join: Join, rank: int, world_size: int, store: str, args: tuple) -> tuple[Any, Connection]:
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    given = (function, join, rank, world_size, store, theirs, args)
    process = _PROCESSES.Process(target=_rank_main, args=given, daemon=True)
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


def _rank_main(
    function, join: Join, rank: int, world_size: int, store: str, connection: Connection, args: tuple
) -> None:
    torch.set_num_threads(1)
    error, value = None, None
    try:
        context = join(rank, world_size, store)
        value = function(context, *args)
        if context.device.type == "cuda":
            torch.cuda.synchronize()  # kernels that failed say so here
        context.barrier()
    except BaseException:
        error = traceback.format_exc()
    connection.send_bytes(
        pickle.dumps((error, value))
    )  # by value: torch's own pickling shares memory with the dying rank
    connection.close()
