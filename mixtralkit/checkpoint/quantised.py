"""Which quantisation a checkpoint says that it has; none of them is read yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# quant_method in config.json -> what people call it
_METHODS = {
    "awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "fbgemm_fp8": "FP8 (fbgemm)", "modelopt": "ModelOpt",
    "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "hqq": "HQQ", "aqlm": "AQLM",
    "quanto": "quanto", "eetq": "EETQ", "exl2": "EXL2", "exl3": "EXL3", "torchao": "torchao", "gguf": "GGUF",
    "mxfp4": "MXFP4", "marlin": "Marlin", "auto-round": "AutoRound", "vptq": "VPTQ", "higgs": "HIGGS",
    "spqr": "SpQR", "quark": "Quark", "bitnet": "BitNet",
}  # fmt: skip

# The end of a tensor's name that only such a file has -> method
_TENSORS = {
    ".absmax": "bitsandbytes", ".quant_map": "bitsandbytes", ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".SCB": "bitsandbytes (int8)", ".weight_packed": "compressed-tensors", ".weight_scale_inv": "FP8 (in blocks)",
    ".weight_scale": "FP8", ".W_q": "HQQ", ".g_idx": "GPTQ", ".qzeros": "AWQ or GPTQ", ".qweight": "AWQ or GPTQ",
    ".q_invperm": "EXL2", ".biases": "MLX",
}  # fmt: skip

_FILES = {".ggml": "GGML"}


def stated_method(config: Mapping[str, Any]) -> str | None:
    """The method that a ``config.json`` or ``params.json`` states, or None."""
    for key in ("quantization_config", "compression_config", "quantization"):
        stated = config.get(key)
        if not isinstance(stated, Mapping) or not stated:
            continue
        method = stated.get("quant_method")
        if isinstance(method, str):
            return _METHODS.get(method.lower(), method)
        if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
            return "bitsandbytes"
        if "zero_point" in stated and "version" in stated:
            return "AWQ"
        if "desc_act" in stated:
            return "GPTQ"
        if "qformat_weight" in stated:
            return f"FP8 ({stated['qformat_weight']})"
        return {"quantization": "MLX", "compression_config": "compressed-tensors"}.get(key, "a method without a name")
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
    return f"its weights are quantised by {method}, which is not read yet; take the checkpoint in bfloat16 or float16"
