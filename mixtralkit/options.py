"""How a model is spread over ranks and run: the options that every command which builds one takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtralkit.automatic import Automatic
from mixtralkit.config import MoEOptions, parse_dtype


@dataclass(frozen=True)
class ModelOptions:
    """Options of ``Mixtral.load`` as a command line has them.

    Attributes:
        dtype: bfloat16, float16 or float32; left out, bfloat16 on a GPU and float32 on a CPU.
        device: cpu or cuda; left out, cuda where there is one.
        attention: tp splits heads over the ranks, dp the prompts; auto takes tp where the ranks divide the heads and
            faster_schedule, faster_shadow and dynamic are off.
        experts: ep gives each rank whole experts, tp a part of each; auto takes ep.
        plan: plan.json that says which ranks hold which experts; left out, each rank has its even share. auto takes the
            plan, and what attention and experts leave open, that are predicted to be fastest and fit the memory.
        exchange: How rows travel to experts: exact sends just what there is, static keeps every shape fixed; auto is
            static for decoding and exact otherwise.
        symmetric_rows: Most rows of a rank that travel through the GPUs' memory instead of by collectives, at least as
            many as a decode step has; left out, as many as that on GPUs, and 0, which turns this way off, on CPUs
            (docs/expert-parallel.md).
        faster_schedule: FasterMoE's smart schedule; left out, FMOE_FASTER_SCHEDULE_ENABLE decides.
        faster_shadow: FasterMoE's shadowing; left out, FMOE_FASTER_SHADOW_ENABLE decides.
        faster_group_size: Ranks of a group of the schedule; left out, FMOE_FASTER_GROUP_SIZE decides.
        shadow_memory_gb: Most memory for copies of other ranks' experts on each rank, in 10^9 bytes.
        moe_backend: mixtralkit, or fastmoe for the real library.
        dynamic: two_phase copies experts for the next layer while a layer computes (docs/two-phase.md); or none.
        popularity: Profile that two_phase estimates from; tools/profile_experts.py popularity makes one.
        finetune_threshold: Distance of estimated and real loads, 0 to 1, above which two_phase corrects; left out, it
            corrects where other experts are popular than estimated.
        hardware: File with the machine's speeds, configs/hardware/*.json, by which plan auto chooses and update_step
            moves experts; left out, plan auto takes the file of this GPU, update_step h200 or, on a CPU, cpu-2core.
        memory_gb: Most memory that plan auto may take on each rank, in 10^9 bytes; left out, what the GPUs have free,
            less one.
        trace: Routing trace that plan auto goes by; left out, it takes all experts as equally likely.
        explain: Print what plan auto predicted, for every layout and plan.
    """

    dtype: str | None = None
    device: str | None = None
    attention: str = "auto"
    experts: str = "auto"
    plan: Path | None = None
    exchange: str = "auto"
    symmetric_rows: int | None = None
    faster_schedule: bool | None = None
    faster_shadow: bool | None = None
    faster_group_size: int | None = None
    shadow_memory_gb: float = 4.0
    moe_backend: str = "mixtralkit"
    dynamic: str = "none"
    popularity: Path | None = None
    finetune_threshold: float | None = None
    hardware: Path | None = None
    memory_gb: float | None = None
    trace: Path | None = None
    explain: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            parse_dtype(self.dtype)
        self.moe(), self.automatic()  # say now what would be wrong later

    def moe(self) -> MoEOptions:
        """How the MoE layer runs; FasterMoE's switches that are None are those of ``FMOE_FASTER_*``."""
        return MoEOptions.from_env(
            self.faster_schedule, self.faster_shadow, self.faster_group_size,
            exchange=self.exchange, symmetric_rows=self.symmetric_rows, shadow_memory_gb=self.shadow_memory_gb,
            backend=self.moe_backend, dynamic=self.dynamic, popularity=self.popularity,
            finetune_threshold=self.finetune_threshold,
        )  # fmt: skip

    def automatic(self) -> Automatic:
        """What plan ``auto`` goes by."""
        return Automatic(self.hardware, self.memory_gb, self.trace, self.explain)

    def load_arguments(self) -> dict[str, Any]:
        """What ``Mixtral.load`` takes of them by name."""
        return {
            "dtype": self.dtype, "attention": self.attention, "experts": self.experts, "plan": self.plan,
            "options": self.moe(), "automatic": self.automatic(),
        }  # fmt: skip
