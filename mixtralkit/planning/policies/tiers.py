"""``tiers``: the experts that a GPU has room for stay in its memory, the others behind it in the host's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.hardware import USUAL_HOST, HostRates
from mixtralkit.planning.memory import RESERVE_GB, Room, rank_memory, room_for_experts
from mixtralkit.planning.plan import ExpertPlan
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

    @property
    def shape(self) -> ModelShape:
        room = self.room
        return ModelShape.of(self.config, room.data_bytes, room.weights, room.attention_weights)


def tiers(plan: ExpertPlan, loads_LE: np.ndarray, gpu: GpuBudget) -> ExpertPlan:
    """The plan with as many experts in every GPU's memory as there is room for (``memory.room_for_experts``).

    Experts go in whose misses cost most for a byte: load times the seconds of the faster of bus and CPU.

    Raises:
        ValueError: naming what is lacking where there is no room even without experts.
    """
    loads_LE = checked_loads(loads_LE, plan.world_size)
    size_LE = gpu.shape.expert_bytes_LE(plan)
    meta = {**plan.meta, "gpu_memory_gb": gpu.memory_gb}
    parallel, plain = ParallelConfig("dp", "ep"), replace(plan, tier=None)
    room = room_for_experts(gpu.config, parallel, plain, gpu.room, gpu.memory_gb)
    if rank_memory(gpu.config, parallel, plain, gpu.room).total + RESERVE_GB <= gpu.memory_gb:
        return replace(plain, policy="tiers", meta=meta)
    least = (int(plan.holds_LWE.sum(2).max()) + gpu.config.num_experts_per_tok) * int(size_LE.max()) / 1e9
    if room.left < least:
        raise ValueError(
            f"gpu_memory_gb ({gpu.memory_gb:g}) must be at least {gb_above(room.taken + least, gpu.memory_gb)}: "
            f"{room.taken:.2f} for all but experts, {least:.2f} for a layer's and those on their way"
        )
    miss_s_LE = size_LE / max(gpu.host.bus_bandwidth, gpu.host.cpu_bandwidth)
    value_LE = loads_LE / loads_LE.sum(1, keepdims=True) * miss_s_LE / size_LE
    on_gpu_LE = np.zeros(loads_LE.shape, bool)
    free_W = np.full(plan.world_size, 1e9 * room.left)
    for place in np.argsort(-value_LE, axis=None, kind="stable"):
        layer, expert = divmod(int(place), plan.num_experts)
        taken_W = plan.holds_LWE[layer, :, expert] * size_LE[layer, expert]  # replicas are in the same tier
        if (taken_W <= free_W).all():
            on_gpu_LE[layer, expert] = True
            free_W -= taken_W
    words = [["gpu" if here else "host" for here in row] for row in on_gpu_LE]
    return replace(plan, policy="tiers", tier=words, meta=meta | {"taken_gb": room.taken})
