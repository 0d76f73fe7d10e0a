"""Rows through a rank's experts: the weighted sum of each row's choices, the heart of the layer.

Four ways to the same sums. On a GPU, by the number of rows: reading as few bytes as possible (small batches), or
products of sorted rows (large batches), for which rows of half precision become fp8 where the weights are. On a CPU
compiled kernels. The reference elsewhere, for gradients, and for weights in formats without kernels there.
"""

from __future__ import annotations

import torch

from mixtralkit.moe.weights import ExpertWeights, Fp8, PackedWeight
from mixtralkit.ops.experts.reference import expert_sum_reference, swiglu_grouped
from mixtralkit.ops.runtime import runs_cpu, runs_triton

__all__ = ["SMALL_BATCH", "expert_sum", "swiglu_grouped", "takes_fp8", "takes_packed"]

SMALL_BATCH = (
    16  # rows of one block of the matrix units: below, every touched expert is read once and nothing is sorted
)


def expert_sum(
    x_RD: torch.Tensor,
    slots_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    w13_SGD: torch.Tensor | PackedWeight,
    w2_SDF: torch.Tensor | PackedWeight,
    residual_RD: torch.Tensor | None = None,
    out_RD: torch.Tensor | None = None,
    likely_rows: int | None = None,
    storage_S: torch.Tensor | None = None,
    likely_slots: int | None = None,
) -> torch.Tensor:
    """Σ_k weights_RK · w2 · (silu(w1 · x) * (w3 · x)) [+ residual_RD], in the dtype of ``x_RD``, summed in float32.

    Args:
        slots_RK: int64 expert of each choice, -1 for a choice that is computed elsewhere and adds nothing here.
        weights_RK: float32 weight of each choice.
        w13_SGD: w1 above w3 of every slot, or of every place of a storage that ``storage_S`` points into; in any
            format, the same as ``w2_SDF``.
        residual_RD: added before the sum is rounded.
        out_RD: where the result goes; None takes new memory.
        likely_rows: as many rows as would have about all of these choices here, where the shape has more rows than
            that; settings are for this number. None for R.
        storage_S: int64 on the device, the place in ``w13_SGD`` and ``w2_SDF`` at which each slot lies. Read when the
            kernels run, so copies may be exchanged under a CUDA graph. None where slots are places.
        likely_slots: how many slots most rows fall on, where others are seldom named; settings are for this number.
            None for all.
    """
    assert x_RD.shape[0] == slots_RK.shape[0] == weights_RK.shape[0]
    arguments = (x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD, out_RD, storage_S)
    if runs_cpu(x_RD, w13_SGD, w2_SDF):
        from mixtralkit.ops.cpu.products import expert_sum_cpu

        return expert_sum_cpu(*arguments)
    if isinstance(w13_SGD, PackedWeight):
        format_and_columns = (w13_SGD.weights, w13_SGD.columns, w2_SDF.columns)
        if runs_triton(x_RD) and x_RD.shape[0] > SMALL_BATCH and takes_fp8(x_RD, *format_and_columns):
            from mixtralkit.ops.experts.triton_grouped import expert_sum_grouped

            return expert_sum_grouped(*arguments, likely_rows=likely_rows, likely_slots=likely_slots)
        if runs_triton(x_RD) and takes_packed(*format_and_columns):
            from mixtralkit.ops.experts.triton_packed import expert_sum_packed

            return expert_sum_packed(*arguments, likely_rows=likely_rows, likely_slots=likely_slots)
        return expert_sum_reference(*arguments)
    triton = runs_triton(x_RD, w13_SGD, w2_SDF)
    if triton and x_RD.shape[0] <= SMALL_BATCH:
        from mixtralkit.ops.experts.triton_small import expert_sum_small

        return expert_sum_small(*arguments, likely_slots=likely_slots)
    if triton and w2_SDF.shape[1] % 8 == w2_SDF.shape[2] % 8 == 0:  # tensor descriptors want rows of whole 16 bytes
        from mixtralkit.ops.experts.triton_grouped import expert_sum_grouped

        return expert_sum_grouped(*arguments, likely_rows=likely_rows, likely_slots=likely_slots)
    return expert_sum_reference(*arguments)


def takes_packed(weights: ExpertWeights, *columns: int) -> bool:
    """Whether a GPU has kernels for matrices of so many columns in a format: whole units of them."""
    return all(count % max(weights.unit, 64) == 0 for count in columns)


def takes_fp8(x_RD: torch.Tensor, weights: ExpertWeights, *columns: int) -> bool:
    """Whether a GPU multiplies such rows and weights in fp8: half precision, one scale an output or matrix, Ada on."""
    fits = isinstance(weights, Fp8) and weights.scale != "block" and all(count % 16 == 0 for count in columns)
    return fits and x_RD.dtype != torch.float32 and torch.cuda.get_device_capability(x_RD.device) >= (8, 9)
