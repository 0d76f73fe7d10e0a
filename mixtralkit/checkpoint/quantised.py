"""Which quantisation a checkpoint says that it has, and what those are called that are not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mixtralkit.json_file import shown

# quant_method in config.json -> what people call it, where it is not read (``foreign.METHODS`` are)
REFUSED = {
    "modelopt": "ModelOpt", "aqlm": "AQLM", "quanto": "quanto",
    "eetq": "EETQ", "exl2": "EXL2", "exl3": "EXL3", "torchao": "torchao", "gguf": "GGUF", "mxfp4": "MXFP4",
    "marlin": "Marlin", "auto-round": "AutoRound", "vptq": "VPTQ", "higgs": "HIGGS", "spqr": "SpQR",
    "quark": "Quark", "bitnet": "BitNet", "modelopt_fp8": "ModelOpt",
}  # fmt: skip

# The end of a tensor's name that only such a file has -> method
_TENSORS = {
    ".absmax": "bitsandbytes", ".quant_map": "bitsandbytes", ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".SCB": "bitsandbytes (int8)", ".weight_packed": "compressed-tensors", ".weight_scale_inv": "FP8 (in blocks)",
    ".weight_scale": "FP8", ".W_q": "HQQ", ".g_idx": "GPTQ", ".qzeros": "AWQ or GPTQ", ".qweight": "AWQ or GPTQ",
    ".q_invperm": "EXL2", ".biases": "MLX",
}  # fmt: skip

_FILES = {".ggml": "GGML"}

STATED_IN = ("quantization_config", "compression_config", "quantization")  # keys of a config.json


def stated_quantisation(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The method that a ``config.json`` or ``params.json`` states, as ``quant_method`` has it, and its settings."""
    for key in STATED_IN:
        stated = config.get(key)
        if not stated:
            continue
        if not isinstance(stated, Mapping):
            raise ValueError(f"{key} ({shown(stated)}) must be an object")
        method = stated.get("quant_method")
        if isinstance(method, str):
            return method.lower(), stated
        if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
            return "bitsandbytes", stated
        if "zero_point" in stated and "version" in stated:
            return "awq", stated
        if "desc_act" in stated:
            return "gptq", stated
        if "qformat_weight" in stated:
            return f"FP8 ({stated['qformat_weight']})", stated
        named = {"quantization": "mlx", "compression_config": "compressed-tensors"}
        return named.get(key, "a method without a name"), stated
    return None


def method_of_tensors(names: Iterable[str]) -> str | None:
    """The method that the names of a file's tensors belong to, or None."""
    ends = {name[name.rfind(".") :] for name in names}
    whole = next((end for end in _TENSORS if end in ends), None)
    return _TENSORS[whole] if whole else None


def method_of_files(names: Iterable[str]) -> str | None:
    """The method that file names belong to, or None."""
    return next((method for name in sorted(names) for end, method in _FILES.items() if name.endswith(end)), None)


def refusal(method: str) -> str:
    """What to say of a checkpoint of such weights."""
    return f"its weights are quantised by {method}, which is not read; take the checkpoint in bfloat16 or float16"


def unstated(method: str) -> str:
    """What to say of tensors of a method that no file states."""
    return f"has tensors of weights quantised by {method}, and no config.json that states quantization_config"
