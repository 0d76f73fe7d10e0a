"""How good and how fast the planners are: ``python -m benchmarks.plans.bench_planning poured|size|affinity|replicas``.

``poured`` holds ``balanced`` against EPLB on random loads, both poured as the layer pours; ``size`` times it for models
of many experts; ``affinity`` takes files of pair weights (``W`` [layers - 1, E, E], ``world``, ``better`` [layers, E] a
placement to beat); ``replicas`` the same files with more slots. The last line of each is JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mixtralkit.cli.run import run_tool
from mixtralkit.planning.policies.affinity import affinity
from mixtralkit.planning.policies.affinity_replicas import crossings, with_replicas
from mixtralkit.planning.policies.balanced import rebalance_experts
from mixtralkit.planning.replicas import pour_batches
from tests.planning.policies import eplb

_ROWS = 1_000_000  # of a layer, when plans are poured


def bench_planning(what: str, files: tuple[Path, ...] = (), matrices: int = 100, first: int = 0) -> None:
    """Prints what was found; the last line is JSON.

    Args:
        what: poured, size, affinity or replicas.
        files: pair weights, .npz, for affinity and replicas.
        matrices: of poured; first: number of the first one.
    """
    kinds = {
        "poured": lambda: _poured(range(first, first + matrices)), "size": _sizes,
        "affinity": lambda: _affinity(files), "replicas": lambda: _replicas(files),
    }  # fmt: skip
    if what not in kinds:
        raise ValueError(f"what ({what!r}) must be one of {', '.join(kinds)}")
    print(json.dumps({"what": what, "note": "a shared machine of 2 cores", "results": kinds[what]()}))


def _peak(on_gpus: Sequence[Sequence[int]], loads_E: np.ndarray) -> int:
    """Rows of the busiest GPU, poured; the mean is ``_ROWS`` / GPUs."""
    holds_EW = np.zeros((len(loads_E), len(on_gpus)), bool)
    for gpu, experts in enumerate(on_gpus):
        holds_EW[list(experts), gpu] = True
    rows_E = np.round(loads_E / loads_E.sum() * _ROWS).astype(int)
    return int(pour_batches(rows_E[None], np.zeros((1, len(on_gpus)), int), holds_EW)[0].sum(0).max())


def random_case(seed: int) -> tuple[np.ndarray, int, int, int, int]:
    """Loads of 4 to 32 layers of 8 to 256 experts, replicas, groups, nodes and GPUs: at least a replica a GPU."""
    random = np.random.default_rng(seed)
    experts, layers = int(random.choice([8, 16, 64, 256])), int(random.choice([4, 8, 16, 32]))
    nodes = int(random.choice([1, 2]))
    gpus = int(random.choice([gpus for gpus in (4, 8, 16, 32) if gpus <= experts]))
    groups = int(random.choice([1, nodes, 4]))
    most = experts // (nodes if groups % nodes == 0 else 1)
    slots = min(-(-experts // gpus) + int(random.integers(1, 4)), most)
    return random.dirichlet(np.full(experts, random.choice([0.5, 1, 4, 15])), layers), slots * gpus, groups, nodes, gpus


def _poured(seeds: range) -> dict[str, float]:
    ratios, heavier = [], 0
    for seed in seeds:
        loads_LE, replicas, groups, nodes, gpus = random_case(seed)
        ours = rebalance_experts(loads_LE, replicas, groups, nodes, gpus)[0].reshape(len(loads_LE), gpus, -1)
        theirs = [eplb.rebalance(loads_E, replicas, groups, nodes, gpus) for loads_E in loads_LE]
        peaks = np.array([[_peak(a, x), _peak(b, x)] for a, b, x in zip(ours, theirs, loads_LE, strict=True)])
        heavier += int((peaks[:, 0] > peaks[:, 1] + 1).any())
        ratios.append(float((peaks[:, 0] / peaks[:, 1]).mean()))
    return {"matrices": len(seeds), "heavier": heavier, "mean_ratio": float(np.mean(ratios)), "best": min(ratios)}


def _sizes() -> list[dict[str, float]]:
    found, random = [], np.random.default_rng(0)
    for gpus in (32, 144):
        loads_LE = random.dirichlet(np.full(256, 4.0), 58)
        started = time.process_time()
        ours = rebalance_experts(loads_LE, 288, 1, 1, gpus)[0].reshape(58, gpus, -1)
        ours_s, started = time.process_time() - started, time.process_time()
        theirs = [eplb.rebalance(loads_E, 288, 1, 1, gpus) for loads_E in loads_LE]
        theirs_s = time.process_time() - started
        peaks = np.array([[_peak(a, x), _peak(b, x)] for a, b, x in zip(ours, theirs, loads_LE, strict=True)])
        over = (peaks.mean(0) * gpus / _ROWS).tolist()
        found.append({
            "gpus": gpus, "cpu_s": ours_s, "eplb_reference_cpu_s": theirs_s, "peak_over_mean": over[0],
            "eplb_peak_over_mean": over[1], "heavier": int((peaks[:, 0] > peaks[:, 1] + 1).sum()),
        })  # fmt: skip
    return found


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    with np.load(path) as file:
        weights = file["W"].astype(float)
        return weights / weights.sum((1, 2), keepdims=True), file["better"], int(file["world"])


def _affinity(files: Sequence[Path]) -> list[dict[str, object]]:
    found = []
    for path in files:
        weights, better_LE, world = _read(path)
        started = time.process_time()
        plan = affinity(weights, world, bound=False)
        search_s = time.process_time() - started
        bound = affinity(weights, world).meta["crossings_bound"]
        other = crossings(weights, better_LE[:, None] == np.arange(world)[:, None])
        ours = crossings(weights, plan.holds_LWE)
        found.append({"file": path.name, "crossings": ours, "given": other, "bound": bound, "search_cpu_s": search_s})
    return found


def _replicas(files: Sequence[Path]) -> list[dict[str, object]]:
    found = []
    for path in files:
        weights, _, world = _read(path)
        holds_LWE = affinity(weights, world, bound=False).holds_LWE
        each = weights.shape[1] // world
        for share in (0.25, 0.5):
            slots = int(np.ceil(each * (1 + share)))
            after = with_replicas(weights, holds_LWE, slots, may_move=False)
            joint = with_replicas(weights, holds_LWE, slots)
            found.append({
                "file": path.name, "slots": slots, "placement": crossings(weights, holds_LWE),
                "then_replicas": crossings(weights, after), "together": crossings(weights, joint),
            })  # fmt: skip
    return found


if __name__ == "__main__":
    run_tool(bench_planning)
