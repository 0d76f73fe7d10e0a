"""What a model is: its architecture, its numbers, and how it is spread over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mixtralkit.config.options import Options
from mixtralkit.json_file import load_json

if TYPE_CHECKING:
    import torch

# Name of a user -> torch's
DTYPES = {
    "float32": "float32", "fp32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16",
}  # fmt: skip


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"``, ``"bf16"`` or ``torch.bfloat16`` → ``torch.bfloat16``; ValueError for any other name."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype ({dtype}) must be one of {', '.join(DTYPES)}")
    import torch

    return getattr(torch, DTYPES[name])


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
                if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                    raise ValueError(f"{f.name} ({value!r}) must be a number above 0")
            elif (f.name == "sliding_window" and value is None) or f.name == "extra":
                continue
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{f.name} ({value!r}) must be a whole number of at least 1")
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
        return _from_hugging_face(params) if "hidden_size" in params else _from_mistral(params)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """``from_dict`` of a JSON file; errors name the file."""
        return load_json(path, cls.from_dict)

    def to_mistral(self) -> dict[str, Any]:
        """The content of a ``params.json``."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _MISTRAL_KEYS}
        if self.sliding_window is None:
            del own["sliding_window"]
        moe = {"num_experts": self.num_experts, "num_experts_per_tok": self.num_experts_per_tok}
        return {**self.extra, **own, "moe": moe}

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """The content of a ``config.json`` that ``transformers`` loads as ``MixtralForCausalLM``."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **{theirs: getattr(self, ours) for theirs, ours in _HUGGING_FACE_KEYS.items()},
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "sliding_window": self.sliding_window,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": dtype,
            "torch_dtype": dtype,
        }


_MISTRAL_KEYS = (
    "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size",
    "norm_eps", "rope_theta", "max_seq_len", "sliding_window",
)  # fmt: skip

# Hugging Face's key -> ours
_HUGGING_FACE_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
}

# Keys of a config.json that do not change what the model computes.
_HUGGING_FACE_IGNORED = {
    "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "hidden_act",
    "initializer_range", "mlp_bias", "model_type", "output_router_logits", "pad_token_id", "rope_parameters",
    "rope_scaling", "rope_theta", "router_aux_loss_coef", "router_jitter_noise", "sliding_window",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
}  # fmt: skip


def _known(params: Mapping[str, Any], known: set[str], where: str) -> dict[str, Any]:
    unknown = {key: value for key, value in params.items() if key not in known}
    if unknown:
        warnings.warn(f"unknown keys in {where}, kept and not used: {', '.join(sorted(unknown))}", stacklevel=4)
    return unknown


def _require(params: Mapping[str, Any], names: list[str], where: str) -> None:
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(f"{where} lacks: {', '.join(missing)}")


def _from_mistral(params: Mapping[str, Any]) -> ModelConfig:
    where = "Mistral's model parameters"
    required = ["dim", "n_layers", "hidden_dim", "n_heads", "vocab_size"]
    _require(params, required, where)
    moe = params.get("moe", {})
    if not isinstance(moe, Mapping):
        raise ValueError(f"moe ({moe!r}) must be an object with num_experts and num_experts_per_tok")
    _known(moe, {"num_experts", "num_experts_per_tok"}, "moe")
    extra = _known(params, {*_MISTRAL_KEYS, "moe", "max_batch_size"}, where)
    values = {key: params[key] for key in _MISTRAL_KEYS if params.get(key) is not None}
    values.setdefault("n_kv_heads", params["n_heads"])
    if "head_dim" not in values:
        values["head_dim"] = _derived_head_dim(params["dim"], params["n_heads"])
    return ModelConfig(**values, **{k: moe[k] for k in moe if k.startswith("num_experts")}, extra=extra)


def _from_hugging_face(params: Mapping[str, Any]) -> ModelConfig:
    where = "Hugging Face's model parameters"
    optional = {"head_dim", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"}
    _require(params, [key for key in _HUGGING_FACE_KEYS if key not in optional], where)
    for key, only in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("rope_scaling", None)):
        if params.get(key, only) != only:
            raise ValueError(f"{key} ({params[key]!r}) must be {only!r}: nothing else is a Mixtral")
    extra = _known(params, {*_HUGGING_FACE_KEYS, *_HUGGING_FACE_IGNORED}, where)
    values = {ours: params[theirs] for theirs, ours in _HUGGING_FACE_KEYS.items() if params.get(theirs) is not None}
    values.setdefault("n_kv_heads", values["n_heads"])
    if "head_dim" not in values:
        values["head_dim"] = _derived_head_dim(values["dim"], values["n_heads"])
    rope = params.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters.rope_type ({rope['rope_type']!r}) must be 'default'")
    theta = params.get("rope_theta") or rope.get("rope_theta") or 1e6
    window = params.get("sliding_window")
    window = int(window) if isinstance(window, str) and window.isdigit() else window  # the eight-file release has text
    return ModelConfig(**values, rope_theta=theta, sliding_window=window, extra=extra)


def _derived_head_dim(dim: Any, n_heads: Any) -> int:
    if not isinstance(dim, int) or not isinstance(n_heads, int) or n_heads < 1 or dim % n_heads:
        raise ValueError(f"head_dim is not given and dim ({dim!r}) is not a multiple of n_heads ({n_heads!r})")
    return dim // n_heads


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
