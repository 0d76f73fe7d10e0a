"""e4m3 weights: AutoFP8's, fine-grained ones (DeepSeek's way) and FBGEMM's. All scales multiply, ``_inv`` or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixtralkit.checkpoint.foreign.base import BLOCK, Linear, Module, fp8_linear

# Of activations and the cache: weights are multiplied in the activations' own precision here.
OF_ACTIVATIONS = (
    "input_scale", "input_scale_ub", "activation_scale", "output_scale", "kv_scale", "k_scale", "v_scale", "q_scale",
)  # fmt: skip


class FineFp8:
    """``quant_method: "fp8"``: one ``weight_scale`` a matrix, or a ``weight_scale_inv`` for 128 × 128 weights.

    w1 and w3 have scales of their own and keep them.
    """

    title = "FP8"
    marks = ("weight_scale", "weight_scale_inv")
    ignored = OF_ACTIVATIONS

    def __init__(self, stated: Mapping[str, Any]) -> None:
        block = stated.get("weight_block_size")
        if block is not None and list(block) != [BLOCK, BLOCK]:
            raise ValueError(f"weight_block_size ({block!r}) must be [{BLOCK}, {BLOCK}]")

    def linear(self, module: Module) -> Linear:
        return e4m3(module, "weight_scale_inv" if "weight_scale_inv" in module.tensors else "weight_scale")


class FbgemmFp8(FineFp8):
    """``quant_method: "fbgemm_fp8"``: a ``weight_scale`` for each output."""

    title = "FP8 (fbgemm)"


def e4m3(module: Module, scale: str) -> Linear:
    """A layer of e4m3 numbers with one scale, one an output, or one for 128 × 128."""
    outputs, inputs = module.shape
    data = module.take("weight", [module.shape], [torch.float8_e4m3fn])
    blocks = -(-outputs // BLOCK), -(-inputs // BLOCK)
    by_shape = {(1,): "tensor", (1, 1): "tensor", (outputs, 1): "channel", (outputs,): "channel", blocks: "block"}
    scales = module.scales(scale, list(by_shape))
    kind = "block" if scale.endswith("_inv") and scales.shape == blocks else by_shape[scales.shape]
    return fp8_linear(module, data, scales, kind)
