"""``plan="auto"``: the layout and plan that the time model says are fastest, of those that fit the memory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mixtralkit.config import EngineConfig, ModelConfig, ParallelConfig, parse_dtype, shipped
from mixtralkit.distributed import RankContext
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.choose import Situation, candidates, choose, table
from mixtralkit.planning.fused_cost import MOST_RANKS
from mixtralkit.planning.hardware import Hardware, nearest
from mixtralkit.planning.memory import Room
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.trace import RoutingTrace

# Of the free memory, left for what is not predicted: buffers of NCCL and libraries, memory pools of graphs. Assumed.
RESERVE_GB = 1.0


def with_free_memory(config: EngineConfig, context: RankContext) -> EngineConfig:
    """The same with a ``memory_gb``, where plan ``auto`` needs one that is left out: the least free memory of the
    ranks' GPUs less ``RESERVE_GB``; on CPUs there is no limit. Collective, so that all ranks choose alike."""
    asked = config.parallel
    if str(asked.plan) != "auto" or asked.memory_gb is not None or context.device.type != "cuda":
        return config
    free = min(context.all_gather_objects(torch.cuda.mem_get_info(context.device)[0]))
    return config.but(memory_gb=max(free / 1e9 - RESERVE_GB, 1e-9))


def choose_automatically(
    model: ModelConfig, context: RankContext, config: EngineConfig
) -> tuple[ParallelConfig, ExpertPlan] | None:
    """The choice for ``model``'s sequences and tokens; None where no hardware file is for this device.

    Every rank chooses by itself and all choose the same. ValueError where nothing fits ``memory_gb``.
    """
    asked, moe, on_gpu = config.parallel, config.moe, context.device.type == "cuda"
    hardware = find_hardware(asked.hardware, context)
    if hardware is None:
        if asked.explain and context.is_first:
            print("plan auto: no hardware file has figures of this device, so nothing is predicted", file=sys.stderr)
        return None
    attention = asked.attention
    if attention == "auto" and (moe.faster.schedule or moe.copies_experts):
        attention = "dp"  # these need rows that travel
    wanted = on_gpu if moe.symmetric_rows is None else moe.symmetric_rows > 0
    wanted = wanted and moe.exchange != "exact" and moe.backend == "mixtralkit" and not moe.copies_experts
    dtype = parse_dtype(config.limits.dtype or ("bfloat16" if on_gpu else "float32"))
    room = Room(
        model.max_batch_size, model.max_seq_len, config.limits.prefill_budget,
        moe.symmetric_rows if wanted and context.world_size <= MOST_RANKS else 0,
        dtype.itemsize, moe.shadow_memory_gb if moe.copies_experts else 0.0, config.cache.page_size,
        config.cache.cache_tokens,
        parse_weights(config.limits.quantize),
    )  # fmt: skip
    situation = Situation(
        model, hardware, context.world_size, room, attention, asked.experts,
        None if asked.trace is None else RoutingTrace.load(asked.trace, model.num_experts),
        exchange=moe.exchange,
    )  # fmt: skip
    found = candidates(situation)
    chosen = choose(found, asked.memory_gb)
    if asked.explain and context.is_first:
        print(table(found, chosen, asked.memory_gb), file=sys.stderr, flush=True)
    return chosen.parallel, chosen.plan


def find_hardware(path: str | Path | None, context: RankContext) -> Hardware | None:
    """The machine of a file, or of those in ``configs/hardware`` for this GPU with all figures the nearest; else None.

    Nearest by the ranks that were measured.
    """
    if path is not None:
        return Hardware.load(shipped("hardware", path))
    if context.device.type != "cuda":
        return None
    gpu, needs_wires = torch.cuda.get_device_name(context.device), context.world_size > 1
    found = []
    for known in sorted(shipped("hardware").glob("*.json")):
        hardware = Hardware.load(known)
        fused = hardware.fused
        if hardware.gpu == gpu and fused is not None and (not needs_wires or None not in (fused.sums, fused.exchange)):
            found.append(hardware)
    return nearest(found, context.world_size) if found else None
