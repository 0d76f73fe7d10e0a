"""What a model is: its architecture, its numbers, and how it is spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mixtralkit.config.options import Options
from mixtralkit.json_file import load_json, shown
from mixtralkit.model_parameters import HUGGING_FACE_KEYS, MISTRAL_KEYS, from_hugging_face, from_mistral

if TYPE_CHECKING:
    import torch

# Name of a user -> torch's
DTYPES = {
    "float32": "float32", "fp32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16",
}  # fmt: skip


# Bounds on what a file may claim, far above any Mixtral: what is built for a claim takes memory before any weight.
MOST = {"n_layers": 1024, "num_experts": 32768, "max_seq_len": 2**31 - 1, "sliding_window": 2**31 - 1}
MOST_OTHERWISE = 2**24
MOST_EXPERTS = 2**17


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"``, ``"bf16"`` or ``torch.bfloat16`` → ``torch.bfloat16``; ValueError for any other name."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype ({dtype}) must be one of {', '.join(DTYPES)}")
    import torch

    return getattr(torch, DTYPES[name])


def check_experts(layers: int, experts: int) -> None:
    """ValueError for more of them than a model may have; what tables of layers and experts have is bounded alike."""
    for name, value in (("n_layers", layers), ("num_experts", experts)):
        if value > MOST[name]:
            raise ValueError(f"{name} ({shown(value)}) must be at most {MOST[name]:,}")
    if layers * experts > MOST_EXPERTS:
        raise ValueError(f"n_layers ({layers}) times num_experts ({experts}) must be at most {MOST_EXPERTS:,}")


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
        check_experts(self.n_layers, self.num_experts)
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
class ParallelConfig(Options):
    """How a model is spread over ranks.

    Attributes:
        attention: tp splits heads over the ranks; dp gives each rank its own sequences and all attention weights;
            coherent is dp where every rank keeps the context of every sequence, so that a token's row may stay where
            its experts are.
        experts: tp splits each expert's hidden width over the ranks; ep gives each rank whole experts.
    """

    attention: Literal["tp", "dp", "coherent"] = "tp"
    experts: Literal["tp", "ep"] = "ep"

    def check(self) -> None:
        if self.attention == "coherent" and self.experts != "ep":
            raise ValueError(f"experts ({self.experts!r}) must be 'ep' with attention 'coherent': rows go to experts")
