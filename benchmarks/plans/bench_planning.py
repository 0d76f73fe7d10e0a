"""How good and how fast the planners are: ``python -m benchmarks.plans.bench_planning poured|size|affinity|replicas``.

``poured`` holds ``balanced`` against EPLB on random loads, both poured as the layer pours; ``size`` times it for models
of many experts; ``affinity`` takes files of pair weights (``W`` [layers - 1, E, E], ``world``, ``better`` [layers, E] a
placement to beat); ``replicas`` the same files with more slots. The last line of each is JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common.machine import describe_run
from benchmarks.plans import eplb
from mixtralkit.cli.run import run_tool
from mixtralkit.distributed import RankContext
from mixtralkit.npz_file import read_arrays
from mixtralkit.planning.policies.affinity import affinity
from mixtralkit.planning.policies.affinity_replicas import crossings, with_replicas
from mixtralkit.planning.policies.balanced import rebalance_experts
from mixtralkit.planning.replicas import pour_batches

_ROWS = 1_000_000  # of a layer, when plans are poured


def bench_planning(what: str, files: tuple[Path, ...] = (), matrices: int = 100, first: int = 0) -> None:
    """Prints what was found and on which machine; the last line is JSON.

    Args:
        what: poured, size, affinity or replicas.
        files: pair weights, .npz, for affinity and replicas.
        matrices: of poured, random cases.
        first: of poured, number of the first case, by which it is drawn.
    """
    for name, value, least in (("matrices", matrices, 1), ("first", first, 0)):
        if value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
    kinds = {
        "poured": lambda: _poured(range(first, first + matrices)), "size": _sizes,
        "affinity": lambda: _affinity(pairs), "replicas": lambda: _replicas(pairs),
    }  # fmt: skip
    if what not in kinds:
        raise ValueError(f"what ({what!r}) must be one of {', '.join(kinds)}")
    if not files and what in ("affinity", "replicas"):
        raise ValueError(f"files (none) must name pair weights for {what}")
    pairs = [Pairs.load(path) for path in files]
    print(json.dumps({"what": what, "results": kinds[what](), **describe_run(RankContext())}))


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


@dataclass(frozen=True)
class Pairs:
    """How often tokens go from expert to expert between a layer and the next, and a placement to beat.

    Attributes:
        file: its name.
        weights_LEE: [layers - 1, E, E], of each pair of layers their shares.
        better_LE: rank of every expert in the placement given, [layers, E].
        world: ranks.
    """

    file: str
    weights_LEE: np.ndarray
    better_LE: np.ndarray
    world: int

    @classmethod
    def load(cls, path: Path) -> Pairs:
        """Reads ``W``, ``better`` and ``world`` of a .npz; ValueError names the file and what is wrong."""
        try:
            arrays = read_arrays(path)
            for name in ("W", "better", "world"):
                if name not in arrays:
                    raise ValueError(f"lacks {name}")
            weights_LEE, better_LE, world = arrays["W"], arrays["better"], arrays["world"]
            layers, experts = weights_LEE.shape[0] + 1 if weights_LEE.ndim == 3 else 0, weights_LEE.shape[-1:]
            if not layers or weights_LEE.shape[1:] != 2 * experts or better_LE.shape != (layers, *experts):
                shapes = f"W {weights_LEE.shape} and better {better_LE.shape}"
                raise ValueError(f"{shapes} must be [layers - 1, E, E] and [layers, E]")
            if world.size != 1 or not int(world) >= 1 or experts[0] % int(world):
                raise ValueError(f"world ({world}) must be a number of ranks that divides the {experts[0]} experts")
            sums_L11 = weights_LEE.astype(float).sum((1, 2), keepdims=True)
            if not np.isfinite(sums_L11).all() or (weights_LEE < 0).any() or (sums_L11 == 0).any():
                raise ValueError("W must be numbers of at least 0, with a sum above 0 in every layer")
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        return cls(path.name, weights_LEE / sums_L11, better_LE, int(world))


def _affinity(files: Sequence[Pairs]) -> list[dict[str, object]]:
    found = []
    for pairs in files:
        weights, world = pairs.weights_LEE, pairs.world
        started = time.process_time()
        plan = affinity(weights, world, bound=False)
        search_s = time.process_time() - started
        bound = affinity(weights, world).meta["crossings_bound"]
        other = crossings(weights, pairs.better_LE[:, None] == np.arange(world)[:, None])
        ours = crossings(weights, plan.holds_LWE)
        found.append({"file": pairs.file, "crossings": ours, "given": other, "bound": bound, "search_cpu_s": search_s})
    return found


def _replicas(files: Sequence[Pairs]) -> list[dict[str, object]]:
    found = []
    for pairs in files:
        weights = pairs.weights_LEE
        holds_LWE = affinity(weights, pairs.world, bound=False).holds_LWE
        each = weights.shape[1] // pairs.world
        for share in (0.25, 0.5):
            slots = int(np.ceil(each * (1 + share)))
            after = with_replicas(weights, holds_LWE, slots, may_move=False)
            joint = with_replicas(weights, holds_LWE, slots)
            found.append({
                "file": pairs.file, "slots": slots, "placement": crossings(weights, holds_LWE),
                "then_replicas": crossings(weights, after), "together": crossings(weights, joint),
            })  # fmt: skip
    return found


if __name__ == "__main__":
    run_tool(bench_planning)
