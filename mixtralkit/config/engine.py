"""Every option of an engine, in frozen groups; the only reader of ``FMOE_*`` environment variables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from mixtralkit.config.model import DTYPES
from mixtralkit.config.options import (
    Called,
    Count,
    Natural,
    Options,
    Positive,
    Rule,
    Seed,
    Share,
    Variable,
)  # fmt: skip
from mixtralkit.moe.weights import ATTENTION_FORMATS, FORMATS

Quantize = Annotated[str, Rule(f"one of {', '.join(FORMATS)}", FORMATS.__contains__)]
QuantizeAttention = Annotated[str, Rule(f"one of {', '.join(ATTENTION_FORMATS)}", ATTENTION_FORMATS.__contains__)]
Dtype = Annotated[str, Rule(f"one of {', '.join(DTYPES)}", lambda dtype: str(dtype).removeprefix("torch.") in DTYPES)]
PageSize = Annotated[
    int, Rule("that is a power of two of at least 16", lambda size: size >= 16 and size & (size - 1) == 0)
]


@dataclass(frozen=True)
class SourceOptions(Options):
    """Where the model comes from.

    Attributes:
        model: Folder with the checkpoint, of any format that docs/checkpoints.md lists, or a .gguf file.
        tokenizer: Sentencepiece model or tokenizer.json; left out, the one in the model's folder or in the .gguf file.
        format: Which checkpoint to take where the folder holds several, as convert calls them.
        chat_template: Jinja file that dialogs are written by; left out, the folder's, or else Mistral's.
        stop_token_ids: Ids that end an answer, beside those that the folder's files say.
    """

    model: Path = Path("ckpts")
    tokenizer: Path | None = None
    format: str | None = None
    chat_template: Path | None = None
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ParallelOptions(Options):
    """How the model is spread over the ranks.

    Attributes:
        attention: tp splits heads over the ranks, dp the sequences; coherent is dp with every sequence's context on
            every rank; auto takes tp where the ranks divide the heads and faster_schedule, faster_shadow and dynamic
            are off.
        experts: ep gives each rank whole experts, tp a part of each; auto takes ep.
        plan: plan.json that says which ranks hold which experts; left out, each rank has its even share. auto takes the
            plan, and what attention and experts leave open, that are predicted to be fastest and fit the memory
            (docs/cost-model.md).
        hardware: The machine's speeds, by which plan auto chooses and update_step moves experts: a file, or the name of
            one in configs/hardware; left out, plan auto takes the file of this GPU, update_step h200 or, on a CPU,
            cpu-2core.
        memory_gb: Most memory that plan auto may take on each rank, in 10^9 bytes; left out, what the GPUs have free,
            less one.
        trace: Routing trace that plan auto goes by; left out, it takes all experts as equally likely.
        explain: Print what plan auto predicted, for every layout and plan.
    """

    attention: Literal["auto", "tp", "dp", "coherent"] = "auto"
    experts: Literal["auto", "tp", "ep"] = "auto"
    plan: Path | None = None  # in Python also an ExpertPlan
    hardware: Path | None = None
    memory_gb: Positive | None = None
    trace: Path | None = None
    explain: bool = False

    def check(self) -> None:
        if self.attention == "coherent" and self.experts == "tp":
            raise ValueError("experts ('tp') must be 'ep' with attention 'coherent': rows go to experts")

    def check_auto(self) -> None:
        """ValueError for what only plan ``auto`` goes by, with another plan; whoever runs one plan asks."""
        for name in ("memory_gb", "trace", "explain") if str(self.plan) != "auto" else ():
            if getattr(self, name) not in (None, False):
                raise ValueError(f"{name} ({getattr(self, name)}) needs plan 'auto', which goes by it")


@dataclass(frozen=True)
class FasterOptions(Options):
    """FasterMoE's switches, and the figures of its shadow model.

    Attributes:
        schedule: FasterMoE's smart schedule; it turns itself off between GPUs that reach each other's memory, where it
            never paid (docs/smart-schedule.md).
        shadow: FasterMoE's shadowing (docs/shadowing.md).
        group_size: Ranks of a group of the schedule.
        net_bandwidth: Of the network, in bytes/s, for the shadow model.
        gpu_throughput: In FLOP/s, for the shadow model.
        alpha: Expert hidden width / d_model, for the shadow model; left out, the model's.
        d_model: Width of a row, for the shadow model; left out, the model's.
        schedule_force: Keep the schedule between such GPUs too.
    """

    prefix = "faster_"

    schedule: Annotated[bool, Variable("FMOE_FASTER_SCHEDULE_ENABLE")] = False
    shadow: Annotated[bool, Variable("FMOE_FASTER_SHADOW_ENABLE")] = False
    group_size: Annotated[Count, Variable("FMOE_FASTER_GROUP_SIZE")] = 4
    net_bandwidth: Annotated[Positive, Variable("FMOE_FASTER_GLBPLC_NETBW")] = 6.25e9
    gpu_throughput: Annotated[Positive, Variable("FMOE_FASTER_GLBPLC_GPUTP")] = 11.5e12
    alpha: Annotated[Positive | None, Variable("FMOE_FASTER_GLBPLC_ALPHA")] = None
    d_model: Annotated[Count | None, Variable("FMOE_FASTER_GLBPLC_DMODEL")] = None
    schedule_force: Annotated[bool, Variable("FMOE_FASTER_SCHEDULE_FORCE")] = False


@dataclass(frozen=True)
class TopologyOptions(Options):
    """What FastMoE's topology-aware gate knows of the machine.

    Attributes:
        gpus_per_node: Ranks that share a fast network.
        outgoing_fraction: Most of a rank's rows that leave it.
    """

    gpus_per_node: Annotated[Count, Variable("FMOE_TOPO_GPUS_PER_NODE")] = 8
    outgoing_fraction: Annotated[Share, Variable("FMOE_TOPO_OUTGOING_FRACTION")] = 0.14


@dataclass(frozen=True)
class MoEOptions(Options):
    """How the MoE layer runs a plan. None of it changes what is computed.

    Attributes:
        exchange: How rows travel to experts: exact sends just what there is; static keeps room for every row of every
            rank, so that no shape depends on the routing; auto is as docs/expert-parallel.md says.
        symmetric_rows: Rows of a rank for which the GPUs' memory has room, no fewer than a decode step has; larger
            steps go in pieces. It takes memory for 2 · ranks rows for each. Left out, 8192 on GPUs, and on CPUs 0,
            which turns this off (docs/expert-parallel.md).
        shadow_memory_gb: Most memory for copies of other ranks' experts on each rank, in 10^9 bytes, with
            faster_shadow or dynamic.
        backend: mixtralkit, or fastmoe for the real library (docs/fastmoe.md).
        dynamic: two_phase copies experts for the next layer while a layer computes (docs/two-phase.md); or none.
        popularity: Profile that two_phase estimates from; the command popularity makes one.
        finetune_threshold: Distance of estimated and real loads above which two_phase corrects; left out, it corrects
            where other experts are popular than estimated.
    """

    faster: FasterOptions = field(default_factory=FasterOptions)
    exchange: Literal["auto", "exact", "static"] = "auto"
    symmetric_rows: Natural | None = None
    shadow_memory_gb: Positive = 4.0
    backend: Annotated[Literal["mixtralkit", "fastmoe"], Called("moe_backend")] = "mixtralkit"
    dynamic: Literal["none", "two_phase"] = "none"
    popularity: Path | None = None
    finetune_threshold: Share | None = None

    @property
    def copies_experts(self) -> bool:
        """Whether experts are copied to other ranks while the model runs."""
        return self.faster.shadow or self.dynamic == "two_phase"

    def check(self) -> None:
        if self.dynamic == "none":
            for name in ("popularity", "finetune_threshold"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} ({getattr(self, name)}) needs dynamic 'two_phase'")
        elif self.popularity is None:
            raise ValueError(
                "popularity must name a profile with dynamic 'two_phase'; "
                "mixtralkit popularity TRACE --output FILE makes one"
            )
        elif self.backend == "fastmoe":
            raise ValueError("dynamic ('two_phase') needs moe_backend 'mixtralkit'")


@dataclass(frozen=True)
class TierOptions(Options):
    """Experts in the host's memory behind a GPU (docs/host-memory.md). None of it changes the text.

    Attributes:
        gpu_memory_gb: Most memory that a rank takes of its GPU, in 10^9 bytes, with keys, values and all else; experts
            for which there is no room lie in the host's memory. Left out, the plan says where experts are. On a CPU
            there is one memory, and this has no meaning.
        host_memory_gb: Most memory of the host that a rank's experts take then, in 10^9 bytes; left out, what is free.
            Experts of further layers stay in a checkpoint that is in the format mixtralkit for one rank.
        misses: Who computes an expert that is not on the GPU: cpu where it lies, fetch the GPU after a copy, auto
            whoever is faster, or both.
        expert_cache: What makes way on the GPU: lru what was used longest ago, frequency what was used least.
        expert_prefetch: Fetch what the next layer is likely to want.
    """

    gpu_memory_gb: Positive | None = None
    host_memory_gb: Positive | None = None
    misses: Literal["auto", "cpu", "fetch"] = "auto"
    expert_cache: Literal["lru", "frequency"] = "lru"
    expert_prefetch: bool = True

    def check(self) -> None:
        if self.host_memory_gb is not None and self.gpu_memory_gb is None:
            raise ValueError(f"host_memory_gb ({self.host_memory_gb}) needs gpu_memory_gb, behind which it stands")


@dataclass(frozen=True)
class CacheOptions(Options):
    """Keys and values.

    Attributes:
        max_seq_len: Most tokens of a sequence, prompt and answer; left out, what the model can or the command needs.
        cache_tokens: Most tokens in the cache, over all ranks; sequences wait for room, or are computed again later,
            where they outgrow it. Left out, max_batch_size sequences of max_seq_len.
        cache_share: Instead, this share of the GPUs' memory that the weights leave; steps need some of it, too.
        prefix_reuse: What is in the cache of earlier prompts that began alike is not computed again.
        page_size: Tokens of a page. A sequence takes memory page by page.
    """

    max_seq_len: Count | None = None
    cache_tokens: Count | None = None
    cache_share: Share | None = None
    prefix_reuse: bool = True
    page_size: PageSize = 128

    def check(self) -> None:
        if self.cache_tokens is not None and self.cache_share is not None:
            raise ValueError(f"cache_share ({self.cache_share}) cannot be given with cache_tokens: both say how much")


@dataclass(frozen=True)
class LimitOptions(Options):
    """How much runs at a time, on what, in which numbers.

    Attributes:
        max_batch_size: Sequences that run at a time, over all ranks; more of them wait.
        prefill_budget: Most prompt tokens that a rank runs in one step; more take more memory.
        mixed_budget: Most of them in a step while few sequences begin beside those that decode, which it keeps
            waiting.
        cuda_graphs: Capture decode steps as CUDA graphs, where the device has them.
        seed: Decides what is drawn at a temperature above 0; the same seed gives the same text.
        dtype: bfloat16, float16 or float32; left out, bfloat16 on a GPU and float32 on a CPU.
        quantize: Round the experts' weights to this format while they load; int4 is int4:32, fp8 is fp8:channel. Left
            out, they stay as the checkpoint has them (docs/quantised.md).
        quantize_attention: Round attention's projections and the output matrix to int8 or fp8 while they load. Left
            out, they are in dtype, or as mixtralkit convert has rounded them.
        device: cpu or cuda; left out, cuda where there is one.
        num_gpus: The number of ranks, for scripts that state it; torchrun decides it.
    """

    max_batch_size: Count = 8
    prefill_budget: Count = 8192
    mixed_budget: Count = 768
    cuda_graphs: bool = True
    seed: Seed = 1
    dtype: Dtype | None = None
    quantize: Quantize | None = None
    quantize_attention: QuantizeAttention | None = None
    device: str | None = None
    num_gpus: Count | None = None

    @property
    def formats(self) -> dict[str, str]:
        """The formats that weights are rounded to, by option."""
        named = {"quantize": self.quantize, "quantize_attention": self.quantize_attention}
        return {option: name for option, name in named.items() if name is not None}


@dataclass(frozen=True)
class EngineConfig(Options):
    """Every option of an engine.

    ``EngineConfig.of(model="ckpts", attention="dp", moe=MoEOptions(exchange="static"))`` takes options by name, and
    whole groups; ``.but(max_seq_len=1024)`` changes some.
    """

    source: SourceOptions = field(default_factory=SourceOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    moe: MoEOptions = field(default_factory=MoEOptions)
    tiers: TierOptions = field(default_factory=TierOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
