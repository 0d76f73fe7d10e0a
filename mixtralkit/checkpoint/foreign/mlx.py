"""MLX: words of numbers along K, low bits first, q · scale + bias by groups; a layer's experts in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixtralkit.checkpoint.foreign.base import Bounds, Linear, Module, piece
from mixtralkit.json_file import shown

_BITS = (2, 4, 8)
_GROUPS = (16, 32, 64, 128)


class Mlx:
    """``weight`` […, O, K · bits / 32] of words, ``scales`` and ``biases`` […, O, K / g].

    A bias is no multiple of its scale, so no format of ours has the same numbers. Shapes tell bits and groups: each
    layer may have its own.
    """

    title = "MLX"
    marks = ("scales", "biases")
    ignored = ()

    def __init__(self, stated: Mapping[str, Any]) -> None:
        if stated.get("mode", "affine") != "affine":
            raise ValueError(f"mode ({shown(stated['mode'])}) must be affine")

    def linear(self, module: Module) -> Linear:
        *above, inputs = module.shape
        words = module.take("weight", [(*above, inputs * bits // 32) for bits in _BITS], [torch.int32])
        groups = [(*above, inputs // size) for size in _GROUPS if inputs % size == 0]
        scales = module.scales("scales", groups, may_be_zero=True)
        biases = module.scales("biases", [scales.shape], may_be_zero=True)
        bits, group = 32 * words.columns // inputs, inputs // scales.columns
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)

        def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
            first, last = columns[0] // 128 * 128, min(-(-columns[1] // 128) * 128, inputs)  # whole words and groups
            held = piece(words, rows, (first * bits // 32, -(-last * bits // 32)))
            q_OK = ((held.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1).float()
            scales_OK, biases_OK = (
                piece(one, rows, (first // group, -(-last // group))).float().repeat_interleave(group, 1)
                for one in (scales, biases)
            )
            return (q_OK * scales_OK + biases_OK)[:, columns[0] - first : columns[1] - first]

        return Linear.plain(module, words, make, "its offsets are no multiples of its scales")
