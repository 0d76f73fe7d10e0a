"""The experts in plain torch, with gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixtralkit.moe.weights import Fp8, PackedWeight
from mixtralkit.ops.counting import count_keys
from mixtralkit.ops.linear.reference import multiply


def expert_sum_reference(
    x_RD: torch.Tensor,
    slots_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    w13_SGD: torch.Tensor | PackedWeight,
    w2_SDF: torch.Tensor | PackedWeight,
    residual_RD: torch.Tensor | None = None,
    out_RD: torch.Tensor | None = None,
    storage_S: torch.Tensor | None = None,
    rounds_rows: bool = False,
) -> torch.Tensor:
    """The reference of ``expert_sum``, with gradients.

    ``rounds_rows``: to fp8 in front of either product, as a GPU that multiplies such weights in fp8.

    Choices are brought together by slot, ``(r0,s1)(r0,s0)(r1,s1) → (r0,s0)(r0,s1)(r1,s1)``, multiplied as groups,
    and gathered back by the inverse order, so that no atomic addition makes the result vary from run to run.
    """
    slots, top_k = len(w13_SGD if storage_S is None else storage_S), slots_RK.shape[1]
    if slots == 0 or x_RD.shape[0] == 0:
        sum_RD = x_RD * weights_RK.sum(-1, keepdim=True).type_as(x_RD) * 0.0  # keeps the graph
    else:
        here_RK = slots_RK >= 0
        keys_N = slots_RK.masked_fill(~here_RK, slots).flatten()  # choices of other ranks sort last
        order_N = keys_N.argsort(stable=True)
        place_RK = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        place_RK = place_RK.view_as(slots_RK)
        counts_S = count_keys(keys_N, slots + 1)[:slots]
        x_ND = x_RD[order_N // top_k]
        if x_ND.requires_grad:  # what grouped_mm gives back for rows after its last group is whatever memory held
            x_ND = x_ND.masked_fill((keys_N[order_N] == slots)[:, None], 0.0)
        y_ND = swiglu_grouped(x_ND, counts_S, w13_SGD, w2_SDF, storage_S, rounds_rows)
        gathered_RKD = y_ND[place_RK].float().masked_fill(~here_RK[..., None], 0.0)
        sum_RD = (gathered_RKD * weights_RK[..., None]).sum(1)
    if residual_RD is not None:
        sum_RD = sum_RD + residual_RD
    return sum_RD.type_as(x_RD) if out_RD is None else out_RD.copy_(sum_RD)


def swiglu_grouped(
    x_ND: torch.Tensor,
    counts_S: torch.Tensor,
    w13_SGD: torch.Tensor | PackedWeight,
    w2_SDF: torch.Tensor | PackedWeight,
    storage_S: torch.Tensor | None = None,
    rounds_rows: bool = False,
) -> torch.Tensor:
    """Each group of rows through its expert; rows after the last group come back undefined.

    ``counts_S`` (int64) rows of ``x_ND`` belong to slot 0, the next to slot 1, and so on.
    """
    packed = isinstance(w13_SGD, PackedWeight)
    if torch.is_autocast_enabled(x_ND.device.type) and not packed:
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, w13_SGD, w2_SDF = x_ND.to(dtype), w13_SGD.to(dtype), w2_SDF.to(dtype)
    aligned = not packed and w13_SGD.shape[2] % 8 == w2_SDF.shape[2] % 8 == 0  # grouped_mm: rows of whole 16 bytes
    product = _grouped_mm if x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and aligned else _looped_mm
    counts = counts_S.cumsum(0, dtype=torch.int32) if product is _grouped_mm else counts_S.tolist()  # host sync
    rounded = _in_fp8 if rounds_rows else lambda x_NI: x_NI
    gate_NF, up_NF = product(rounded(x_ND), w13_SGD, counts, storage_S).chunk(2, dim=-1)
    return product(rounded(F.silu(gate_NF) * up_NF), w2_SDF, counts, storage_S)


def _in_fp8(x_NI: torch.Tensor) -> torch.Tensor:
    return Fp8("channel").quantize(x_NI).float().type_as(x_NI)


def _grouped_mm(
    x_NI: torch.Tensor, w_SOI: torch.Tensor, ends_S: torch.Tensor, storage_S: torch.Tensor | None
) -> torch.Tensor:
    w_SOI = w_SOI if storage_S is None else w_SOI[storage_S]
    return F.grouped_mm(x_NI, w_SOI.transpose(1, 2), offs=ends_S)


def _looped_mm(
    x_NI: torch.Tensor, w_SOI: torch.Tensor | PackedWeight, counts_S: list[int], storage_S: torch.Tensor | None
) -> torch.Tensor:
    """The same by one product for each group that has rows; on CPU this beats ``grouped_mm`` several times."""
    groups = x_NI.split([*counts_S, x_NI.shape[0] - sum(counts_S)])
    places = range(len(counts_S)) if storage_S is None else storage_S.tolist()  # host sync
    parts = [multiply(group, w_SOI[place]) for place, group in zip(places, groups[:-1], strict=True) if len(group)]
    rest_NO = x_NI.new_zeros(len(groups[-1]), w_SOI.shape[1])
    return torch.cat([*parts, rest_NO])
