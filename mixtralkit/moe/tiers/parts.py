"""The parts that a row's choices give, from several places, and their sum."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch


def add_parts(
    parts: Sequence[torch.Tensor], top_k: int, residual_RD: torch.Tensor | None, dtype: torch.dtype,
    out_RD: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rows of their choices' parts: from several places, float32 [R · K, D] each, zero where another has it.

    Added as ``expert_sum`` does: a row's choices in order, then the residual, and rounded once.
    """
    total_ND = parts[0]
    for more_ND in parts[1:]:
        total_ND = total_ND + more_ND
    total_RKD = total_ND.unflatten(0, (-1, top_k))
    sum_RD = total_RKD[:, 0]
    for k in range(1, top_k):
        sum_RD = sum_RD + total_RKD[:, k]
    if residual_RD is not None:
        sum_RD = sum_RD + residual_RD
    return sum_RD.to(dtype) if out_RD is None else out_RD.copy_(sum_RD)


def only(slots_N: np.ndarray, slots: Collection[int]) -> np.ndarray:
    """int64 [N, 1]: the choices of some slots, -1 for others."""
    is_in_S = np.zeros(max(int(slots_N.max(initial=0)), *slots, 0, 0) + 2, bool)  # the last one is that of -1
    is_in_S[list(slots)] = True
    return np.where(is_in_S[slots_N], slots_N, -1)[:, None]
