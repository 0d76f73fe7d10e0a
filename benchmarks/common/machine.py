"""What a result must say about where it comes from: date, versions, commit, cores, devices. No names of hosts."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from mixtralkit.distributed import RankContext


def describe_run(context: RankContext) -> dict[str, object]:
    """Date, command, commit, versions and machine, as values for JSON."""
    found = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(Path(word).name if "/" in word else word for word in sys.argv),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": context.world_size,
        "cores": os.cpu_count(),
    }
    if context.device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(context.device), "cuda": torch.version.cuda}
    return found


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return done.stdout.strip() or None
