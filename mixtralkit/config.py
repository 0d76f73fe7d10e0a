"""Frozen settings and their rules; the only reader of ``FMOE_*`` environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from mixtralkit.json_file import load_json, shown
from mixtralkit.model_parameters import HUGGING_FACE_KEYS, MISTRAL_KEYS, from_hugging_face, from_mistral

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


# Bounds on what a file may claim, far above any Mixtral: what is built for a claim takes memory before any weight.
MOST = {"n_layers": 1024, "num_experts": 32768, "max_seq_len": 2**31 - 1, "sliding_window": 2**31 - 1}
MOST_OTHERWISE = 2**24
MOST_EXPERTS = 2**17


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"``, ``"bf16"`` or ``torch.bfloat16`` → ``torch.bfloat16``; ValueError for any other name."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if str(dtype) in DTYPES:
        return DTYPES[str(dtype)]
    raise ValueError(f"dtype ({dtype}) must be one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Mixtral, in Mistral's ``params.json`` vocabulary.

    ``max_seq_len`` (tokens) and ``max_batch_size`` (sequences) size the KV cache. ``sliding_window`` is how many
    keys, its own included, a query sees; None sees all. ``extra`` keeps keys of the file that this code does not
    know, so that a converted checkpoint still has them.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    max_seq_len: int = 32768
    max_batch_size: int = 1
    sliding_window: int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("norm_eps", "rope_theta"):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
                    raise ValueError(f"{f.name} ({shown(value)}) must be a finite number above 0")
            elif (f.name == "sliding_window" and value is None) or f.name == "extra":
                continue
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{f.name} ({shown(value)}) must be a whole number of at least 1")
            elif value > MOST.get(f.name, MOST_OTHERWISE):
                raise ValueError(f"{f.name} ({shown(value)}) must be at most {MOST.get(f.name, MOST_OTHERWISE):,}")
        if self.n_layers * self.num_experts > MOST_EXPERTS:
            raise ValueError(
                f"n_layers ({self.n_layers}) times num_experts ({self.num_experts}) must be at most {MOST_EXPERTS:,}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embeddings turn pairs of features")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be at least num_experts_per_tok ({self.num_experts_per_tok})"
            )

    def with_limits(self, max_seq_len: int | None, max_batch_size: int | None) -> ModelConfig:
        """The same model with other cache limits; None keeps what is set."""
        return replace(
            self,
            max_seq_len=self.max_seq_len if max_seq_len is None else max_seq_len,
            max_batch_size=self.max_batch_size if max_batch_size is None else max_batch_size,
        )

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> ModelConfig:
        """Reads ``params.json`` in Mistral's keys, or a ``config.json`` in Hugging Face's; unknown keys warn."""
        if not isinstance(params, Mapping):
            raise ValueError(f"model parameters must be a JSON object, not {type(params).__name__}")
        return cls(**(from_hugging_face(params) if "hidden_size" in params else from_mistral(params)))

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """``from_dict`` of a JSON file; errors name the file."""
        return load_json(path, cls.from_dict)

    def to_mistral(self) -> dict[str, Any]:
        """The content of a ``params.json``."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in MISTRAL_KEYS}
        if self.sliding_window is None:
            del own["sliding_window"]
        moe = {"num_experts": self.num_experts, "num_experts_per_tok": self.num_experts_per_tok}
        return {**self.extra, **own, "moe": moe}

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """The content of a ``config.json`` that ``transformers`` loads as ``MixtralForCausalLM``."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **self.extra,
            **{theirs: getattr(self, ours) for theirs, ours in HUGGING_FACE_KEYS.items()},
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "sliding_window": self.sliding_window,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": dtype,
            "torch_dtype": dtype,
        }


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is spread: ``attention`` in tp, dp; ``experts`` in tp, ep (DESIGN §2).

    ``tp`` splits heads (attention) or each expert's hidden width (experts) over the ranks; ``dp`` gives each rank
    its own sequences and all attention weights; ``ep`` gives each rank whole experts.
    """

    attention: str = "tp"
    experts: str = "ep"

    def __post_init__(self) -> None:
        if self.attention not in ("tp", "dp"):
            raise ValueError(f"attention ({self.attention!r}) must be 'tp' or 'dp'")
        if self.experts not in ("tp", "ep"):
            raise ValueError(f"experts ({self.experts!r}) must be 'tp' or 'ep'")


