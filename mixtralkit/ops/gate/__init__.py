"""The gate in one kernel: the norm in front of it, the experts' logits, the K largest and their weights."""

from __future__ import annotations

import torch

from mixtralkit.ops.gate.reference import gate_reference
from mixtralkit.ops.gate.types import Gated
from mixtralkit.ops.runtime import runs_cpu, runs_triton

__all__ = ["Gated", "gate"]


def gate(
    x_TD: torch.Tensor, gate_ED: torch.Tensor, top_k: int, norm: tuple[torch.Tensor, float] | None = None
) -> Gated:
    """Mixtral's rule: the K largest logits, softmax over those K (Jiang et al., 2024, §2.1); ties to the lower id.

    Args:
        norm: (weight_D, eps): ``rms_norm`` of the rows comes first. None takes them as they are.
    """
    if runs_cpu(x_TD, gate_ED):
        from mixtralkit.ops.cpu.products import gate_cpu

        return gate_cpu(x_TD, gate_ED, top_k, norm)
    if not runs_triton(x_TD, gate_ED):
        return gate_reference(x_TD, gate_ED, top_k, norm)
    from mixtralkit.ops.gate.triton import gate_rows

    return gate_rows(x_TD, gate_ED, top_k, norm)
