"""The compiled kernels of ``kernels.cpp`` on tensors."""

from __future__ import annotations

import ctypes

import torch

from mixtralkit.moe.weights import PackedWeight
from mixtralkit.ops.cpu.build import Rows, Weight, kernels
from mixtralkit.ops.runtime import CPU_TYPES

TYPES = {dtype: number for number, dtype in enumerate(CPU_TYPES)}


def linear_cpu(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor | PackedWeight,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x · wᵀ [+ residual], summed in float32, rounded once: [T, O].

    A row's result depends on nothing but the row and the weights: not on other rows, not on the number of threads.
    Beside packed weights x is rounded to 16 bits for each group of columns (``quantised.h``).
    """
    if out is None:
        out = x_TI.new_empty(x_TI.shape[0], w_OI.shape[0], dtype=out_dtype)
    assert x_TI.shape[1] == w_OI.shape[1]
    kernels().mk_linear(
        torch.get_num_threads(), *x_TI.shape, w_OI.shape[0],
        rows_of(x_TI), weight_of(w_OI), rows_of(residual_TO), rows_of(out),
    )  # fmt: skip
    return out


def expert_sum_cpu(
    x_RD: torch.Tensor,
    slots_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    w13_SGD: torch.Tensor | PackedWeight,
    w2_SDF: torch.Tensor | PackedWeight,
    residual_RD: torch.Tensor | None = None,
    out_RD: torch.Tensor | None = None,
    storage_S: torch.Tensor | None = None,
    hidden: int | None = None,
) -> torch.Tensor:
    """``ops.experts.expert_sum`` in float32 throughout, rounded once; a slot's weights are read once.

    A row's choices add up in their order, so its result depends on no other row (``linear_cpu``) and no plan.
    ``hidden``: of the experts' hidden columns the first so many, whole units of the format; None for all.
    """
    if storage_S is not None:
        slots_RK = storage_S[slots_RK.clamp(min=0)].masked_fill(slots_RK < 0, -1)
    if out_RD is None:
        out_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
    slots_RK, weights_RK = slots_RK.contiguous(), weights_RK.float().contiguous()
    assert slots_RK.dtype == torch.int64
    kernels().mk_expert_sum(
        torch.get_num_threads(), *x_RD.shape, w2_SDF.shape[2], w2_SDF.shape[2] if hidden is None else hidden,
        w2_SDF.shape[0], slots_RK.shape[1],
        rows_of(x_RD), slots_RK.data_ptr(), weights_RK.data_ptr(), weight_of(w13_SGD), weight_of(w2_SDF),
        rows_of(residual_RD), rows_of(out_RD),
    )  # fmt: skip
    return out_RD


def read_cpu(x: torch.Tensor) -> float:
    """Reads float32 numbers with all threads and returns their sum: what the memory gives at most."""
    return kernels().mk_read(torch.get_num_threads(), x.data_ptr(), x.numel())


def rows_of(x: torch.Tensor | None) -> ctypes.Structure:
    if x is None:
        return ctypes.byref(Rows())
    assert x.stride(-1) == 1
    return ctypes.byref(Rows(TYPES[x.dtype], x.data_ptr(), x.stride(0)))


def weight_of(w: torch.Tensor | PackedWeight) -> ctypes.Structure:
    """Of one matrix, or of one for each slot."""
    if isinstance(w, torch.Tensor):
        assert w.stride(-1) == 1
        rows, slots = (w.stride(dim) * w.element_size() for dim in (-2, 0))
        return ctypes.byref(Weight(TYPES[w.dtype], 0, w.data_ptr(), rows, slots, None, 0, None, 0))
    parts = [(part.data_ptr(), part.stride(0) * part.element_size()) for part in w.tensors]
    (data, slots), scales, zeros = *parts, *[(None, 0)] * (3 - len(parts))
    group = getattr(w.weights, "group", 0)
    return ctypes.byref(Weight(w.weights.cpu_type, group, data, w.tensors[0].stride(-2), slots, *scales, *zeros))