@dataclass(frozen=True)
class FasterOptions:
    """FasterMoE's switches, and the figures of its shadow model.

    ``net_bandwidth`` in bytes/s, ``gpu_throughput`` in FLOP/s, ``alpha`` = expert hidden width / ``d_model``;
    ``alpha`` and ``d_model`` of None are taken from the model. ``schedule`` turns itself off between GPUs that reach
    each other's memory, where it never paid, unless ``schedule_force`` (docs/smart-schedule.md).
    """

    schedule: bool = False
    shadow: bool = False
    group_size: int = 4
    net_bandwidth: float = 6.25e9
    gpu_throughput: float = 11.5e12
    alpha: float | None = None
    d_model: int | None = None
    schedule_force: bool = False

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> FasterOptions:
        """Reads ``FMOE_FASTER_*`` of ``environ`` (None: of the process).

        A value that FastMoE does not accept is a ValueError that names its variable.
        """
        environ = os.environ if environ is None else environ
        return cls(
            schedule=_switch(environ, "FMOE_FASTER_SCHEDULE_ENABLE"),
            shadow=_switch(environ, "FMOE_FASTER_SHADOW_ENABLE"),
            group_size=_number(environ, "FMOE_FASTER_GROUP_SIZE", int, 4),
            net_bandwidth=_number(environ, "FMOE_FASTER_GLBPLC_NETBW", float, 6.25e9),
            gpu_throughput=_number(environ, "FMOE_FASTER_GLBPLC_GPUTP", float, 11.5e12),
            alpha=_number(environ, "FMOE_FASTER_GLBPLC_ALPHA", float, None),
            d_model=_number(environ, "FMOE_FASTER_GLBPLC_DMODEL", int, None),
            schedule_force=_switch(environ, "FMOE_FASTER_SCHEDULE_FORCE"),
        )


@dataclass(frozen=True)
class TopologyOptions:
    """What FastMoE's topology-aware gate knows of the machine.

    ``gpus_per_node`` ranks share a fast network; at most ``outgoing_fraction`` [0, 1] of a rank's rows leave it.
    """

    gpus_per_node: int = 8
    outgoing_fraction: float = 0.14

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ValueError(f"gpus_per_node ({self.gpus_per_node}) must be at least 1")
        if not 0 <= self.outgoing_fraction <= 1:
            raise ValueError(f"outgoing_fraction ({self.outgoing_fraction}) must lie in [0, 1]")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> TopologyOptions:
        """Reads ``FMOE_TOPO_*`` of ``environ`` (None: of the process); errors name the variable."""
        environ = os.environ if environ is None else environ
        fraction = _number(environ, "FMOE_TOPO_OUTGOING_FRACTION", float, 0.14)
        if fraction > 1:
            raise ValueError(f"FMOE_TOPO_OUTGOING_FRACTION ({fraction}) must be at most 1")
        return cls(_number(environ, "FMOE_TOPO_GPUS_PER_NODE", int, 8), fraction)


