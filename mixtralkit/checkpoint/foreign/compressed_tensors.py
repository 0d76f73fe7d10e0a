"""Neural Magic's ``compressed-tensors``: int4 packed in words, e4m3 or int8 as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixtralkit.checkpoint.foreign.base import (
    Bounds,
    Linear,
    Module,
    check_group,
    int4_linear,
    int8_linear,
    nibbles,
    piece,
)
from mixtralkit.checkpoint.foreign.fp8 import OF_ACTIVATIONS, e4m3
from mixtralkit.json_file import shown

_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")


class CompressedTensors:
    """``weight_packed``: int32 [O, K / 8], eight numbers of four bits along K, the low ones first, 8 added to each."""

    title = "compressed-tensors"
    marks = ("weight_packed", "weight_scale")
    ignored = (*OF_ACTIVATIONS, "input_zero_point", "output_zero_point")

    def __init__(self, stated: Mapping[str, Any]) -> None:
        for form in [stated.get("format"), *(group.get("format") for group in _groups(stated))]:
            if form is not None and form not in _FORMATS:
                raise ValueError(f"format ({shown(form)}) must be one of {', '.join(_FORMATS)}")
        if stated.get("sparsity_config") and stated["sparsity_config"].get("format", "dense") != "dense":
            raise ValueError(f"sparsity_config ({shown(stated['sparsity_config']['format'])}) must be dense")
        for group in _groups(stated):
            weights = group.get("weights")
            if isinstance(weights, Mapping) and weights.get("num_bits") not in (4, 8):
                raise ValueError(f"num_bits ({shown(weights.get('num_bits'))}) must be 4 or 8")

    def linear(self, module: Module) -> Linear:
        if "weight_packed" in module.tensors:
            return _packed(module)
        found = module.tensors.get("weight")
        if found is not None and found.dtype == torch.int8:
            outputs, _ = module.shape
            if "weight_zero_point" in module.tensors:
                raise module.error("weight_zero_point", "zero points of int8", "symmetric weights")
            scales = module.scales("weight_scale", [(outputs, 1)])
            return int8_linear(module, module.take("weight", [module.shape], [torch.int8]), scales)
        return e4m3(module, "weight_scale")


def _groups(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = stated.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _packed(module: Module) -> Linear:
    outputs, inputs = module.shape
    packed = module.take("weight_packed", [(outputs, -(-inputs // 8))], [torch.int32])
    shape = module.take("weight_shape", [(2,)], [torch.int64, torch.int32])
    stated = tuple(piece(shape, (0, 2)).flatten().tolist())
    if stated != module.shape:
        raise module.error("weight_shape", list(stated), list(module.shape))
    found = module.tensors.get("weight_scale")
    groups = found.columns if found is not None else 1
    scales = module.scales("weight_scale", [(outputs, max(groups, 1))])
    if groups < 1 or inputs % groups:
        raise module.error("weight_scale", f"{groups} groups", f"a number of groups that divides {inputs} columns")
    group = check_group(inputs // groups, inputs, f"{packed.file}: {module.name}: group_size")
    zeros = None
    if "weight_zero_point" in module.tensors:
        packed_zeros = module.take("weight_zero_point", [(-(-outputs // 8), groups)], [torch.int32])

        def zeros_of(rows: Bounds, columns: Bounds) -> torch.Tensor:
            first = rows[0] // 8
            words = piece(packed_zeros, (first, -(-rows[1] // 8)), columns)
            return nibbles(words.T.contiguous().view(torch.uint8)).T[rows[0] - 8 * first : rows[1] - 8 * first]

        zeros = packed_zeros, zeros_of

    def pairs(rows: Bounds, columns: Bounds) -> torch.Tensor:
        first = columns[0] // 8
        found = piece(packed, rows, (first, -(-columns[1] // 8))).view(torch.uint8)
        return found[:, columns[0] // 2 - 4 * first : columns[1] // 2 - 4 * first]

    index = None
    if "weight_g_idx" in module.tensors:
        index = module.take("weight_g_idx", [(inputs,)], [torch.int32, torch.int64])
    return int4_linear(module, packed, pairs, scales, group, zeros, index=index)
