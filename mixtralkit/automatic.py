"""``plan="auto"``: the layout and plan that the time model says are fastest, of those that fit the memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixtralkit.config import ModelConfig, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.planning.choose import Situation, candidates, choose, table
from mixtralkit.planning.fused_cost import MOST_RANKS
from mixtralkit.planning.hardware import Hardware, nearest
from mixtralkit.planning.memory import Room
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.trace import RoutingTrace

# Of the free memory, left for what is not predicted: buffers of NCCL and libraries, memory pools of graphs. Assumed.
RESERVE_GB = 1.0
MACHINES = Path(__file__).resolve().parents[1] / "configs" / "hardware"


@dataclass(frozen=True)
class Automatic:
    """What the choice goes by.

    Attributes:
        hardware: file with the machine's figures; None for the one in ``configs/hardware`` with this device's name.
        memory_gb: most 10⁹ bytes a rank may take; None, once ``resolved``, is the least free memory of the ranks' GPUs
            less ``RESERVE_GB``, and no limit on CPUs.
        trace: routing to plan by, a file; None takes all experts as equally likely.
        explain: print every candidate on rank 0's stderr.
        data_bytes, prefill_budget: of the run that is planned; ``resolved`` fills them in.
    """

    hardware: str | Path | None = None
    memory_gb: float | None = None
    trace: str | Path | None = None
    explain: bool = False
    data_bytes: int = 2
    prefill_budget: int = 8192

    def __post_init__(self) -> None:
        if self.memory_gb is not None and not 0 < self.memory_gb < float("inf"):
            raise ValueError(f"memory_gb ({self.memory_gb!r}) must be a number above 0")

    def resolved(self, context: RankContext, dtype: torch.dtype, prefill_budget: int) -> Automatic:
        """With what only the running ranks know. Collective, so that all of them choose alike."""
        budget_gb = self.memory_gb
        if budget_gb is None and context.device.type == "cuda":
            free = min(context.all_gather_objects(torch.cuda.mem_get_info(context.device)[0]))
            budget_gb = max(free / 1e9 - RESERVE_GB, 1e-9)
        return replace(self, memory_gb=budget_gb, data_bytes=dtype.itemsize, prefill_budget=prefill_budget)


def choose_automatically(
    config: ModelConfig, context: RankContext, attention: str, experts: str, options: MoEOptions, automatic: Automatic
) -> tuple[ParallelConfig, ExpertPlan] | None:
    """The choice for ``config``'s sequences and tokens; None where no hardware file is for this device.

    Every rank chooses by itself and all choose the same. ValueError where nothing fits ``automatic.memory_gb``.
    """
    hardware = find_hardware(automatic.hardware, context)
    if hardware is None:
        if automatic.explain and context.is_first:
            print("plan auto: no hardware file has figures of this device, so nothing is predicted", file=sys.stderr)
        return None
    if attention == "auto" and (options.faster.schedule or options.copies_experts):
        attention = "dp"  # these need rows that travel
    wanted = context.device.type == "cuda" if options.symmetric_rows is None else options.symmetric_rows > 0
    wanted = wanted and options.exchange != "exact" and options.backend == "mixtralkit" and not options.copies_experts
    symmetric_rows = options.symmetric_rows if wanted and context.world_size <= MOST_RANKS else 0
    situation = Situation(
        config, hardware, context.world_size,
        Room(
            config.max_batch_size, config.max_seq_len, automatic.prefill_budget, symmetric_rows,
            automatic.data_bytes, options.shadow_memory_gb if options.copies_experts else 0.0,
        ),
        attention, experts, None if automatic.trace is None else RoutingTrace.load(automatic.trace, config.num_experts),
        exchange=options.exchange,
    )  # fmt: skip
    found = candidates(situation)
    chosen = choose(found, automatic.memory_gb)
    if automatic.explain and context.is_first:
        print(table(found, chosen, automatic.memory_gb), file=sys.stderr, flush=True)
    return chosen.parallel, chosen.plan


def find_hardware(path: str | Path | None, context: RankContext) -> Hardware | None:
    """The machine of a file, or of those in ``configs/hardware`` for this GPU with all figures the nearest; else None.

    Nearest by the ranks that were measured.
    """
    if path is not None:
        return Hardware.load(path)
    if context.device.type != "cuda":
        return None
    gpu, needs_wires = torch.cuda.get_device_name(context.device), context.world_size > 1
    found = []
    for known in sorted(MACHINES.glob("*.json")):
        hardware = Hardware.load(known)
        fused = hardware.fused
        if hardware.gpu == gpu and fused is not None and (not needs_wires or None not in (fused.sums, fused.exchange)):
            found.append(hardware)
    return nearest(found, context.world_size) if found else None
