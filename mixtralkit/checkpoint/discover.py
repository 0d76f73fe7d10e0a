"""Which format a folder holds, found by looking."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from mixtralkit.checkpoint.files import ByteFile
from mixtralkit.checkpoint.foreign import METHODS, Method, method_of
from mixtralkit.checkpoint.gguf import GgufBlocks, model_of
from mixtralkit.checkpoint.quantised import STATED_IN, method_of_files, refusal
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.json_file import conform, load_json, read_as, shown
from mixtralkit.layout import RankLayout
from mixtralkit.moe.weights import PLAIN, ExpertWeights, parse_weights
from mixtralkit.planning.plan import ExpertPlan, Words

OURS_JSON = "checkpoint.json"
OURS_VERSION = 1

SHARDED_PTH = "one-file or sharded .pth"
GGUF = "GGUF"
_KINDS = {
    SHARDED_PTH: r"consolidated\.(\d+)\.pth",
    "sharded .pt": r"consolidated\.(\d+)\.pt",
    "byte splits of one .pth": r"consolidated\.00\.pth-split(\d+)",
    "Mistral safetensors": r"consolidated(?:\.(\d+))?\.safetensors",
    "Hugging Face, one file": r"model\.safetensors",
    "Hugging Face, sharded": r"model-(\d+)-of-\d+\.safetensors",
    "mixtralkit": r"rank-(\d+)-of-\d+\.safetensors",
    GGUF: r".+?(?:-(\d+)-of-\d+)?\.gguf",
}
INDEX_JSON = "model.safetensors.index.json"
_INDEXED = "Hugging Face, sharded"

# What ``format`` calls the kinds, the same as the writer's formats; those that differ only inside share one.
_FORMAT_OF = {
    SHARDED_PTH: "mistral", "sharded .pt": "mistral-stacked", "byte splits of one .pth": "mistral-split",
    "Mistral safetensors": "mistral-safetensors", "Hugging Face, one file": "hf", "Hugging Face, sharded": "hf",
    "mixtralkit": "mixtralkit", GGUF: "gguf",
}  # fmt: skip
_SAME_FORMAT = {"mistral-shards": "mistral", "mistral-expert-shards": "mistral", "hf-packed": "hf"}


@dataclass(frozen=True)
class Found:
    """A checkpoint folder: its kind, model, and files in order; ``layouts`` of the ranks in our own format.

    ``parameters`` is the JSON file that the model was read from. ``weight_map`` is the index of a Hugging Face folder:
    the file of each tensor. ``method`` is how others quantised it. ``alone`` is of a file that was given and not its
    folder: what lies beside it is not its.
    """

    folder: Path
    kind: str
    config: ModelConfig
    files: tuple[tuple[Path, ...], ...]
    parameters: Path
    layouts: tuple[RankLayout, ...] = ()
    weight_map: Mapping[str, str] = field(default_factory=dict)
    method: Method | None = None
    alone: bool = False

    @property
    def weights(self) -> ExpertWeights:
        """The format of the experts in our own files, or of those for which ``precision`` has none."""
        return self.layouts[0].weights if self.layouts else PLAIN

    @property
    def attention_weights(self) -> ExpertWeights:
        """The format of attention and output in our own files."""
        return self.layouts[0].attention_weights if self.layouts else PLAIN

    @property
    def precision(self) -> Words | None:
        """The formats of the experts, as ``ExpertPlan.precision`` has them, where there are several."""
        several = self.layouts and len(self.layouts[0].formats) > 1
        return self.layouts[0].plan.precision if several else None


def recognise(folder: str | Path, format: str | None = None) -> Found:
    """Looks at the names in ``folder`` and reads its model parameters.

    Args:
        folder: or one ``.gguf`` file, which may be a part of several.
        format: which checkpoint to take where the folder holds several, as the writer's formats are called.

    ValueError, in one sentence, for a folder that is missing, holds none or several checkpoints, or lacks a file.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        _, paths = _choose(folder, {GGUF: _parts_of(folder)}, format)
        return replace(_gguf(folder.parent, paths), alone=True)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    found = checkpoint_files(folder)
    weight_map = _weight_map(folder)
    if weight_map:
        found = _as_indexed(folder, found, weight_map)
    if not found:
        held = sorted(path.name for path in folder.iterdir())
        method = method_of_files(held)
        if method:
            raise ValueError(f"{folder}: {refusal(method)}")
        raise ValueError(
            f"{folder}: holds no checkpoint (consolidated.*.pth, consolidated.safetensors, model*.safetensors, *.gguf, "
            f"{INDEX_JSON}, {OURS_JSON}); it holds {_some(held) or 'nothing'}"
        )
    kind, paths = _choose(folder, found, format)
    if kind == GGUF:
        return _gguf(folder, paths)
    _check_numbers(folder, kind, paths, weight_map)
    if kind == "mixtralkit":
        return _ours(folder, paths)
    parameters = _parameters_file(folder, kind)
    config, method = load_json(parameters, _model_of)
    method = method or _stated_beside(folder)
    files = (tuple(paths),) if "splits" in kind else tuple((path,) for path in paths)
    weight_map = weight_map if kind == _INDEXED else {}
    return Found(folder, kind, config, files, parameters, weight_map=weight_map, method=method)