@dataclass(frozen=True)
class MoEOptions:
    """How the MoE layer runs a plan. None of it changes what is computed.

    Attributes:
        faster: FasterMoE's switches.
        exchange: ``"exact"`` sends just the rows there are; ``"static"`` keeps room for every row of every rank, so
            that no shape depends on the routing and nothing waits for the host; ``"auto"`` is static for decode
            steps and exact otherwise.
        symmetric_rows: most rows of a rank that go to their experts through the GPUs' memory, by kernels and not by
            collectives, which takes memory for 2 · ranks rows for each (docs/expert-parallel.md): 0 for none; a number
            below what a decode step has counts as that, and so does None on GPUs. On CPUs, where a twin takes every
            row everywhere, None is 0.
        shadow_memory_gb: most memory for copies of other ranks' experts on each rank, in 10⁹ bytes, with
            ``faster.shadow`` or ``dynamic``.
        backend: ``"mixtralkit"``, or ``"fastmoe"`` for the real library.
        dynamic: ``"two_phase"`` copies experts for the next layer while a layer computes (docs/two-phase.md), or
            ``"none"``.
        popularity: the profile (``planning.popularity``) that ``two_phase`` estimates from, a file.
        finetune_threshold: total-variation distance [0, 1] of estimated and real shares above which ``two_phase``
            corrects; None corrects where the 2K most popular experts are not the estimated ones.
    """

    faster: FasterOptions = field(default_factory=FasterOptions)
    exchange: str = "auto"
    symmetric_rows: int | None = None
    shadow_memory_gb: float = 4.0
    backend: str = "mixtralkit"
    dynamic: str = "none"
    popularity: str | Path | None = None
    finetune_threshold: float | None = None

    @property
    def copies_experts(self) -> bool:
        """Whether experts are copied to other ranks while the model runs."""
        return self.faster.shadow or self.dynamic == "two_phase"

    def __post_init__(self) -> None:
        if self.exchange not in ("auto", "exact", "static"):
            raise ValueError(f"exchange ({self.exchange!r}) must be 'auto', 'exact' or 'static'")
        rows = self.symmetric_rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 0):
            raise ValueError(f"symmetric_rows ({rows!r}) must be a whole number of at least 0")
        memory = self.shadow_memory_gb
        if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory < float("inf"):
            raise ValueError(f"shadow_memory_gb ({memory!r}) must be a number above 0")
        if self.backend not in ("mixtralkit", "fastmoe"):
            raise ValueError(f"moe_backend ({self.backend!r}) must be 'mixtralkit' or 'fastmoe'")
        self._check_dynamic()

    def _check_dynamic(self) -> None:
        if self.dynamic not in ("none", "two_phase"):
            raise ValueError(f"dynamic ({self.dynamic!r}) must be 'none' or 'two_phase'")
        if self.dynamic == "none":
            for name in ("popularity", "finetune_threshold"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} ({getattr(self, name)}) needs dynamic 'two_phase'")
            return
        if self.popularity is None:
            raise ValueError(
                "popularity must name a profile with dynamic 'two_phase'; "
                "tools/profile_experts.py popularity TRACE --output FILE makes one"
            )
        if self.backend == "fastmoe":
            raise ValueError("dynamic ('two_phase') needs moe_backend 'mixtralkit'")
        limit = self.finetune_threshold
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit <= 1):
            raise ValueError(f"finetune_threshold ({limit!r}) must be a number in [0, 1]")

    @classmethod
    def from_env(
        cls,
        schedule: bool | None = None,
        shadow: bool | None = None,
        group_size: int | None = None,
        environ: Mapping[str, str] | None = None,
        **others: Any,
    ) -> MoEOptions:
        """FasterMoE's switches as given, those of None from ``FMOE_FASTER_*``; ``others`` are this class's own."""
        if group_size is not None and group_size < 1:
            raise ValueError(f"faster_group_size ({group_size}) must be at least 1")
        given = {"schedule": schedule, "shadow": shadow, "group_size": group_size}
        faster = FasterOptions.from_env(environ)
        return cls(replace(faster, **{name: value for name, value in given.items() if value is not None}), **others)


def _switch(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    if value in ("1", "ON"):
        return True
    if value in ("", "0", "OFF"):
        return False
    raise ValueError(f"{name} ({value!r}) must be 1 or ON to enable, 0 or OFF to disable")


def _number(environ: Mapping[str, str], name: str, kind: type, default):
    text = environ.get(name)
    if text is None or text == "":
        return default
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not 0 < value < float("inf"):
        raise ValueError(f"{name} ({text!r}) must be a {'whole ' if kind is int else ''}number above 0")
    return value
