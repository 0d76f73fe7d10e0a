"""Plans for bench_model.py by name or file, loads to make them from, and what a model's parts take on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mixtralkit.config import ModelConfig
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.model.step import StepBatch
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.layer import MoEReport
from mixtralkit.planning.formats import load_plan
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.registry import named_plan
from mixtralkit.planning.trace import RoutingTrace


def make_plan(name: str, config: ModelConfig, world_size: int, loads_LE: np.ndarray | None) -> ExpertPlan:
    """The plan of a name (``planning.policies.registry``) or of a plan file; of a file where there is one."""
    if Path(name).is_file():
        return load_plan(name, num_experts=config.num_experts, world_size=world_size)
    loads_LE = np.ones((config.n_layers, config.num_experts)) if loads_LE is None else loads_LE
    return named_plan(name, loads_LE, world_size)


def trace_loads(path: Path, config: ModelConfig) -> np.ndarray:
    """Loads [L, E] of a routing trace; ValueError unless it is of such a model."""
    loads_LE = RoutingTrace.load(path, config.num_experts).loads_LE()
    wanted = (config.n_layers, config.num_experts)
    if loads_LE.shape != wanted:
        raise ValueError(f"trace {path}: layers and experts {loads_LE.shape} must be {wanted}, which are the model's")
    return loads_LE


def profiled_loads(engine: Engine, requests: Sequence[Request]) -> np.ndarray:
    """Loads [L, E] of a run of ``requests``, the rows of all ranks. Collective."""
    model, config = engine.model, engine.model.params
    counts_LE = np.zeros((config.n_layers, config.num_experts), np.int64)

    def observe(batch: StepBatch, reports: list[MoEReport]) -> None:
        for layer, report in enumerate(reports):
            experts = report.routing.experts_TK.flatten()
            counts_LE[layer] += torch.bincount(experts, minlength=config.num_experts).cpu().numpy()

    engine.observe = observe
    try:
        engine.complete(requests)
    finally:
        engine.observe = None
    if model.ranks_with_own_sequences > 1:
        return np.sum(model.context.all_gather_objects(counts_LE), axis=0)
    return counts_LE


def plan_fields(plan: ExpertPlan, loads_from: str | None) -> dict[str, object]:
    """What a line says of a plan: ``extra_slots`` are those of all ranks in a layer beyond one for each expert."""
    slots_L = plan.holds_LWE.sum((1, 2))
    found = {
        "name": plan.meta.get("name", plan.policy), "policy": plan.policy,
        "extra_slots": int(slots_L.max()) - plan.num_experts,
        "most_slots_per_rank": int(plan.holds_LWE.sum(2).max()),
    }  # fmt: skip
    return found if loads_from is None else {**found, "loads_from": loads_from}


def rows_through_memory(model: Transformer) -> int:
    """Rows of a rank that go to their experts through the GPUs' memory, or on a CPU by its twin; 0 for no such way.

    Collective when first asked.
    """
    peers = model.peers
    if peers is None or (peers.memory is None and model.context.device.type == "cuda"):
        return 0
    return peers.max_rows


def memory_by_rank(model: Transformer) -> dict[str, list[float]]:
    """10⁹ bytes of weights, keys and values, and memory that other ranks write; with all that torch took. Collective.

    ``total_gb`` is the peak since the engine was made, what the step works in included; on a CPU, which does not
    count that, the sum of the parts.
    """
    cache = model.cache
    weights = sum(parameter.nbytes for parameter in model.parameters())
    keys_values = 0 if cache is None else cache.keys.nbytes + cache.values.nbytes
    exchange = 0
    # taken in the first step that needs them; asking here would take them
    peers, sums = (model.__dict__.get(name) for name in ("peers", "sums"))
    if peers is not None and peers.memory is not None:
        exchange += peers.memory.rows.own.nbytes + peers.memory.words.own.nbytes
    if sums is not None and sums.memory is not None:
        exchange += sums.memory.rows.own.nbytes
    on_gpu = model.context.device.type == "cuda"
    total = torch.cuda.max_memory_allocated() if on_gpu else weights + keys_values + exchange
    own = {"weights_gb": weights, "cache_gb": keys_values, "exchange_gb": exchange, "total_gb": total}
    ranks = model.context.all_gather_objects(own)
    return {name: [round(rank[name] / 1e9, 6) for rank in ranks] for name in own}
