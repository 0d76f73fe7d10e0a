"""What ``params.json`` and Hugging Face's ``config.json`` say of a model, as arguments of ``ModelConfig``.

A key is followed, or an error says that it cannot be, or it is named in a warning and kept. Defaults and precedence of
``config.json`` are those of transformers' ``MixtralConfig``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mixtralkit.json_file import shown

MISTRAL_KEYS = (
    "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size",
    "norm_eps", "rope_theta", "max_seq_len", "sliding_window",
)  # fmt: skip

# Hugging Face's key -> ours
HUGGING_FACE_KEYS = {
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

# What transformers takes where the key is absent.
_DEFAULTS = {"n_kv_heads": 8, "max_seq_len": 4096 * 32, "num_experts": 8, "num_experts_per_tok": 2}

# Keys of a config.json that do not change what the model computes, or that are read elsewhere.
_READ_OR_HARMLESS = {
    "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "hidden_act",
    "initializer_range", "mlp_bias", "model_type", "num_experts", "output_router_logits", "pad_token_id",
    "partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta", "router_aux_loss_coef",
    "router_jitter_noise", "sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
    "_name_or_path",
}  # fmt: skip


def from_mistral(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a ``params.json`` gives."""
    where = "Mistral's model parameters"
    _require(params, ["dim", "n_layers", "hidden_dim", "n_heads", "vocab_size"], where)
    moe = params.get("moe", {})
    if not isinstance(moe, Mapping):
        raise ValueError(f"moe ({shown(moe)}) must be an object with num_experts and num_experts_per_tok")
    _unknown(moe, {"num_experts", "num_experts_per_tok"}, "moe")
    extra = _unknown(params, {*MISTRAL_KEYS, "moe", "max_batch_size"}, where)
    values = {key: params[key] for key in MISTRAL_KEYS if params.get(key) is not None}
    values.setdefault("n_kv_heads", params["n_heads"])
    if "head_dim" not in values:
        values["head_dim"] = _derived_head_dim(params["dim"], params["n_heads"])
    experts = {key: moe[key] for key in ("num_experts", "num_experts_per_tok") if key in moe}
    return {**values, **experts, "extra": extra}


def from_hugging_face(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a ``config.json`` of transformers 4 or 5 gives."""
    where = "Hugging Face's model parameters"
    _require(params, ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size"],
             where)  # fmt: skip
    for key, only in (("model_type", "mixtral"), ("hidden_act", "silu"), ("tie_word_embeddings", False)):
        if params.get(key, only) != only:
            raise ValueError(f"{key} ({shown(params[key])}) must be {only!r}: nothing else is a Mixtral that is read")
    extra = _unknown(params, {*HUGGING_FACE_KEYS, *_READ_OR_HARMLESS}, where)
    values = {ours: params[theirs] for theirs, ours in HUGGING_FACE_KEYS.items() if params.get(theirs) is not None}
    if "num_local_experts" not in params and "num_experts" in params:
        values["num_experts"] = params["num_experts"]
    if "num_key_value_heads" in params:
        values.setdefault("n_kv_heads", values["n_heads"])  # null: as many as heads
    values = {**_DEFAULTS, **values}
    if "head_dim" not in values:
        values["head_dim"] = _derived_head_dim(values["dim"], values["n_heads"])
    window = params.get("sliding_window")
    window = int(window) if isinstance(window, str) and window.isdigit() else window  # the eight-file release has text
    return {**values, "rope_theta": _rope_theta(params), "sliding_window": window, "extra": extra}


def _rope_theta(params: Mapping[str, Any]) -> Any:
    """RoPE's base. ``rope_scaling``, transformers 4's name, goes before ``rope_parameters``, transformers 5's; a base
    inside either goes before ``rope_theta`` beside them."""
    key = "rope_scaling" if params.get("rope_scaling") else "rope_parameters"
    rope = params.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key} ({shown(rope)}) must be null or an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{key}: rope_type ({shown(kind)}) must be 'default': other RoPE scalings are not read")
    per_layer = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if per_layer:
        raise ValueError(f"{key}: parameters by kind of layer ({', '.join(per_layer)}) are not read")
    rest = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")}
    if rest:
        raise ValueError(f"{key}: {', '.join(sorted(rest))} cannot be followed with rope_type 'default'")
    share = rope.get("partial_rotary_factor", params.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor ({shown(share)}) must be 1: a Mixtral turns all of a head")
    inside, beside = rope.get("rope_theta"), params.get("rope_theta")
    if inside is not None and beside is not None and inside != beside:
        warnings.warn(
            f"rope_theta is {shown(beside)}, and {shown(inside)} in {key}, which goes first as in transformers",
            stacklevel=5,
        )
    return next((theta for theta in (inside, beside) if theta is not None), 1e6)


def _unknown(params: Mapping[str, Any], known: set[str], where: str) -> dict[str, Any]:
    unknown = {key: value for key, value in params.items() if key not in known}
    if unknown:
        names = ", ".join(name if len(name) <= 40 else f"{name[:39]}…" for name in sorted(unknown)[:20])
        warnings.warn(f"unknown keys in {where}, kept and not used: {names}", stacklevel=5)
    return unknown


def _require(params: Mapping[str, Any], names: list[str], where: str) -> None:
    missing = [name for name in names if params.get(name) is None]
    if missing:
        raise ValueError(f"{where} lacks: {', '.join(missing)}")


def _derived_head_dim(dim: Any, n_heads: Any) -> int:
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (dim, n_heads))
    if not whole or n_heads < 1 or dim % n_heads:
        raise ValueError(
            f"head_dim is not given and dim ({shown(dim)}) is not a multiple of n_heads ({shown(n_heads)})"
        )
    return dim // n_heads
