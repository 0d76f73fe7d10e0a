"""Expert plans as others write them: SGLang, TensorRT-LLM, vLLM and ExFlow.

==============  ======================================================================================================
format          content
==============  ======================================================================================================
``plan``        ours, ``plan.json`` (``ExpertPlan.save``); the only one that holds capacities, precision, tiers,
                nodes and notes
``sglang``      ``physical_to_logical_map`` [L, slots of all ranks], rank after rank; JSON, or a dict in a ``.pt``
``tensorrt``    YAML: ``num_slots``, ``initial_global_assignments`` {layer: [slots of all ranks], rank after rank}, at
                the top or as ``load_balancer`` of ``moe_config``
``vllm-ascend`` expert map, JSON: ``layer_list`` of ``device_list`` of ``device_expert`` [slots of the rank]
``exflow``      CSV ``Expert,Node``: the one rank of expert ``layer · num_experts + e``
==============  ======================================================================================================
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixtralkit.json_file import check_finite, naming, parse_json, read_bytes, shown
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.torch_file import parse_torch
from mixtralkit.whole_file import writing

MOST_BYTES, MOST_YAML_BYTES = 256 << 20, 16 << 20
_OTHER_NAMES = {"vllm": "vllm-ascend", "tensorrt_llm": "tensorrt", "mixtralkit": "plan"}

Slots = list[list[list[int]]]  # [L][W][slots of that rank]


class _Sizes(NamedTuple):
    """What a file may leave open."""

    num_experts: int | None
    world_size: int | None

    def need(self, name: str, why: str) -> int:
        value = getattr(self, name)
        if value is None or value < 1:
            raise ValueError(f"{name} ({value}) must be given and at least 1: {why}")
        return value


class _Read(NamedTuple):
    """Slots as they stand in a file, how many experts it speaks of, and the numbers it gives its layers."""

    slots: Slots
    num_experts: int
    layer_ids: list[int]


def load_plan(
    path: str | Path, format: str | None = None, *, num_experts: int | None = None, world_size: int | None = None
) -> ExpertPlan:
    """Reads a plan of any format of the table above.

    Layers are numbered from 0 in the order of the file's numbers, which are kept in ``meta["layer_ids"]`` where they
    differ.

    Args:
        format: name of the format; None recognises it by content.
        num_experts: E; ``exflow`` needs it, the others take it for the largest id + 1 when it is not given.
        world_size: W; ``sglang`` and ``tensorrt`` need it, for the others it must be what the file says.

    Raises:
        ValueError: naming the file and what is wrong with it. Foreign formats may have an expert twice on one rank,
            as EPLB gives: the second changes no result and is left out, and a warning counts them.
    """
    with naming(path):
        content = _inside(_parse(Path(path)))
        found = _recognise(content)
        format = _OTHER_NAMES.get(format, format)
        if format is not None and format not in FORMATS:
            raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
        if format is not None and format != found:
            raise ValueError(f"format ({format!r}) is not what the file holds ({found})")
        return _to_plan(found, content, _Sizes(num_experts, world_size))


def save_plan(plan: ExpertPlan, path: str | Path, format: str = "plan") -> None:
    """Writes ``plan`` as ``format``; ``sglang`` as a torch file where the path ends in ``.pt``.

    Foreign formats hold who has which expert and nothing else: policy, nodes, tiers and notes are left out. ValueError
    for what would change the result: a capacity or precision; slots that are unequal or empty; in ``exflow`` a replica.
    """
    format = _OTHER_NAMES.get(format, format)
    if format not in FORMATS:
        raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
    if format == "plan":
        plan.save(path)
        return
    if plan.cold_capacity_factor is not None:
        raise ValueError(f"cold_capacity_factor ({plan.cold_capacity_factor}) cannot be written as {format}")
    if plan.precision is not None:
        raise ValueError(f"precision ({plan.notes()[0].partition(': ')[2]}) cannot be written as {format}")
    content = FORMATS[format].write(plan)
    if format == "sglang" and Path(path).suffix == ".pt":
        import torch

        with writing(path) as unfinished:
            torch.save({key: torch.tensor(value) for key, value in content.items()}, unfinished)
        return
    with writing(path) as unfinished:
        unfinished.write_text(content if isinstance(content, str) else json.dumps(content) + "\n", encoding="utf-8")


def _parse(path: Path) -> Any:
    """What the file holds: an object of JSON, YAML or torch, or the text of a CSV."""
    raw = read_bytes(path, MOST_BYTES)
    if raw.startswith(b"PK") or path.suffix == ".pt":
        return _parse_torch(raw)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is neither text nor a torch file") from None
    if text.lstrip().lower().startswith("expert,node"):
        return text
    if path.suffix == ".json" or text.lstrip().startswith(("{", "[")):
        try:
            return parse_json(text)
        except ValueError:
            if path.suffix == ".json":
                raise
    return _parse_yaml(text)


def _parse_torch(raw: bytes) -> Any:
    content = parse_torch(raw)
    if not isinstance(content, Mapping):
        return None
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in content.items()}


def _parse_yaml(text: str) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if len(text) > MOST_YAML_BYTES:
            raise ValueError(f"has {len(text):,} characters, more than the {MOST_YAML_BYTES:,} that YAML may have")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise ValueError("has aliases (*name), which are not read: a few lines of them say a list of a billion")
        content = yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is neither JSON nor YAML ({' '.join(str(error).split())[:300]})") from None
    except (RecursionError, OverflowError, TypeError) as error:
        raise ValueError(f"is YAML that cannot be read ({type(error).__name__})") from None
    check_finite(content)
    return content


def _inside(content: Any) -> Any:
    """The plan itself, where TensorRT-LLM's options hold it: ``moe_config`` has a ``load_balancer``, a plan or its
    file."""
    for key in ("moe_config", "load_balancer", "moe_load_balancer"):
        inner = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(inner, str):
            raise ValueError(f"{key} names a file ({shown(inner)}); give that one")
        content = inner if isinstance(inner, Mapping) else content
    return content


def _recognise(content: Any) -> str:
    if isinstance(content, str) and "\n" in content:
        return "exflow"
    if isinstance(content, Mapping):
        for name, kind in FORMATS.items():
            if kind.key in content:
                return name
        if "logical_count" in content:
            raise ValueError("holds only logical_count: a record of loads, to plan from, not a plan")
        if "records" in content:
            raise ValueError("is a recording of SGLang: something to plan from, not a plan")
        if "num_slots" in content:
            raise ValueError("lacks initial_global_assignments: TensorRT-LLM's online balancing has no plan to read")
    raise ValueError(f"is no expert plan: knows {', '.join(FORMATS)}")


def _to_plan(format: str, content: Any, sizes: _Sizes) -> ExpertPlan:
    if format == "plan":
        plan = ExpertPlan.from_dict(content)
    else:
        read = FORMATS[format].read(content, sizes)
        meta = {"layer_ids": read.layer_ids} if read.layer_ids != list(range(len(read.slots))) else {}
        most = max((len(rank) for layer in read.slots for rank in layer), default=0)
        slots, twice = _without_repeats(read.slots)
        if twice:
            warnings.warn(f"{twice} replicas on a rank that holds their expert already are left out", stacklevel=4)
        filled = [[[*rank, *[-1] * (most - len(rank))] for rank in layer] for layer in slots]
        plan = ExpertPlan(np.array(filled), read.num_experts, policy=f"from {format}", meta=meta)
    for name, own, wanted in (
        ("num_experts", plan.num_experts, sizes.num_experts),
        ("world_size", plan.world_size, sizes.world_size),
    ):
        if wanted is not None and own != wanted:
            raise ValueError(f"{name} ({own}) must be {wanted}")
    return plan


def _without_repeats(slots: Slots) -> tuple[Slots, int]:
    """The slots without an expert's second replica on one rank, and how many these were."""
    kept = [[list(dict.fromkeys(rank)) for rank in layer] for layer in slots]
    count = sum(len(rank) for layer in slots for rank in layer)
    return kept, count - sum(len(rank) for layer in kept for rank in layer)


