"""What other systems record of routing: SGLang's expert recorder and TensorRT-LLM's expert statistic.

===========================  ==========================================================================================
file                         content
===========================  ==========================================================================================
SGLang ``stat``              ``logical_count`` [steps, L, E] or [L, E]; ``.pt``, or the same in ``.json``
SGLang ``per_pass``, ``.pt``  ``records`` with ``global_physical_count`` [L, P], ``last_physical_to_logical_map`` [L, P]
SGLang ``per_token``, ``.pt``  ``records`` with ``topk_ids_of_layer`` [L, T, 8] of physical experts and ``positions``
TensorRT-LLM, a folder       ``meta_info.json``, ``rank*.safetensors`` with counts [E] named ``iteration_layer``
===========================  ==========================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mixtralkit.config.model import check_experts
from mixtralkit.json_file import Positive, check_ordinary, read_as, read_bytes, read_object, shown
from mixtralkit.planning.torch_file import parse_torch

SUFFIXES = (".pt", ".pth", ".json")
_MOST_BYTES = 4 << 30
_MOST_EXPERTS, _MOST_LOAD = 32768, 1e18


@dataclass(frozen=True)
class Recording:
    """Loads float64 [L, E]; where the file tells tokens apart also int64 ids [T, L, K], sequence and position [T]."""

    loads_LE: np.ndarray
    experts_TLK: np.ndarray | None = None
    sequence_T: np.ndarray | None = None
    position_T: np.ndarray | None = None


def is_recording(path: str | Path) -> bool:
    """Whether ``read_recording`` and not ``RoutingTrace`` has the reader for it, by its name."""
    path = Path(path)
    return path.is_dir() or path.suffix in SUFFIXES


def read_recording(path: str | Path) -> Recording:
    """Reads any of the table above; ValueError says what is wrong, without the path."""
    path = Path(path)
    if path.is_dir():
        return _tensorrt(path)
    content = read_object(path) if path.suffix == ".json" else _torch_content(path)
    if "records" in content:
        return _records(content)
    if "logical_count" not in content:
        raise ValueError(f"has neither logical_count nor records of SGLang's recorder, but {shown(list(content))}")
    return Recording(_loads(content["logical_count"], "logical_count"))


def _torch_content(path: Path) -> Mapping[str, Any]:
    content = parse_torch(read_bytes(path, _MOST_BYTES))
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"holds a {type(content).__name__}, not what a recorder writes")
    return content


def _array(value: Any, name: str, dimensions: Sequence[int]) -> np.ndarray:
    """A tensor or nested lists of finite numbers as an array of one of these numbers of dimensions."""
    try:
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    except (ValueError, TypeError, OverflowError):
        array = np.array(None)
    if array.ndim not in dimensions or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers of {' or '.join(map(str, dimensions))} dimensions")
    return array


def _loads(count: Any, name: str) -> np.ndarray:
    count = _array(count, f"{name} [steps, layers, experts]", (2, 3)).astype(np.float64)
    if 0 in count.shape or (count < 0).any():
        raise ValueError(f"{name} (shape {count.shape}) must be numbers of at least 0")
    check_experts(*count.shape[-2:])
    if (count > _MOST_LOAD).any():
        raise ValueError(f"{name} ({count.max():g}) must be at most {_MOST_LOAD:g}")
    return count.reshape(-1, *count.shape[-2:]).sum(0)


def _records(content: Mapping[str, Any]) -> Recording:
    logical_LP = _array(content.get("last_physical_to_logical_map"), "last_physical_to_logical_map", (2,))
    records = content["records"]
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records) or not records:
        raise ValueError("records must be a list of at least one object")
    if not np.issubdtype(logical_LP.dtype, np.integer) or not 0 <= logical_LP.min() <= logical_LP.max() < _MOST_EXPERTS:
        raise ValueError("last_physical_to_logical_map must be expert ids")
    if "topk_ids_of_layer" in records[0]:
        return _per_token(records, logical_LP)
    physical = [_array(r.get("global_physical_count"), "global_physical_count", (2,)) for r in records]
    if any(one.shape != logical_LP.shape for one in physical):
        raise ValueError(f"global_physical_count must be of last_physical_to_logical_map's shape {logical_LP.shape}")
    loads_LE = np.zeros((len(logical_LP), int(logical_LP.max()) + 1))
    np.add.at(loads_LE, (np.arange(len(logical_LP))[:, None], logical_LP), np.sum(physical, axis=0))
    return Recording(_loads(loads_LE, "global_physical_count"))


def _per_token(records: Sequence[Mapping[str, Any]], logical_LP: np.ndarray) -> Recording:
    passes = [_array(r.get("topk_ids_of_layer"), "topk_ids_of_layer", (3,)) for r in records]
    layers = len(logical_LP)
    if any(len(one) != layers or one.shape[2] != passes[0].shape[2] for one in passes):
        raise ValueError(f"topk_ids_of_layer must be [{layers} layers, tokens, top_k] in every record")
    ids_LTK = np.concatenate(passes, axis=1).astype(np.int64)
    columns = np.concatenate([_places(r, p.shape[1], i) for i, (r, p) in enumerate(zip(records, passes, strict=True))])
    used = (ids_LTK > 0).any(axis=(0, 1))  # the recorder has room for eight choices; what is over is 0
    ids_LTK = ids_LTK[:, :, : int(used.nonzero()[0].max(initial=0)) + 1]
    if ids_LTK.min(initial=0) < -1 or ids_LTK.max(initial=0) >= logical_LP.shape[1]:
        raise ValueError(f"topk_ids_of_layer must be physical expert ids below {logical_LP.shape[1]}, or -1")
    real_T = (ids_LTK >= 0).all(axis=(0, 2))  # -1 fills a batch up
    experts_LTK = logical_LP[np.arange(layers)[:, None, None], ids_LTK[:, real_T]]
    num_experts = int(logical_LP.max()) + 1
    loads_LE = np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in experts_LTK])
    _, sequence_T = np.unique(columns[real_T, :2], axis=0, return_inverse=True)
    return Recording(loads_LE.astype(np.float64), experts_LTK.swapaxes(0, 1), sequence_T.ravel(), columns[real_T, 2])


def _places(record: Mapping[str, Any], tokens: int, index: int) -> np.ndarray:
    """int64 [T, 3]: pass and place of each token's sequence in it, and its position. What a decode step continues is
    not recorded, so its tokens are sequences of their own."""
    position_T = _array(record.get("positions", list(range(tokens))), "positions", (1,)).astype(np.int64)
    lengths = record.get("extend_seq_lens") or [1] * tokens
    lengths = _array(lengths, "extend_seq_lens", (1,)).astype(np.int64)
    if len(position_T) != tokens or lengths.sum() != tokens or (lengths < 0).any():
        raise ValueError(f"record {index}: positions and extend_seq_lens must be of its {tokens} tokens")
    place_T = np.repeat(np.arange(len(lengths)), lengths)
    return np.stack([np.full(tokens, index), place_T, position_T], axis=1)


class _MetaInfo(msgspec.Struct):
    num_experts: Positive
    num_experts_per_token: Positive | None = None


def _tensorrt(folder: Path) -> Recording:
    from safetensors import SafetensorError, safe_open

    paths = sorted(path for path in folder.glob("rank*.safetensors") if re.fullmatch(r"rank\d+", path.stem, re.ASCII))
    if not (folder / "meta_info.json").exists() or not paths:
        raise ValueError("is a folder without meta_info.json and rank*.safetensors of TensorRT-LLM's expert statistic")
    experts = read_as(folder / "meta_info.json", _MetaInfo).num_experts
    sums: dict[int, np.ndarray] = {}
    for path in paths:
        check_ordinary(path)
        try:
            with safe_open(path, "np") as file:
                counts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path.name}: cannot be read ({str(error).splitlines()[0]})") from None
        for name, count in counts.items():
            match = re.fullmatch(r"(\d{1,9})_(\d{1,4})", name, re.ASCII)
            if match is None or count.shape != (experts,) or count.dtype.kind not in "iuf":
                raise ValueError(f"{path.name}: {shown(name)} must be iteration_layer with {experts} counts")
            sums[int(match[2])] = sums.get(int(match[2]), 0) + count.astype(np.float64)
    if not sums:
        raise ValueError("has no counts")
    return Recording(_loads([sums[layer] for layer in sorted(sums)], "counts"))
