"""The figures of this project's kernels in configs/hardware, from what is measured: docs/cost-model.md says how.

    python -m benchmarks.plans.fit_hardware h200x2 h200x4          # says what they should be, and writes it

Each figure comes from phases or kernels by themselves: no time of a whole step or layer goes in. ``exchange`` of four
ranks and all that is not named here stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.plans.compare_predictions import (
    CONFIGS,
    LAYER_SAMPLES,
    dispatcher_of,
    loads_of,
    plan_of_layer,
    read_lines,
    shape_of_layer,
)  # fmt: skip
from mixtralkit.cli.run import run_tool
from mixtralkit.config import ModelConfig, shipped
from mixtralkit.json_file import read_object
from mixtralkit.planning.cost import KernelCounts, ModelShape
from mixtralkit.planning.fused_cost import PASSES_OF_GATE, PASSES_OF_NORM, SMALL_AT_ENDS
from mixtralkit.planning.hardware import FusedKernels, Hardware, ProductPoints, WirePoints
from mixtralkit.planning.policies.registry import named_plan
from mixtralkit.planning.replay import PHASES, Execution
from mixtralkit.planning.simulate import sample_routing, simulate

RESULTS = Path(__file__).resolve().parents[1] / "results"
Lines = Sequence[dict[str, Any]]


def fit_hardware(names: tuple[str, ...] = ("h200x2", "h200x4")) -> None:
    """Fits the machines and writes their files; prints each figure that changed.

    Args:
        names: of files in configs/hardware.
    """
    for name in names:
        path = shipped("hardware", name)
        before = Hardware.load(path)
        after = fitted(before)
        for field, old, new in _changes(before, after):
            print(f"{name} {field}: {old} → {new}")
        after.save(path)


def fitted(hardware: Hardware) -> Hardware:
    """``hardware`` with the figures that the results give for as many ranks."""
    if hardware.fused is None:
        raise ValueError(f"hardware {hardware.name} has no fused kernels to fit")
    layers = read_lines(RESULTS / "moe-layer-h200x2.json")
    model = read_lines(RESULTS / "model-h200.json")
    reading = next(line["ceilings"]["read_tb_s"] for line in model if line["measurement"] == "ceilings") * 1e12
    fused = replace(hardware.fused, memory_bandwidth=_rounded(reading), linear=linear(hardware))
    fused = replace(fused, **small_kernels(read_lines(RESULTS / "profiles-h200.json"), fused))
    alone = read_lines(RESULTS / "moe-kernels-h200.json")
    fused = replace(fused, experts=with_layers(experts(alone, fused), layers))
    if fused.members == 2:
        fused = replace(fused, sums=sums(layers), exchange=exchange(layers))
        hardware = replace(hardware, fused=fused, launch_s=0.0)
        return replace(hardware, launch_s=launches(read_lines(RESULTS / "moe-layer-exact-h200x2.json"), hardware))
    return replace(hardware, fused=replace(fused, sums=sums_alone(RESULTS / "all-reduce-h200x4.json")))


def linear(hardware: Hardware) -> ProductPoints:
    """Up to 64 rows a line of seconds over weights through the tuned sizes; above, the library's rates with the same s.

    Of sizes [O, I] with so many rows: seconds = s + 2·O·I·rows / rate, by least squares.
    """
    entries = read_object(CONFIGS / "kernels" / "nvidia-h200.json")["entries"]
    entries = [entry for entry in entries if entry["kernel"] == "linear"]
    points = []
    for rows in sorted({entry["rows"] for entry in entries}):
        mine = [entry for entry in entries if entry["rows"] == rows]
        weights = [entry["shape"]["outputs"] * entry["shape"]["inputs"] for entry in mine]
        start_s, per_weight_s = _line(weights, [entry["ms"] / 1e3 for entry in mine])
        points.append((rows, _rounded(start_s), _rounded(2 * rows / per_weight_s)))
    last, start_s, _ = points[-1]
    above = [(rows, start_s, _rounded(rate)) for rows, rate in hardware.matrix_rates if rows > last]
    return (*points, *above)


def small_kernels(profiles: Lines, fused: FusedKernels) -> dict[str, float]:
    """``small_s``, ``step_s`` and attention's rates, from profiles of one GPU.

    In decode all but the products and the experts are small kernels, passes over the rows, and reading keys and values:
    two unknowns, by least squares over the batches. ``step_s`` is the time in which nothing runs.
    """
    decodes = [line for line in profiles if line["of"].startswith("decode-")]
    shape, layers = _model(profiles[0]), profiles[0]["layers"]
    kernels = 2 * layers + SMALL_AT_ENDS
    read, left = [], []
    for line in decodes:
        batch, parts = int(line["of"].removeprefix("decode-")), line["us_by_part"]
        passes = layers * (2 * PASSES_OF_NORM + PASSES_OF_GATE) * batch * shape.row_bytes / fused.memory_bandwidth
        read.append(batch * _PROFILED_CONTEXT * layers * 2 * shape.kv_heads * shape.head_dim * shape.data_bytes)
        left.append(sum(us for part, us in parts.items() if part not in ("experts", "linear")) / 1e6 - passes)
    kernels_s, per_byte_s = _line(read, left)
    (prefill,) = [line for line in profiles if line["of"].startswith("prefill-")]
    count, length = map(int, prefill["of"].removeprefix("prefill-").split("x"))
    flop = layers * 4 * count * length * (length + 1) / 2 * shape.heads * shape.head_dim
    return {
        "small_s": _rounded(kernels_s / kernels), "attention_bandwidth": _rounded(1 / per_byte_s),
        "step_s": _rounded(median(line["idle_us"] for line in decodes) / 1e6),
        "attention_flops": _rounded(flop / prefill["us_by_part"]["attention"] * 1e6),
    }  # fmt: skip


_PROFILED_CONTEXT = 128 + 8  # bench_model.py profiles eight steps after the first four, of prompts of 128


def experts(kernels: Lines, fused: FusedKernels) -> ProductPoints:
    """One GPU's layers of two widths: seconds = gate + s + 2·(weights of all experts)·rows / rate, two unknowns.

    Where one width alone was measured, s lies on a line between its neighbours'.
    """
    lines = [line for line in kernels if line["variant"] == "kernels" and line["routing"] == "uniform"]
    found: dict[float, tuple[float | None, Callable[[float], float]]] = {}
    for tokens in sorted({line["tokens"] for line in lines}):
        mine = sorted((line for line in lines if line["tokens"] == tokens), key=lambda line: line["hidden"])
        widths = [3 * line["dim"] * line["hidden"] * line["touched_experts"] for line in mine]
        rows = tokens * mine[0]["top_k"] / mine[0]["touched_experts"]
        gate_s = fused.small_s + PASSES_OF_GATE * tokens * mine[0]["dim"] * 2 / fused.memory_bandwidth
        times_s = [line["ms"] / 1e3 - gate_s for line in mine]
        start_s = _line(widths, times_s)[0] if len(mine) > 1 else None
        found[rows] = start_s, lambda s, at=(rows, times_s[-1], widths[-1]): 2 * at[0] * at[2] / (at[1] - s)
    known = [(rows, start_s) for rows, (start_s, _) in found.items() if start_s is not None]
    points = []
    for rows, (start_s, rate) in found.items():
        start_s = float(np.interp(rows, *zip(*known, strict=True))) if start_s is None else start_s
        points.append((round(rows, 3), _rounded(max(start_s, 0.0)), _rounded(rate(start_s))))
    return tuple(points)


def with_layers(points: ProductPoints, layers: Lines) -> ProductPoints:
    """Points between, of layers over two GPUs: whole experts and halves of all have the same weights on each rank.

    Their mean phase, s on the line between the points that are there.
    """
    known_R, start_R, _ = np.array(points).T
    added = []
    for tokens in sorted({line["tokens_per_rank"] for line in layers}):
        pair = [_uniform(layers, variant, tokens) for variant in ("contiguous", "tensor_parallel")]
        one = pair[0]
        rows = tokens * one["ranks"] * one["top_k"] / one["num_experts"]
        weights = 3 * one["dim"] * one["hidden"] * one["num_experts"] / one["ranks"]
        seconds = mean(line["phases_ms"]["experts"] for line in pair) / 1e3 - _empty_s(layers, tokens)
        start_s = float(np.interp(rows, known_R, start_R))
        added.append((rows, _rounded(start_s), _rounded(2 * rows * weights / (seconds - start_s))))
    return tuple(sorted([*points, *added]))


def sums(layers: Lines) -> WirePoints:
    """``combine`` of tensor parallel layers, uniform routing, less an empty phase: bytes of all rows, seconds."""
    points = []
    for line in layers:
        if line["variant"] == "tensor_parallel" and line["routing"] == "uniform":
            tokens = line["tokens_per_rank"]
            size = tokens * line["ranks"] * line["dim"] * 2
            points.append((size, _rounded(line["phases_ms"]["combine"] / 1e3 - _empty_s(layers, tokens))))
    return tuple(sorted(points))


def sums_alone(path: Path) -> WirePoints:
    """Times of bench_all_reduce.py's kernel: bytes of the rows, seconds."""
    found = read_object(path)
    lines = [line for line in found["results"] if line["variant"] == "ours"]
    return tuple(sorted((line["tokens"] * found["dim"] * 2, _rounded(line["us"] / 1e6)) for line in lines))


