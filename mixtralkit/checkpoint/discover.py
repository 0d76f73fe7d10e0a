"""Which format a folder holds, found by looking."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.layout import RankLayout
from mixtralkit.planning.plan import ExpertPlan

OURS_JSON = "checkpoint.json"
OURS_VERSION = 1

_KINDS = {
    "one-file or sharded .pth": r"consolidated\.(\d+)\.pth",
    "sharded .pt": r"consolidated\.(\d+)\.pt",
    "byte splits of one .pth": r"consolidated\.00\.pth-split(\d+)",
    "Mistral safetensors": r"consolidated(?:\.(\d+))?\.safetensors",
    "Hugging Face, one file": r"model\.safetensors",
    "Hugging Face, sharded": r"model-(\d+)-of-\d+\.safetensors",
    "mixtralkit": r"rank-(\d+)-of-\d+\.safetensors",
}


@dataclass(frozen=True)
class Found:
    """A checkpoint folder: its kind, model, and files in order; ``layouts`` of the ranks in our own format."""

    folder: Path
    kind: str
    config: ModelConfig
    files: tuple[tuple[Path, ...], ...]
    layouts: tuple[RankLayout, ...] = ()


def recognise(folder: str | Path) -> Found:
    """Looks at the names in ``folder`` and reads its model parameters.

    ValueError, in one sentence, for a folder that is missing, holds none or several checkpoints, or lacks a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    found = checkpoint_files(folder)
    if not found:
        held = sorted(path.name for path in folder.iterdir())
        raise ValueError(
            f"{folder}: holds no checkpoint (consolidated.*.pth, consolidated.safetensors, model*.safetensors, "
            f"{OURS_JSON}); it holds {_some(held) or 'nothing'}"
        )
    if len(found) > 1:
        listed = "; ".join(f"{kind}: {_some([path.name for path in paths])}" for kind, paths in found.items())
        raise ValueError(f"{folder}: holds several checkpoints, keep one: {listed}")
    ((kind, paths),) = found.items()
    _check_numbers(folder, kind, paths)
    if kind == "mixtralkit":
        return _ours(folder, paths)
    config = ModelConfig.from_file(_parameters_file(folder, kind))
    files = (tuple(paths),) if "splits" in kind else tuple((path,) for path in paths)
    return Found(folder, kind, config, files)


def checkpoint_files(folder: Path) -> dict[str, list[Path]]:
    """The weight files of ``folder`` by kind, each in the order of their numbers."""
    found: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        for kind, pattern in _KINDS.items():
            if re.fullmatch(pattern, path.name):
                found.setdefault(kind, []).append(path)
    if (folder / OURS_JSON).exists():
        found.setdefault("mixtralkit", [])
    return {kind: sorted(found[kind], key=lambda path: _number(kind, path)) for kind in _KINDS if kind in found}


def _number(kind: str, path: Path) -> int:
    """The number in a file's name, 0 for the name without one."""
    match = re.fullmatch(_KINDS[kind], path.name)
    return int(match.group(1) or 0) if match.groups() else 0


def _check_numbers(folder: Path, kind: str, paths: Sequence[Path]) -> None:
    """A hole in the numbering is a lost file; Hugging Face's index names the files instead."""
    if kind.startswith("Hugging Face"):
        wanted = _hugging_face_files(folder, paths)
        missing = sorted(wanted - {path.name for path in paths})
        if missing:
            raise ValueError(f"{folder}: lacks {_some(missing)}, which its index or its other files name")
        return
    numbers = [_number(kind, path) for path in paths]
    if numbers != list(range(len(paths))):
        raise ValueError(
            f"{folder}: {kind}: files must be numbered 0 … {len(paths) - 1} without a gap, "
            f"found {', '.join(map(str, numbers))}"
        )


def _hugging_face_files(folder: Path, paths: Sequence[Path]) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        if not isinstance(content.get("weight_map"), dict):
            raise ValueError(f"{index}: lacks weight_map, the file of each tensor")
        return set(map(str, content["weight_map"].values()))
    counts = {m.group(1) for m in (re.search(r"-of-(\d+)", path.name) for path in paths) if m}
    return {f"model-{i:05d}-of-{count}.safetensors" for count in counts for i in range(1, int(count) + 1)}


def _parameters_file(folder: Path, kind: str) -> Path:
    names = ("config.json",) if kind.startswith("Hugging Face") else ("params.json", "config.json")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: lacks {names[0]}, the parameters of the model")


def _ours(folder: Path, paths: Sequence[Path]) -> Found:
    path = folder / OURS_JSON
    content = read_json(path)
    try:
        if content["version"] != OURS_VERSION:
            raise ValueError(f"version ({content['version']!r}) must be {OURS_VERSION}")
        config = ModelConfig.from_dict(content["config"])
        parallel = ParallelConfig(**content["parallel"])
        plan = ExpertPlan.from_dict(content["plan"])
        layouts = tuple(RankLayout(config, parallel, plan, rank) for rank in range(plan.world_size))
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(paths) != len(layouts):
        raise ValueError(f"{folder}: {OURS_JSON} is for {len(layouts)} ranks, found {len(paths)} rank files")
    return Found(folder, "mixtralkit", config, tuple((path,) for path in paths), layouts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError that names the file for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(content).__name__}")
    return content


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
