"""Plans for bench_model.py by name or file, loads to make them from, and what a model's parts take on each rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mixtralkit.config import ModelConfig
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.layer import MoEReport
from mixtralkit.planning.formats import load_plan
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.registry import named_plan, needs_loads
from mixtralkit.planning.trace import RoutingTrace


@dataclass(frozen=True)
class Variant:
    """How a model runs: its plan's name or file, and what is written behind it.

    ``NAME+capacity0.5`` cuts cold experts' rows to that factor, and with ``+reroute`` offers them to other experts;
    ``+shadow`` copies hot experts; ``+managed`` makes new plans between steps. ``extras`` are these words.
    """

    plan: str | None = None
    capacity: float | None = None
    extras: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """ValueError where ``reroute`` has no capacity."""
        words = text.split("+")
        extras: list[str] = []
        while len(words) > 1 and re.fullmatch(r"capacity\d+(\.\d+)?|reroute|shadow|managed", words[-1]):
            extras.insert(0, words.pop())
        factors = [float(word.removeprefix("capacity")) for word in extras if word.startswith("capacity")]
        if "reroute" in extras and not factors:
            raise ValueError(f"plan ({text!r}) must have a capacity with reroute, as hot_cold+capacity0.5+reroute has")
        return cls("+".join(words), factors[0] if factors else None, tuple(extras))

    @property
    def needs_loads(self) -> bool:
        """Whether the plan depends on how often experts are chosen."""
        return self.plan is not None and needs_loads(self.plan)

    def cut(self, plan: ExpertPlan) -> ExpertPlan:
        """``plan`` with the capacity, if there is one."""
        if self.capacity is None:
            return plan
        return replace(
            plan, cold_capacity_factor=self.capacity, overflow="reroute" if "reroute" in self.extras else "drop"
        )


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

    def observe(batch: ForwardBatch, reports: list[MoEReport]) -> None:
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


def dispatchers_of(model: Transformer) -> dict[str, object]:
    """How rows find their experts in steps of prompts and in decoding, and most rows of a rank through symmetric
    memory at once (0 where they do not go so)."""
    names = {kind: model.dispatchers.name(True, kind == "decode") for kind in ("prefill", "decode")}
    return {"dispatchers": names, "symmetric_rows": model.dispatchers.most_rows}


def memory_by_rank(model: Transformer) -> dict[str, list[float]]:
    """10⁹ bytes of weights, keys and values, and memory that other ranks write; with all that torch took. Collective.

    ``total_gb`` is the peak since the engine was made, what the step works in included; on a CPU, which does not
    count that, the sum of the parts.
    """
    cache = model.cache
    weights = sum(parameter.nbytes for parameter in model.parameters())
    keys_values = 0 if cache is None else cache.keys.nbytes + cache.values.nbytes
    exchange, symmetric = 0, model.dispatchers.by_name.get("symmetric")
    if symmetric is not None and symmetric.exchange.memory is not None:
        memory = symmetric.exchange.memory
        exchange += memory.rows.own.nbytes + memory.words.own.nbytes
    if model.sums is not None and model.sums.memory is not None:
        exchange += model.sums.memory.rows.own.nbytes
    on_gpu = model.context.device.type == "cuda"
    total = torch.cuda.max_memory_allocated() if on_gpu else weights + keys_values + exchange
    own = {"weights_gb": weights, "cache_gb": keys_values, "exchange_gb": exchange, "total_gb": total}
    ranks = model.context.all_gather_objects(own)
    return {name: [round(rank[name] / 1e9, 6) for rank in ranks] for name in own}
