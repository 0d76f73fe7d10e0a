"""``tiers``: the experts that a GPU has room for stay in its memory, the others behind it in the host's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.hardware import USUAL_HOST, HostRates
from mixtralkit.planning.memory import Room, rank_memory
from mixtralkit.planning.plan import ExpertPlan, Words
from mixtralkit.planning.policies.inputs import checked_loads, gb_above


@dataclass(frozen=True)
class GpuBudget:
    """What is to fit into each GPU.

    Attributes:
        memory_gb: all of it, in 10⁹ bytes.
        config: the model.
        room: what it must have room for, beside the weights.
        host: the rates behind the GPU.
    """

    memory_gb: float
    config: ModelConfig
    room: Room
    host: HostRates = USUAL_HOST

    def without_experts_gb(self, plan: ExpertPlan) -> tuple[float, float]:
        """What is taken before any expert is: by all else, and by places for experts on their way, twice a token's."""
        nothing: Words = (("host",) * plan.num_experts,) * plan.num_layers
        fixed = rank_memory(self.config, ParallelConfig("dp", "ep"), replace(plan, tier=nothing), self.room).total
        size = self.shape.expert_bytes_LE(plan).max()
        return fixed, 2 * self.config.num_experts_per_tok * int(size) / 1e9

    @property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.config, self.room.data_bytes, self.room.weights)


def tiers(plan: ExpertPlan, loads_LE: np.ndarray, gpu: GpuBudget) -> ExpertPlan:
    """The plan with as many experts of every rank in its GPU's memory as there is room for.

    The memory model takes the other weights, keys and values, working memory and places for experts on their way first.
    Then the experts go in whose misses cost most for a byte: load times the seconds of the faster of bus and CPU.

    Raises:
        ValueError: naming what is lacking where there is no room even without experts.
    """
    loads_LE = checked_loads(loads_LE, plan.world_size)
    size_LE = gpu.shape.expert_bytes_LE(plan)
    meta = {**plan.meta, "gpu_memory_gb": gpu.memory_gb}
    fixed, transit = gpu.without_experts_gb(plan)
    whole_gb = float(gpu.shape.rank_bytes(replace(plan, tier=None))[0].max()) / 1e9
    if fixed + whole_gb <= gpu.memory_gb:  # nothing is ever on its way
        return replace(plan, policy="tiers", tier=None, meta=meta)
    if fixed + transit > gpu.memory_gb:
        raise ValueError(
            f"gpu_memory_gb ({gpu.memory_gb:g}) must be at least {gb_above(fixed + transit, gpu.memory_gb)}, which is "
            f"taken without any expert ({fixed:.2f}, and {transit:.2f} for experts on their way)"
        )
    miss_s_LE = size_LE / max(gpu.host.bus_bandwidth, gpu.host.cpu_bandwidth)
    value_LE = loads_LE / loads_LE.sum(1, keepdims=True) * miss_s_LE / size_LE
    on_gpu_LE = np.zeros(loads_LE.shape, bool)
    free_W = np.full(plan.world_size, 1e9 * (gpu.memory_gb - fixed - transit))
    for place in np.argsort(-value_LE, axis=None, kind="stable"):
        layer, expert = divmod(int(place), plan.num_experts)
        taken_W = plan.holds_LWE[layer, :, expert] * size_LE[layer, expert]  # replicas are in the same tier
        if (taken_W <= free_W).all():
            on_gpu_LE[layer, expert] = True
            free_W -= taken_W
    words = [["gpu" if here else "host" for here in row] for row in on_gpu_LE]
    return replace(plan, policy="tiers", tier=words, meta=meta | {"fixed_gb": fixed, "transit_gb": transit})