def _read_sglang(content: Mapping[str, Any], sizes: _Sizes) -> _Read:
    rows = _whole_numbers(content["physical_to_logical_map"], "physical_to_logical_map", 2)
    return _cut_rows(dict(enumerate(rows)), "physical_to_logical_map", sizes)


def _write_sglang(plan: ExpertPlan) -> dict[str, Any]:
    # SGLang passes every key on to a function that knows only this one.
    return {"physical_to_logical_map": [_joined(ranks) for ranks in _equal_slots(plan, "sglang")]}


def _read_tensorrt(content: Mapping[str, Any], sizes: _Sizes) -> _Read:
    name = "initial_global_assignments"
    if not isinstance(content[name], Mapping):
        raise ValueError(f"{name} must map layer numbers to lists")
    rows = {}
    for layer, row in content[name].items():
        if not str(layer).isdecimal():
            raise ValueError(f"{name}: layer ({shown(layer)}) must be a whole number")
        rows[int(layer)] = _whole_numbers(row, f"{name}[{layer}]", 1)
        if len(rows[int(layer)]) != content.get("num_slots"):
            raise ValueError(
                f"num_slots ({shown(content.get('num_slots'))}) must be the length of layer {layer}'s list"
            )
    return _cut_rows(rows, name, sizes)