def exchange(layers: Lines) -> WirePoints:
    """Both ways of contiguous layers, uniform routing, less two empty phases: the busiest rank's bytes of one way."""
    points = []
    for line in layers:
        if line["variant"] == "contiguous" and line["routing"] == "uniform":
            phases = line["phases_ms"]
            seconds = (phases["permute+dispatch"] + phases["combine"]) / 1e3
            seconds -= 2 * _empty_s(layers, line["tokens_per_rank"])
            points.append((line["bytes_sent"] / 2, _rounded(seconds)))
    return tuple(sorted(points))


def launches(layers: Lines, hardware: Hardware) -> float:
    """Seconds a launch: what exact exchanges take on the way out beyond waits, messages and bytes, by its kernels.

    The median of all plans, routings and rows.
    """
    assert hardware.launch_s == 0
    kernels, each = KernelCounts(), []
    for line in layers:
        if dispatcher_of(line) != "exact" or line["variant"].endswith("+schedule"):
            continue
        shape = shape_of_layer(line)
        loads_LE = loads_of(line["routing"], shape)
        plan = named_plan(plan_of_layer(line), loads_LE, line["ranks"])
        samples = [
            sample_routing(loads_LE, line["tokens_per_rank"] * line["ranks"], shape.top_k, n)
            for n in range(LAYER_SAMPLES)
        ]
        out_s = [
            simulate(plan, sample, shape, hardware, Execution("exact")).phases_LP.sum(0)[PHASES.index("dispatch")]
            for sample in samples
        ]
        count = kernels.dispatch + kernels.replicas * (plan.holds_LWE.sum(1).max() > 1)
        phases = line["phases_ms"]
        each.append(((phases["permute"] + phases["dispatch"]) / 1e3 - mean(out_s)) / count)
    return _rounded(median(each))


def _uniform(layers: Lines, variant: str, tokens: int) -> dict[str, Any]:
    wanted = (variant, "uniform", tokens)
    return next(line for line in layers if (line["variant"], line["routing"], line["tokens_per_rank"]) == wanted)


def _empty_s(layers: Lines, tokens: int) -> float:
    """A phase in which nothing happens: where every rank has every row, rows need not be brought anywhere."""
    return _uniform(layers, "tensor_parallel", tokens)["phases_ms"]["permute"] / 1e3


def _model(line: dict[str, Any]) -> ModelShape:
    return ModelShape.of(ModelConfig.from_file(shipped("models", line["model"])))


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the line nearest to the points."""
    slope, intercept = np.polyfit(np.array(x, float), np.array(y, float), 1)
    return float(intercept), float(slope)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _changes(before: Hardware, after: Hardware) -> list[tuple[str, Any, Any]]:
    found = [("launch_s", before.launch_s, after.launch_s)]
    for name in vars(after.fused):
        found.append((name, getattr(before.fused, name), getattr(after.fused, name)))
    return [(name, json.dumps(old), json.dumps(new)) for name, old, new in found if old != new]


if __name__ == "__main__":
    run_tool(fit_hardware)