def _choose(folder: Path, found: Mapping[str, list[Path]], format: str | None) -> tuple[str, list[Path]]:
    """The one kind that there is, or that ``format`` names."""
    if format is not None:
        wanted = _SAME_FORMAT.get(format, format)
        if wanted not in _FORMAT_OF.values():
            names = dict.fromkeys((*_FORMAT_OF.values(), *_SAME_FORMAT))
            raise ValueError(f"format ({format!r}) must be one of {', '.join(names)}")
        chosen = {kind: paths for kind, paths in found.items() if _FORMAT_OF[kind] == wanted}
        if not chosen:
            held = ", ".join(dict.fromkeys(_FORMAT_OF[kind] for kind in found))
            raise ValueError(f"{folder}: holds no checkpoint of format {format!r}; it holds {held}")
        found = chosen
    if len(found) > 1:
        listed = "; ".join(f"{kind}: {_some([path.name for path in paths])}" for kind, paths in found.items())
        formats = list(dict.fromkeys(_FORMAT_OF[kind] for kind in found))
        how = f"choose a format ({', '.join(formats)})" if len(formats) > 1 else "keep one"
        raise ValueError(f"{folder}: holds several checkpoints, {how}: {listed}")
    ((kind, paths),) = found.items()
    return kind, paths


def checkpoint_files(folder: Path) -> dict[str, list[Path]]:
    """The weight files of ``folder`` by kind, each in the order of their numbers."""
    found: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        for kind, pattern in _KINDS.items():
            if re.fullmatch(pattern, path.name, re.ASCII):
                found.setdefault(kind, []).append(path)
    if (folder / OURS_JSON).exists():
        found.setdefault("mixtralkit", [])
    return {kind: sorted(found[kind], key=lambda path: _number(kind, path)) for kind in _KINDS if kind in found}


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor as Hugging Face's index says; empty where there is none."""
    index = folder / INDEX_JSON
    if not index.exists():
        return {}
    weight_map = read_as(index, _Index).weight_map
    if not weight_map:
        raise ValueError(f"{index}: weight_map is empty")
    for name, file in weight_map.items():
        if file != Path(file).name or file in ("", ".", ".."):
            raise ValueError(f"{index}: weight_map: {name} is in {shown(file)}, which is no file of this folder")
    return weight_map


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _as_indexed(folder: Path, found: Mapping[str, list[Path]], weight_map: Mapping[str, str]) -> dict[str, list[Path]]:
    """Of the weight files those that the index names, and these whatever their names; mentions the others."""
    named = [folder / name for name in dict.fromkeys(weight_map.values())]
    others = {kind: [p for p in paths if p not in named] for kind, paths in found.items()}
    unread = [p.name for p in folder.glob("*.safetensors") if p not in named and not _is_foreign(p, others)]
    if unread:
        warnings.warn(f"{folder}: not read, for {INDEX_JSON} does not name them: {_some(sorted(unread))}", stacklevel=4)
    kept = {kind: paths for kind, paths in others.items() if paths and not kind.startswith("Hugging Face")}
    return {**kept, _INDEXED: named}


def _is_foreign(path: Path, found: Mapping[str, list[Path]]) -> bool:
    return any(path in paths for kind, paths in found.items() if not kind.startswith("Hugging Face"))


def _number(kind: str, path: Path) -> int:
    """The number in a file's name, 0 for the name without one."""
    match = re.fullmatch(_KINDS[kind], path.name, re.ASCII)
    return int(match.group(1) or 0) if match and match.groups() else 0


def _check_numbers(folder: Path, kind: str, paths: Sequence[Path], weight_map: Mapping[str, str]) -> None:
    """A hole in the numbering is a lost file; Hugging Face's index names the files instead."""
    if weight_map and kind == _INDEXED:
        missing = sorted(path.name for path in paths if not path.exists())
        if missing:
            raise ValueError(f"{folder}: lacks {_some(missing)}, which {INDEX_JSON} names")
        return
    if kind.startswith("Hugging Face"):
        _check_shards(folder, paths)
        return
    numbers = [_number(kind, path) for path in paths]
    if numbers != list(range(len(paths))):
        raise ValueError(
            f"{folder}: {kind}: files must be numbered 0 … {len(paths) - 1} without a gap, "
            f"found {_some(list(map(str, numbers)))}"
        )


