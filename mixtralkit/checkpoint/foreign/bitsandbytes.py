"""bitsandbytes: int8, and in four bits an index into sixteen numbers (nf4, fp4) times the largest size of its block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mixtralkit.checkpoint.files import Region
from mixtralkit.checkpoint.foreign.base import Bounds, Linear, Made, Module, int8_linear, piece
from mixtralkit.json_file import conform, parse_json, shown

_MOST_BYTES = 1 << 16  # of what a layer's JSON says


class BitsAndBytes:
    """``weight`` uint8 [O · K / 2, 1], the first of two numbers in the high half, and ``weight.absmax`` by blocks.

    ``absmax`` may be in eight bits itself: a number of ``nested_quant_map`` times the ``nested_absmax`` of its block,
    plus ``nested_offset`` of the JSON in ``quant_state``.

    In eight bits ``weight`` is int8 [O, K] and ``SCB`` [O] the largest size of an output's weights, which is 127 steps.
    """

    title = "bitsandbytes"
    marks = ("weight.quant_map", "SCB")
    ignored = ()

    def __init__(self, stated: Mapping[str, Any]) -> None:
        if not (stated.get("load_in_8bit") or stated.get("load_in_4bit")):
            raise ValueError("load_in_4bit or load_in_8bit must be true")

    def linear(self, module: Module) -> Linear:
        if "SCB" in module.tensors:
            return _int8(module)
        outputs, inputs = module.shape
        packed = module.take("weight", [(outputs * inputs // 2, 1)], [torch.uint8])
        said = _state(module)
        block = said.get("blocksize")
        if type(block) is not int or block < 2 or inputs % block:
            raise module.error("weight.quant_state", f"blocksize {shown(block)}", f"one that divides {inputs} columns")
        blocks = inputs // block
        map_16 = piece(module.take("weight.quant_map", [(16,)], [torch.float32]), (0, 16)).flatten()
        data = replace(packed, shape=(outputs, inputs // 2), pitch=inputs // 2)
        absmax = _absmax(module, said, outputs, blocks)

        def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
            first, last = columns[0] // block, -(-columns[1] // block)
            bytes_RB = piece(data, rows, (first * block // 2, last * block // 2))
            q_RK = torch.stack([bytes_RB >> 4, bytes_RB & 15], -1).flatten(1)
            numbers = map_16[q_RK.long()] * absmax.make(rows, (first, last)).repeat_interleave(block, 1)
            return numbers[:, columns[0] - first * block : columns[1] - first * block]

        return Linear.plain(module, data, make, "its sixteen numbers are not evenly spaced")


def _int8(module: Module) -> Linear:
    outputs, _ = module.shape
    if "weight_format" in module.tensors:
        form = int(piece(module.take("weight_format", [(), (1,)], [torch.uint8]), (0, 1)))
        if form:
            raise module.error("weight_format", f"format {form}", "0, rows as they are")
    sizes = module.scales("SCB", [(outputs,)], may_be_zero=True)

    def steps(rows: Bounds, columns: Bounds) -> torch.Tensor:
        return piece(sizes, rows, columns).float() / 127

    scales = Made.of(sizes.name, sizes.shape, torch.float32, sizes, steps)
    return int8_linear(module, module.take("weight", [module.shape], [torch.int8]), scales)


def _state(module: Module) -> Mapping[str, Any]:
    end = next((end for end in module.tensors if end.startswith("weight.quant_state.")), "weight.quant_state")
    found = module.tensors.get(end)
    if found is None or found.dtype != torch.uint8 or len(found.shape) != 1 or found.rows > _MOST_BYTES:
        shape = "nothing" if found is None else list(found.shape)
        raise module.error(end, shape, "the bytes of a JSON object")
    module.taken.add(end)
    try:
        text = bytes(piece(found, (0, found.rows)).flatten().tolist()).decode("utf-8", "replace")
        return conform(parse_json(text), dict)
    except ValueError as error:
        raise module.error(end, f"text that {error}", "a JSON object") from None


def _absmax(module: Module, said: Mapping[str, Any], outputs: int, blocks: int) -> Made:
    """The largest size of each block, [O, K / block], float32."""
    found = module.take("weight.absmax", [(outputs * blocks,)], [torch.float32, torch.uint8])
    by_row = replace(found, shape=(outputs, blocks), pitch=blocks * found.dtype.itemsize)
    if found.dtype == torch.float32:
        return _checked(module, by_row, lambda rows, columns: piece(by_row, rows, columns))
    size, offset = said.get("nested_blocksize"), said.get("nested_offset")
    if type(size) is not int or size < 1 or not isinstance(offset, float):
        raise module.error("weight.quant_state", f"nested_blocksize {shown(size)}, offset {shown(offset)}", "numbers")
    count = -(-outputs * blocks // size)
    map_256 = piece(module.take("weight.nested_quant_map", [(256,)], [torch.float32]), (0, 256)).flatten()
    nested = piece(module.take("weight.nested_absmax", [(count,)], [torch.float32]), (0, count)).flatten()

    def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
        places = torch.arange(*rows)[:, None] * blocks + torch.arange(*columns)
        return map_256[piece(by_row, rows, columns).long()] * nested[places // size] + offset

    return _checked(module, by_row, make)


def _checked(module: Module, region: Region, make: Any) -> Made:
    def finite(rows: Bounds, columns: Bounds) -> torch.Tensor:
        numbers = make(rows, columns)
        if not numbers.isfinite().all():
            raise module.error("weight.absmax", "an infinite or undefined number", "finite ones")
        return numbers

    return Made.of(region.name, region.shape, torch.float32, region, finite)
