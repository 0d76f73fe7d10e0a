"""What a run keeps on disk: a folder a save, complete or not there at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.json_file import check_ordinary

STATE_KEYS = {"step", "total_steps", "settings", "parameters", "optimizer"}
_FOLDER = re.compile(r"step-(\d+)")


def save_state(folder: Path, step: int, state: dict[str, Any], context: RankContext) -> None:
    """Writes every rank's ``state`` under ``folder/step-N`` and removes older saves; collective.

    The ranks write into a folder with another name, which is renamed when all are done: a run that is ended in the
    middle leaves the save before it.
    """
    target, partial = folder / f"step-{step:07d}", folder / f"partial-{step:07d}"
    with context.agreed():
        partial.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial / _rank_file(context))
    with context.agreed():
        if context.is_first:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in folder.iterdir():
                if old != target and old.is_dir() and (_FOLDER.fullmatch(old.name) or old.name.startswith("partial-")):
                    shutil.rmtree(old)


def load_state(folder: Path, context: RankContext) -> dict[str, Any] | None:
    """This rank's part of the newest save under ``folder``; None when there is none. Collective."""
    saves = sorted(path for path in folder.glob("step-*") if _FOLDER.fullmatch(path.name))
    newest = context.broadcast_object(saves[-1] if saves else None)
    if newest is None:
        return None
    with context.agreed():
        ranks = len(list(newest.glob("rank-*.pt")))
        if ranks != context.world_size:
            raise ValueError(f"{newest}: saved by {ranks} ranks; resume with as many, not {context.world_size}")
        return _checked(newest / _rank_file(context), context.device)


def _checked(path: Path, device: torch.device) -> dict[str, Any]:
    """What ``save_state`` wrote; ValueError that names the file for anything else."""
    check_ordinary(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # what torch raises for a file that is no archive differs by version
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise ValueError(f"{path}: is no saved state ({reason})") from None
    if not isinstance(state, dict) or set(state) != STATE_KEYS:
        raise ValueError(f"{path}: is no saved state; it must have {', '.join(sorted(STATE_KEYS))}")
    return state


def _rank_file(context: RankContext) -> str:
    return f"rank-{context.rank}.pt"