def _check_shards(folder: Path, paths: Sequence[Path]) -> None:
    """Shards without an index are all of one save."""
    counts = {match.group(1) for match in (re.search(r"-of-(\d+)", path.name) for path in paths) if match}
    if len(counts) > 1:
        raise ValueError(
            f"{folder}: holds shards of several saves ({_some(sorted(path.name for path in paths))}) and no "
            f"{INDEX_JSON} that says which to read"
        )
    names = {path.name for path in paths}
    for count in counts:
        expected = (f"model-{i:05d}-of-{count}.safetensors" for i in range(1, min(int(count), len(paths) + 8) + 1))
        missing = [name for name in expected if name not in names]
        if missing or int(count) != len(paths):
            lost = int(count) - len(paths)
            raise ValueError(f"{folder}: lacks {_some(missing[:lost] or missing)}, which its other files name")


def _check_gguf(folder: Path, paths: Sequence[Path]) -> None:
    """One file, or all parts of one model."""
    models = {re.sub(r"-\d+(-of-\d+\.gguf)$", r"\1", path.name) for path in paths}
    if len(models) > 1:
        raise ValueError(f"{folder}: holds several models, keep one: {_some([path.name for path in paths])}")
    parts = re.search(r"-of-(\d+)\.gguf$", paths[0].name)
    count, numbers = int(parts.group(1)) if parts else 1, [_number(GGUF, path) for path in paths]
    if parts and numbers != list(range(1, count + 1)):
        raise ValueError(
            f"{folder}: lacks parts of {models.pop()}: it has those numbered {_some(list(map(str, numbers)))}"
        )


def _gguf(folder: Path, paths: Sequence[Path]) -> Found:
    _check_gguf(folder, paths)
    file = ByteFile(paths[:1])
    try:
        config = model_of(file)
    finally:
        file.close()
    return Found(folder, GGUF, config, tuple((path,) for path in paths), paths[0], method=GgufBlocks())


def _parts_of(path: Path) -> list[Path]:
    """All parts of the model that a file is of, in order."""
    match = re.fullmatch(r"(.+)-\d+-of-(\d+)\.gguf", path.name, re.ASCII)
    if match is None:
        return [path]
    name = re.compile(rf"{re.escape(match[1])}-(\d+)-of-{match[2]}\.gguf", re.ASCII)
    found = {int(part[1]): other for other in path.parent.iterdir() if (part := name.fullmatch(other.name))}
    return [found[number] for number in sorted(found)]


def _model_of(params: Any) -> tuple[ModelConfig, Method | None]:
    method = method_of(params) if isinstance(params, Mapping) else None
    return ModelConfig.from_dict({k: v for k, v in params.items() if k not in STATED_IN} if method else params), method


def _stated_beside(folder: Path) -> Method | None:
    """What the writers of GPTQ and AWQ say in files of their own, where ``config.json`` says nothing."""
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / name).exists():
            return load_json(folder / name, lambda content, method=method: METHODS[method](conform(content, dict)))
    return None


def _parameters_file(folder: Path, kind: str) -> Path:
    names = ("config.json",) if kind.startswith("Hugging Face") else ("params.json", "config.json")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: lacks {names[0]}, the parameters of the model")


class _OursJson(msgspec.Struct):
    version: int
    config: dict[str, Any]
    parallel: dict[str, str]
    plan: dict[str, Any]
    quantize: str | None = None
    quantize_attention: str | None = None


def _ours(folder: Path, paths: Sequence[Path]) -> Found:
    path = folder / OURS_JSON
    config, layouts = load_json(path, _layouts)
    if len(paths) != len(layouts):
        raise ValueError(f"{folder}: {OURS_JSON} is for {len(layouts)} ranks, found {len(paths)} rank files")
    return Found(folder, "mixtralkit", config, tuple((path,) for path in paths), path, layouts)


def _layouts(content: Any) -> tuple[ModelConfig, tuple[RankLayout, ...]]:
    """The model and the ranks that a ``checkpoint.json`` says."""
    said = conform(content, _OursJson)
    if said.version != OURS_VERSION:
        raise ValueError(f"version ({said.version}) must be {OURS_VERSION}")
    config, plan = ModelConfig.from_dict(said.config), ExpertPlan.from_dict(said.plan)
    if set(said.parallel) - {"attention", "experts"}:
        raise ValueError(f"parallel ({shown(said.parallel)}) must have attention and experts")
    parallel = ParallelConfig(**said.parallel)
    plan.check_fits(config.n_layers, config.num_experts, plan.world_size)
    formats = parse_weights(said.quantize), parse_weights(said.quantize_attention, "quantize_attention")
    return config, tuple(RankLayout(config, parallel, plan, rank, *formats) for rank in range(plan.world_size))


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