def _write_tensorrt(plan: ExpertPlan) -> str:
    slots = _equal_slots(plan, "tensorrt")
    lines = ["initial_global_assignments:"]
    lines += [f"  {layer}: {_joined(ranks)}" for layer, ranks in zip(_layer_ids(plan), slots, strict=True)]
    return "\n".join([*lines, f"num_slots: {len(_joined(slots[0]))}", "layer_updates_per_iter: 0", ""])


def _read_vllm(content: Mapping[str, Any], sizes: _Sizes) -> _Read:
    slots: Slots = []
    layers = _numbered(content["layer_list"], "layer_list", "layer_id")
    for layer, entry in layers.items():
        devices = _numbered(entry.get("device_list"), f"layer {layer}: device_list", "device_id")
        count = entry.get("device_count", len(devices))
        if count != len(devices) or list(devices) != list(range(len(devices))):
            raise ValueError(
                f"layer {layer}: device_list has devices {shown(list(devices))} of device_count {shown(count)}"
            )
        where = f"layer {layer}: device_expert"
        slots.append([_whole_numbers(device.get("device_expert"), where, 1) for device in devices.values()])
    if content.get("moe_layer_count", len(slots)) != len(slots):
        raise ValueError(
            f"moe_layer_count ({shown(content['moe_layer_count'])}) must be the {len(slots)} of layer_list"
        )
    if len({len(ranks) for ranks in slots}) > 1:
        raise ValueError("layer_list: every layer must have the same number of devices")
    return _Read(slots, _experts_in(slots, sizes), list(layers))


def _write_vllm(plan: ExpertPlan) -> dict[str, Any]:
    layers = []
    for layer, ranks in zip(_layer_ids(plan), _equal_slots(plan, "vllm-ascend"), strict=True):
        devices = [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(ranks)]
        layers.append({"layer_id": layer, "device_count": len(devices), "device_list": devices})
    return {"moe_layer_count": len(layers), "layer_list": layers}


