"""The compiled kernels of ``kernels.cpp`` on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from mixtralkit.moe.weights import PackedWeight
from mixtralkit.ops.cpu.build import Norm, Rows, Weight, kernels
from mixtralkit.ops.gate.types import Gated
from mixtralkit.ops.runtime import CPU_TYPES
from mixtralkit.ops.sampling.types import Best

TYPES = {dtype: number for number, dtype in enumerate(CPU_TYPES)}


def linear_cpu(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor | PackedWeight,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """norm(x) · wᵀ [+ residual], summed in float32, rounded once: [T, O]. The norm, if any, rounds as ``rms_norm``.

    A row's result depends on nothing but the row and the weights: not on other rows, not on the number of threads.
    Beside packed weights x is rounded for each group of columns: to 8 bits where weights have 4 and x has 16, or else
    to 16 (``quantised.h``).
    """
    if out is None:
        out = x_TI.new_empty(x_TI.shape[0], w_OI.shape[0], dtype=out_dtype)
    assert x_TI.shape[1] == w_OI.shape[1]
    kernels().mk_linear(
        torch.get_num_threads(), *x_TI.shape, w_OI.shape[0],
        rows_of(x_TI), norm_of(norm, x_TI), weight_of(w_OI), rows_of(residual_TO), rows_of(out),
    )  # fmt: skip
    return out


def gate_cpu(
    x_TD: torch.Tensor, gate_ED: torch.Tensor, top_k: int, norm: tuple[torch.Tensor, float] | None = None
) -> Gated:
    """``ops.gate.gate``; logits are not rounded."""
    (rows, dim), experts = x_TD.shape, len(gate_ED)
    assert top_k <= experts
    logits_TE, weights_TK = torch.empty(rows, experts), torch.empty(rows, top_k)
    experts_TK = torch.empty(rows, top_k, dtype=torch.int64)
    normed_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    kernels().mk_gate(
        torch.get_num_threads(), rows, dim, experts, top_k, rows_of(x_TD), norm_of(norm, x_TD), weight_of(gate_ED),
        rows_of(normed_TD), logits_TE.data_ptr(), experts_TK.data_ptr(), weights_TK.data_ptr(),
    )  # fmt: skip
    return Gated(experts_TK, weights_TK, logits_TE, normed_TD)


def best_token_cpu(logits_NV: torch.Tensor, first_token: int = 0) -> Best:
    """``ops.sampling.best_token`` of float32 logits."""
    rows, tokens = logits_NV.shape
    tokens_N, (values_N, logsumexp_N) = torch.empty(rows, dtype=torch.int64), torch.empty(2, rows).unbind()
    assert logits_NV.dtype == torch.float32
    assert logits_NV.stride(1) == 1
    kernels().mk_best(
        torch.get_num_threads(), rows, tokens, logits_NV.data_ptr(), logits_NV.stride(0), tokens_N.data_ptr(),
        values_N.data_ptr(), logsumexp_N.data_ptr(),
    )  # fmt: skip
    return Best(tokens_N.add_(first_token), values_N, logsumexp_N)


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
    expert_sum_call(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD, out_RD)(hidden)
    return out_RD


def expert_sum_call(
    x_RD: torch.Tensor, slots_RK: torch.Tensor, weights_RK: torch.Tensor, w13_SGD: torch.Tensor | PackedWeight,
    w2_SDF: torch.Tensor | PackedWeight, residual_RD: torch.Tensor | None, out_RD: torch.Tensor,
) -> Callable[[int | None], None]:  # fmt: skip
    """``expert_sum_cpu`` of memory that is used again and again: a call with ``hidden`` computes what it then holds."""
    assert slots_RK.dtype == torch.int64
    assert weights_RK.dtype == torch.float32
    assert slots_RK.is_contiguous()
    assert weights_RK.is_contiguous()
    (slots, _, width), call, threads = w2_SDF.shape, kernels().mk_expert_sum, torch.get_num_threads
    held = (x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD, out_RD)  # as long as anybody may call
    given = (
        slots, slots_RK.shape[1], rows_of(x_RD), slots_RK.data_ptr(), weights_RK.data_ptr(), weight_of(w13_SGD),
        weight_of(w2_SDF), rows_of(residual_RD), rows_of(out_RD),
    )  # fmt: skip

    def compute(hidden: int | None) -> None:
        call(threads(), *held[0].shape, width, width if hidden is None else hidden, *given)

    return compute


def read_cpu(x: torch.Tensor) -> float:
    """Reads float32 numbers with all threads and returns their sum: what the memory gives at most."""
    return kernels().mk_read(torch.get_num_threads(), x.data_ptr(), x.numel())


def rows_of(x: torch.Tensor | None) -> ctypes.Structure:
    if x is None:
        return ctypes.byref(Rows())
    assert x.stride(-1) == 1
    return ctypes.byref(Rows(TYPES[x.dtype], x.data_ptr(), x.stride(0)))


def norm_of(norm: tuple[torch.Tensor, float] | None, x_TD: torch.Tensor) -> ctypes.Structure:
    """A norm of rows; its weight is of their type."""
    if norm is None:
        return ctypes.byref(Norm())
    weight_D, eps = norm
    assert weight_D.dtype == x_TD.dtype
    assert weight_D.is_contiguous()
    return ctypes.byref(Norm(weight_D.data_ptr(), eps))


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
