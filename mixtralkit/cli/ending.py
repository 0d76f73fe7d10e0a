"""How a command ends that cannot go on: one sentence and a code."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import typing

from mixtralkit.config.ranks import rank_of

# Ranks other than 0 leave the first word to rank 0 this long (seconds); torchrun ends them as soon as it has spoken.
_DEFERENCE_S = 3.0
_LONGEST = 3000  # characters of an error; some tool's may hold a whole file
_LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|NCCL.*(?:abort|remote)", re.I
)


def describe(error: BaseException) -> str:
    """The error as one line for a person."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, RuntimeError) and _LOST_PEER.search(text):
        return "another rank ended (killed or crashed), so this one stops too; its own message says why, if it had time"
    return text[:_LONGEST] + "…" * (len(text) > _LONGEST) or type(error).__name__


def end(sentence: str, code: int) -> typing.NoReturn:
    """Ends the process with a sentence on stderr; ranks other than 0 only where rank 0 does not."""
    rank = speaker()
    if rank:
        time.sleep(_DEFERENCE_S)
        sentence = f"rank {rank}: {sentence}"
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    # Threads and groups of a broken run may never end by themselves.
    os._exit(code)


def speaker() -> int:
    """This process's rank, 0 where the environment does not say."""
    with contextlib.suppress(ValueError):
        return rank_of()
    return 0