def _read_exflow(text: str, sizes: _Sizes) -> _Read:
    num_experts = sizes.need("num_experts", "ExFlow's file numbers the experts of all layers in one row")
    node_of: dict[int, int] = {}
    for line, row in enumerate(csv.reader(text.splitlines()), start=1):
        if line == 1 or not row:
            continue
        if len(row) != 2 or not all(value.strip().isdecimal() for value in row):
            raise ValueError(f"line {line} ({','.join(row)}) must be two whole numbers, Expert,Node")
        expert, node = map(int, row)
        if expert in node_of:
            raise ValueError(f"line {line}: expert {expert} stands there twice, and ExFlow has no replicas")
        node_of[expert] = node
    if not node_of or len(node_of) % num_experts or max(node_of) + 1 != len(node_of):
        raise ValueError(
            f"has {len(node_of)} experts, the last is {max(node_of, default=None)}: they must be numbered from 0 "
            f"without a gap, {num_experts} (num_experts) a layer"
        )
    last = max(node_of.values())
    if last >= (num_experts if sizes.world_size is None else sizes.world_size):
        raise ValueError(f"Node ({last}) must be below world_size ({sizes.world_size}), or num_experts without it")
    ranks = last + 1 if sizes.world_size is None else sizes.world_size
    slots: Slots = [[[] for _ in range(ranks)] for _ in range(len(node_of) // num_experts)]
    for expert in sorted(node_of):
        slots[expert // num_experts][node_of[expert]].append(expert % num_experts)
    return _Read(slots, num_experts, list(range(len(slots))))


def _write_exflow(plan: ExpertPlan) -> str:
    copies_LE = plan.copies_LWE.sum(1)
    if (copies_LE > 1).any():
        layer, expert = np.argwhere(copies_LE > 1)[0]
        raise ValueError(
            f"layer {layer}: expert {expert} is on {copies_LE[layer, expert]} ranks, and exflow holds no replicas"
        )
    node_N = plan.holds_LWE.argmax(1).flatten()
    return "".join(["Expert,Node\n", *(f"{expert},{node}\n" for expert, node in enumerate(node_N))])


def _cut_rows(rows: Mapping[int, list[int]], name: str, sizes: _Sizes) -> _Read:
    """One list of slots a layer, rank after rank, to slots by rank."""
    ranks = sizes.need("world_size", "the file lists the slots of all ranks together")
    slots: Slots = []
    for layer in sorted(rows):
        each, rest = divmod(len(rows[layer]), ranks)
        if rest:
            raise ValueError(f"{name}: layer {layer} has {len(rows[layer])} slots, no multiple of world_size ({ranks})")
        slots.append([rows[layer][rank * each : (rank + 1) * each] for rank in range(ranks)])
    return _Read(slots, _experts_in(slots, sizes), sorted(rows))


def _experts_in(slots: Slots, sizes: _Sizes) -> int:
    if sizes.num_experts is not None:
        return sizes.num_experts
    largest = max((expert for layer in slots for rank in layer for expert in rank), default=0)
    fewest = min((sum(map(len, ranks)) for ranks in slots), default=0)
    if largest >= fewest:
        raise ValueError(f"holds expert {largest}, but a layer has only {fewest} slots: some expert is nowhere")
    return largest + 1


def _numbered(entries: Any, name: str, key: str) -> dict[int, Mapping[str, Any]]:
    """A list of objects by their number ``entry[key]``, rising; by their place where they have none."""
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"{name} must be a list of objects")
    numbers = [entry.get(key, place) for place, entry in enumerate(entries)]
    if len(set(_whole_numbers(numbers, f"{name}: {key}", 1))) != len(numbers):
        raise ValueError(f"{name}: {key} must differ from entry to entry")
    return {number: entries[numbers.index(number)] for number in sorted(numbers)}


def _whole_numbers(values: Any, name: str, dimensions: int) -> Any:
    """Nested lists, checked to be of whole numbers of at least 0, as deep as ``dimensions``."""
    if dimensions == 0:
        if isinstance(values, bool) or not isinstance(values, int) or values < 0:
            raise ValueError(f"{name} has {values!r}, which is no whole number of at least 0")
        return values
    if not isinstance(values, list):
        raise ValueError(f"{name} must be lists of whole numbers, {dimensions} deep")
    return [_whole_numbers(value, name, dimensions - 1) for value in values]


def _equal_slots(plan: ExpertPlan, format: str) -> Slots:
    """Experts of every rank in slot order; an error where a rank has more than another."""
    slots = [[list(plan.experts_of(layer, w)) for w in range(plan.world_size)] for layer in range(plan.num_layers)]
    wanted = len(slots[0][0])
    for layer, ranks in enumerate(slots):
        for rank, experts in enumerate(ranks):
            if len(experts) != wanted:
                raise ValueError(
                    f"layer {layer}, rank {rank} holds {len(experts)} experts and layer 0, rank 0 holds {wanted}: "
                    f"{format} needs equally many on every rank"
                )
    return slots


def _layer_ids(plan: ExpertPlan) -> list[int]:
    return list(plan.meta.get("layer_ids", range(plan.num_layers)))


def _joined(ranks: list[list[int]]) -> list[int]:
    return [expert for rank in ranks for expert in rank]


class _Format(NamedTuple):
    """``key`` is what a file of the format has at its top; none for a CSV."""

    key: str | None
    read: Callable[[Any, _Sizes], _Read] | None
    write: Callable[[ExpertPlan], Any] | None


FORMATS: Mapping[str, _Format] = {
    "plan": _Format("slots", None, None),
    "sglang": _Format("physical_to_logical_map", _read_sglang, _write_sglang),
    "tensorrt": _Format("initial_global_assignments", _read_tensorrt, _write_tensorrt),
    "vllm-ascend": _Format("layer_list", _read_vllm, _write_vllm),
    "exflow": _Format(None, _read_exflow, _write_exflow),
}
