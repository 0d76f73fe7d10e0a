"""HQQ as transformers stores it: groups along K, (q - z) · s with fractions as zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mixtralkit.checkpoint.files import Region
from mixtralkit.checkpoint.foreign.base import Bounds, Linear, Module, check_group, piece

_BITS = (1, 2, 4, 8)
_WANTED = {"axis": 1, "view_as_float": 0, "quant_scale": 0, "quant_zero": 0}


class Hqq:
    """``W_q`` uint8 [O · K · bits / 8 / g, g]; ``scale`` and ``zero`` [O · K / g, 1]; each layer says its bits and g.

    A byte has one weight of each of 8 / bits blocks of rows, the first block's in its highest bits.
    """

    title = "HQQ"
    marks = ("W_q",)
    ignored = (
        "packing", "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
        "channel_wise", "optimize", "round_zero",
    )  # fmt: skip

    def __init__(self, stated: Mapping[str, Any]) -> None:
        pass

    def linear(self, module: Module) -> Linear:
        outputs, inputs = module.shape
        bits = _number(module, "nbits")
        if bits not in _BITS or outputs * bits % 8:
            raise module.error("nbits", bits, f"{', '.join(map(str, _BITS))}, of {outputs} rows in whole bytes")
        for end, wanted in _WANTED.items():
            if (found := _number(module, end)) != wanted:
                raise module.error(end, found, wanted)
        where = f"{next(iter(module.tensors.values())).file}: {module.name}: group_size"
        group = check_group(_number(module, "group_size"), inputs, where)
        shape = module.take("shape", [(2,)], [torch.int64])
        if tuple(piece(shape, (0, 2)).flatten().tolist()) != module.shape:
            raise module.error("shape", piece(shape, (0, 2)).flatten().tolist(), list(module.shape))
        block, groups = outputs * bits // 8, inputs // group
        packed = module.take("W_q", [(block * groups, group)], [torch.uint8])
        data = replace(packed, shape=(block, inputs), pitch=inputs)
        scales = module.scales("scale", [(outputs * groups, 1)])
        zeros = module.scales("zero", [(outputs * groups, 1)], may_be_zero=True)

        def make(rows: Bounds, columns: Bounds) -> torch.Tensor:
            parts = []
            for number in range(rows[0] // block, -(-rows[1] // block)):
                first, last = max(rows[0] - number * block, 0), min(rows[1] - number * block, block)
                held = piece(data, (first, last), columns)
                parts.append(held >> (8 - bits * (number + 1)) & 2**bits - 1)
            group_K = torch.arange(*columns) // group

            def spread(region: Region) -> torch.Tensor:
                return piece(region, (rows[0] * groups, rows[1] * groups)).view(-1, groups).float()[:, group_K]

            return (torch.cat(parts).float() - spread(zeros)) * spread(scales)

        return Linear.plain(module, data, make, "its zero points are fractions")


def _number(module: Module, end: str) -> int:
    return int(piece(module.take(end, [(), (1,)], [torch.int32, torch.uint8, torch.int64]), (0, 1)))
