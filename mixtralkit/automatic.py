"""``plan="auto"``: the layout and plan that the time model says are fastest, of those that fit the memory."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from mixtralkit.config import EngineConfig, ModelConfig, ParallelConfig, parse_dtype, shipped
from mixtralkit.distributed import RankContext
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.fused_cost import MOST_RANKS
from mixtralkit.planning.hardware import USUAL_HOST, Hardware, nearest
from mixtralkit.planning.memory import RESERVE_GB as CONTEXT_GB
from mixtralkit.planning.memory import Room
from mixtralkit.planning.plan import ExpertPlan, Words
from mixtralkit.planning.search import Candidate, Situation, candidates, choose, squeezed, table
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
    model: ModelConfig, context: RankContext, config: EngineConfig, precision: Words | None = None
) -> tuple[ParallelConfig, ExpertPlan] | None:
    """The choice for ``model``'s sequences and tokens; None where no hardware file is for this device.

    Every rank chooses by itself and all choose the same. One GPU that is too small for the model gets experts in fewer
    bits, unless ``quantize`` or the checkpoint's ``precision`` says which, or some of them in the host's memory.
    ValueError where nothing fits ``memory_gb``.
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
        parse_weights(config.limits.quantize), parse_weights(config.limits.quantize_attention, "quantize_attention"),
    )  # fmt: skip
    behind = hardware.host or USUAL_HOST if on_gpu and moe.backend == "mixtralkit" else None
    situation = Situation(
        model, hardware, context.world_size, room, attention, asked.experts,
        None if asked.trace is None else RoutingTrace.load(asked.trace, model.num_experts),
        exchange=moe.exchange, may_round=config.limits.quantize is None and precision is None, host=behind,
    )  # fmt: skip
    budget = asked.memory_gb
    if config.tiers.gpu_memory_gb is not None and on_gpu:
        budget = min(config.tiers.gpu_memory_gb - CONTEXT_GB, budget or math.inf)
    found = candidates(situation)
    more = []
    if context.world_size == 1 and budget is not None and found and not any(one.fits(budget) for one in found):
        more = squeezed(situation, budget)
    fitting = [one for one in more if one.fits(budget)]
    chosen = fitting[0] if fitting else choose(found, budget)
    if context.is_first:
        if asked.explain:
            print(table([*found, *more], chosen, budget), file=sys.stderr)
        if fitting:
            print(_said(found[0], chosen, budget), file=sys.stderr, flush=True)
    return chosen.parallel, chosen.plan


def _said(whole: Candidate, chosen: Candidate, budget: float) -> str:
    """What was chosen where the model as it is does not fit."""
    per_s = chosen.execution.step_tokens / chosen.step_s
    why = f"plan auto: {whole.memory.total:.3g} GB as it is, and {budget:.3g} to use"
    return f"{why}: {'; '.join(chosen.plan.notes())}; {per_s:.0f} tokens/s predicted"


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
