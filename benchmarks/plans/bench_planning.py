"""How good and how fast the planners are: ``python -m benchmarks.plans.bench_planning poured|size|affinity|replicas``.

``poured`` holds ``balanced`` against EPLB on random loads, both poured as the layer pours, and both against a bound;
``size`` times it for models of many experts; ``affinity`` takes files of pair weights (``W`` [layers - 1, E, E],
``world``, ``better`` [layers, E] a placement to beat) or routing traces, or without any draws routing of 128 and of 256
experts, and anneals beside it; ``replicas`` the same files with more slots; ``auto`` times the choice among all
policies. The last line of each is JSON, with the machine's load at the start and the end: seconds are CPU seconds, of
one thread.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.machine import describe_run
from benchmarks.plans import eplb
from benchmarks.plans.annealer import anneal
from mixtralkit.cli.run import run_tool
from mixtralkit.config import ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.npz_file import read_arrays
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.policies.affinity import affinity
from mixtralkit.planning.policies.affinity_replicas import crossings, with_replicas
from mixtralkit.planning.policies.balanced import rebalance_experts
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.poured import pour
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.replicas import pour_batches
from mixtralkit.planning.search import auto
from mixtralkit.planning.synthetic import RoutingProcess
from mixtralkit.planning.trace import RoutingTrace

_ROWS = 1_000_000_000  # of a layer, when plans are poured: so many that rounding an expert's load does not count
_CONFIGS = Path(__file__).parents[2] / "configs"


def bench_planning(
    what: str,
    files: tuple[Path, ...] = (),
    matrices: int = 100,
    first: int = 0,
    anneal_s: float = 60.0,
    bound: float = 1.0,
    published: Path | None = None,
    num_experts: int | None = None,
    world_size: int = 4,
) -> None:
    """Prints what was found and on which machine; the last line is JSON.

    Args:
        what: poured, size, affinity, replicas or auto.
        files: for affinity and replicas: pair weights, .npz, or routing traces, .npy.
        matrices: of poured, random cases.
        first: of poured, number of the first case, by which it is drawn.
        anneal_s: of affinity, CPU seconds of annealing.
        bound: of affinity, how many times the usual steps its bound may take.
        published: of size, the file eplb.py as DeepSeek publishes it, which is timed as well.
        num_experts: of the model of the traces.
        world_size: ranks that the traces are planned for.
    """
    for name, value, least in (("matrices", matrices, 1), ("first", first, 0)):
        if value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
    kinds = {
        "poured": lambda: _poured(range(first, first + matrices)), "size": lambda: _sizes(published),
        "affinity": lambda: _affinity(pairs or drawn_pairs(), anneal_s, bound), "replicas": lambda: _replicas(pairs),
        "auto": _auto,
    }  # fmt: skip
    if what not in kinds:
        raise ValueError(f"what ({what!r}) must be one of {', '.join(kinds)}")
    if not files and what == "replicas":
        raise ValueError(f"files (none) must name pair weights for {what}")
    for name, value in (("anneal_s", anneal_s), ("bound", bound)):
        if value <= 0:
            raise ValueError(f"{name} ({value}) must be above 0")
    is_trace = lambda path: path.suffix == ".npy"  # noqa: E731
    pairs = [Pairs.of_trace(x, num_experts, world_size) if is_trace(x) else Pairs.load(x) for x in files]
    load = [os.getloadavg()[0]]
    results = kinds[what]()
    print(
        json.dumps(
            {"what": what, "results": results, **describe_run(RankContext()), "load": [*load, os.getloadavg()[0]]}
        )
    )


def _slots(on_gpus: Sequence[Sequence[int]]) -> np.ndarray:
    """[G, S], an expert that a GPU has twice once."""
    return np.array([[e if e not in gpu[:s] else -1 for s, e in enumerate(gpu)] for gpu in map(list, on_gpus)])


def _exact_peak(on_gpus: np.ndarray, loads_E: np.ndarray) -> int:
    """Rows of the busiest GPU of ``_ROWS``, poured by the layer's own pouring."""
    holds_EW = (on_gpus[..., None] == np.arange(len(loads_E))).any(1).T
    rows_E = np.round(loads_E / loads_E.sum() * _ROWS).astype(int)
    return int(pour_batches(rows_E[None], np.zeros((1, len(on_gpus)), int), holds_EW)[0].sum(0).max())


