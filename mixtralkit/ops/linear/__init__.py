"""A product with a weight matrix, with the norm in front of it and the residual behind it.

Small batches (a decode step) cost what reading the weights costs: Triton kernels that keep the memory busy, also while
the kernel in front of them ends, and read packed weights as they are. Large ones are left to the library's product. On
a CPU ``ops.cpu`` does both.
"""

from __future__ import annotations

import torch

from mixtralkit.moe.weights import ATTENTION_FORMATS, PackedWeight
from mixtralkit.ops.linear.library import linear_library
from mixtralkit.ops.linear.reference import linear_reference
from mixtralkit.ops.runtime import runs_cpu, runs_triton

MOST_ROWS = 64  # above, the library's product was the faster on every shape measured


def linear(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor | PackedWeight,
    norm: tuple[torch.Tensor, float] | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x · wᵀ [+ residual], summed in float32 by kernels: [T, O].

    Args:
        w_OI: in any format; the reference, without kernels for one, rounds its weights to the dtype of x.
        norm: (weight_I, eps): ``rms_norm`` of x comes first, rounded as it rounds.
        residual_TO: added before the sum is rounded.
        out: where the result goes; None takes new memory.
        out_dtype: of the result; None means that of ``out``, else of ``x_TI``.
    """
    assert x_TI.shape[1] == w_OI.shape[1]
    assert out is None or out_dtype in (None, out.dtype)
    dtype = (out_dtype or x_TI.dtype) if out is None else out.dtype
    if runs_cpu(x_TI, w_OI):
        from mixtralkit.ops.cpu.products import linear_cpu

        return linear_cpu(x_TI, w_OI, residual_TO, out, dtype, norm)
    packed = isinstance(w_OI, PackedWeight)
    if not (runs_triton(x_TI) and w_OI.weights in ATTENTION_FORMATS.values() if packed else runs_triton(x_TI, w_OI)):
        return linear_reference(x_TI, w_OI, norm, residual_TO, out, dtype)
    if x_TI.shape[0] > MOST_ROWS and not packed:
        return linear_library(x_TI, w_OI, norm, residual_TO, out, dtype)
    from mixtralkit.ops.linear.triton import linear_small

    return linear_small(x_TI, w_OI, norm, residual_TO, out, dtype)