def least_peak(loads_E: np.ndarray, replicas: int, groups: int, nodes: int, gpus: int) -> float:
    """No plan's busiest GPU, poured, has a smaller share of the load.

    The nodes are made as even as whole groups allow, all ways tried; a node's GPUs share evenly, and in a node an
    expert needs as many replicas as its load takes GPUs, which are no more than there are.
    """
    groups, nodes = (groups, nodes) if groups % nodes == 0 else (1, 1)
    loads_GN = (loads_E / loads_E.sum()).reshape(groups, -1)
    each, found = groups // nodes, []
    for first in itertools.combinations(range(groups), each) if nodes == 2 else [range(groups)]:
        parts = [loads_GN[list(first)], loads_GN[[g for g in range(groups) if g not in first]]][:nodes]
        found.append(max(_least_of_node(part.ravel(), replicas // nodes, gpus // nodes) for part in parts))
    return min(found)


def _least_of_node(loads_E: np.ndarray, replicas: int, gpus: int) -> float:
    low, high = loads_E.sum() / gpus, max(loads_E.max(), loads_E.sum() / gpus)
    if replicas == len(loads_E):
        # of the j · gpus + 1 heaviest some j + 1 are on one GPU, with the lightest there are in its other slots
        heaviest, slots = np.sort(loads_E)[::-1], replicas // gpus
        ends = [(j * gpus + 1, slots - j - 1) for j in range(slots)]
        together = [
            heaviest[end - slots + rest : end].sum() + heaviest[len(loads_E) - rest :].sum() for end, rest in ends
        ]
        return float(max(low, *together))
    fits = lambda peak: np.ceil(loads_E / peak - 1e-12).clip(1).sum() <= replicas  # noqa: E731
    if fits(low):
        return float(low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return float(low)


def random_case(seed: int) -> tuple[np.ndarray, int, int, int, int]:
    """Loads of 4 to 32 layers, 8 in the mean, replicas (0 to 3 a GPU), groups, nodes and GPUs."""
    random = np.random.default_rng(seed)
    experts, layers = int(random.choice([8, 16, 64, 256])), int(min(4 + random.exponential(4), 32))
    nodes = int(random.choice([1, 2]))
    gpus = int(random.choice([gpus for gpus in (4, 8, 16, 32) if gpus <= experts]))
    groups = int(random.choice([1, nodes, 4]))
    most = experts // (nodes if groups % nodes == 0 else 1)
    slots = min(-(-experts // gpus) + int(random.integers(0, 4)), most)
    return random.dirichlet(np.full(experts, random.choice([0.5, 1, 4, 15])), layers), slots * gpus, groups, nodes, gpus


def _poured(seeds: range) -> dict[str, object]:
    rows, seconds = [], np.zeros(2)
    for seed in seeds:
        loads_LE, *sizes = random_case(seed)
        gpus, started = sizes[-1], time.process_time()
        ours = rebalance_experts(loads_LE, *sizes)[0].reshape(len(loads_LE), gpus, -1)
        middle = time.process_time()
        theirs = np.array([_slots(eplb.rebalance(loads_E, *sizes)) for loads_E in loads_LE])
        seconds += middle - started, time.process_time() - middle
        share_LE = loads_LE / loads_LE.sum(1, keepdims=True)
        least_L = np.array([least_peak(loads_E, *sizes) for loads_E in loads_LE])
        peaks_L2 = np.array([pour(plan, share_LE, rounds=100).sum(2).max(1) for plan in (ours, theirs)]).T
        # pouring that has not settled is above the truth: where that could matter whole rows are poured
        alike = loads_LE.shape[1] / _ROWS
        for layer in np.flatnonzero(peaks_L2[:, 0] > np.minimum(least_L * (1 + 1e-5), peaks_L2[:, 1] + alike)):
            exact = [_exact_peak(plan[layer], loads_LE[layer]) for plan in (ours, theirs)]
            peaks_L2[layer] = np.array(exact) / _ROWS
        heavier = int((peaks_L2[:, 0] > peaks_L2[:, 1] + alike).sum())
        ratio, least = (
            float((x / peaks_L2[:, 1]).mean()) for x in (peaks_L2[:, 0], np.minimum(least_L, peaks_L2[:, 1]))
        )
        spare = sizes[0] > loads_LE.shape[1]
        rows.append((heavier, ratio, least, ratio / least, spare, sizes[2] > 1 and sizes[1] % sizes[2] == 0))
    table = np.array(rows, float)
    kinds = {"all": table[:, 0] >= 0, "without replicas": table[:, 4] == 0, "with replicas": table[:, 4] == 1}
    kinds |= {"one node": table[:, 5] == 0, "groups on two nodes": table[:, 5] == 1}
    return {
        "first": seeds[0],
        "matrices": len(seeds),
        "heavier_layers": int(table[:, 0].sum()),
        "cpu_s": seconds[0],
        "eplb_reference_cpu_s": seconds[1],
        **{
            kind: {"matrices": int(of.sum()), "to_eplb": table[of, 1].mean(), "least_possible": table[of, 2].mean()}
            for kind, of in kinds.items()
            if of.any()
        },
    }


def _sizes(published: Path | None) -> list[dict[str, float]]:
    found, random = [], np.random.default_rng(0)
    for gpus in (32, 144):
        loads_LE = random.dirichlet(np.full(256, 4.0), 58)
        started = time.process_time()
        ours = rebalance_experts(loads_LE, 288, 1, 1, gpus)[0].reshape(58, gpus, -1)
        ours_s, started = time.process_time() - started, time.process_time()
        theirs = [eplb.rebalance(loads_E, 288, 1, 1, gpus) for loads_E in loads_LE]
        theirs_s = time.process_time() - started
        peaks = np.array(
            [[_exact_peak(a, x), _exact_peak(_slots(b), x)] for a, b, x in zip(ours, theirs, loads_LE, strict=True)]
        )
        over = (peaks.mean(0) * gpus / _ROWS).tolist()
        found.append({
            "gpus": gpus, "cpu_s": ours_s, "eplb_reference_cpu_s": theirs_s, "peak_over_mean": over[0],
            "eplb_peak_over_mean": over[1], "heavier_layers": int((peaks[:, 0] > peaks[:, 1] + 256).sum()),
        })  # fmt: skip
        if published is not None:
            spec = importlib.util.spec_from_file_location("published_eplb", published)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            started = time.process_time()
            module.rebalance_experts(torch.tensor(loads_LE), 288, 1, 1, gpus)
            found[-1]["eplb_published_cpu_s"] = time.process_time() - started
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

    @classmethod
    def of_trace(cls, path: Path, num_experts: int | None, world_size: int) -> Pairs:
        """The transitions of a routing trace; experts in order are the placement to beat."""
        weights_LEE = RoutingTrace.load(path, num_experts).transitions_LEE()
        return cls.contiguous(path.name, weights_LEE, world_size)

    @classmethod
    def contiguous(cls, name: str, weights_LEE: np.ndarray, world_size: int) -> Pairs:
        """Any weights; ValueError where the experts cannot be divided between the ranks."""
        num_layers, num_experts = len(weights_LEE) + 1, weights_LEE.shape[1]
        if world_size < 1 or num_experts % world_size:
            raise ValueError(f"world_size ({world_size}) must divide the {num_experts} experts of {name}")
        ranks_LE = np.tile(np.arange(num_experts) // (num_experts // world_size), (num_layers, 1))
        return cls(name, weights_LEE / weights_LEE.sum((1, 2), keepdims=True), ranks_LE, world_size)


def drawn_pairs() -> list[Pairs]:
    """Routing of 12 layers of 128 experts on 8 GPUs and of 58 layers of 256 on 32, 20,000 tokens."""
    found = []
    for experts, world, layers in ((128, 8, 12), (256, 32, 58)):
        trace = RoutingProcess.random(layers, experts, affinity=1.0, seed=3).trace(20_000, top_k=1, seed=4)
        found.append(Pairs.contiguous(f"drawn, {experts} experts", trace.transitions_LEE(), world))
    return found


def _affinity(files: Sequence[Pairs], anneal_s: float, bound: float) -> list[dict[str, object]]:
    found = []
    for pairs in files:
        weights, world = pairs.weights_LEE, pairs.world
        started = time.process_time()
        plan = affinity(weights, world, bound=0)
        search_s, started = time.process_time() - started, time.process_time()
        meta = affinity(weights, world, bound=bound).meta  # of the same placement, which is kept
        bound_s = time.process_time() - started
        annealed_LE, proposals = anneal(weights, world, anneal_s)
        one_hot = np.arange(world)[:, None]
        found.append({
            "file": pairs.file, "experts": weights.shape[1], "gpus": world, "layers": len(weights) + 1,
            "crossings": crossings(weights, plan.holds_LWE),
            "given": crossings(weights, pairs.better_LE[:, None] == one_hot),
            "annealed": crossings(weights, annealed_LE[:, None] == one_hot), "anneal_s": anneal_s,
            "proposals": proposals, "bound": meta["crossings_bound"], "bound_is": meta["bound"],
            "search_cpu_s": search_s, "bound_cpu_s": bound_s,
        })  # fmt: skip
    return found


def _replicas(files: Sequence[Pairs]) -> list[dict[str, object]]:
    found = []
    for pairs in files:
        weights = pairs.weights_LEE
        holds_LWE = affinity(weights, pairs.world, bound=0).holds_LWE
        each = weights.shape[1] // pairs.world
        for share in (0.25, 0.5):
            slots = int(np.ceil(each * (1 + share)))
            after = with_replicas(weights, holds_LWE, slots, may_move=False)
            joint = with_replicas(weights, holds_LWE, slots)
            found.append({
                "file": pairs.file, "gpus": pairs.world, "slots": slots, "placement": crossings(weights, holds_LWE),
                "then_replicas": crossings(weights, after), "together": crossings(weights, joint),
            })  # fmt: skip
    return found


def _auto() -> dict[str, object]:
    """244 tokens of 8 experts in 32 layers on 16 ranks of two nodes, two slots a rank."""
    trace = RoutingProcess.random(32, 8, affinity=1.0, seed=1).trace(244, sequence_length=61, seed=2)
    shape = ModelShape.of(ModelConfig.from_file(_CONFIGS / "models" / "mixtral-8x7b.json"))
    machine = Hardware.load(_CONFIGS / "hardware" / "h200-nodes.json")
    found = {}
    for tokens in (64, 1024):
        started = time.process_time()
        plan = auto(trace, 16, shape, machine, Execution(batch=tokens), Budget(slots_per_rank=2), ranks_per_node=8)
        candidates = len(plan.meta["candidates_step_s"])
        seconds = time.process_time() - started
        found[f"{tokens} tokens a rank"] = {"chosen": plan.meta["chosen"], "candidates": candidates, "cpu_s": seconds}
    return found


if __name__ == "__main__":
    run_tool(bench_planning)
