"""The gate in one kernel: the norm in front of it, the experts' logits, the K largest and their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mixtralkit.ops.norm import rms_norm_plain
from mixtralkit.ops.runtime import runs_triton


class Gated(NamedTuple):
    """A gate's choice: expert ids int64 [T, K] by falling weight, weights and logits float32 [T, K] and [T, E].

    ``normed_TD`` are the rows the gate saw, which the experts see as well.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor
    normed_TD: torch.Tensor


def gate(
    x_TD: torch.Tensor, gate_ED: torch.Tensor, top_k: int, norm: tuple[torch.Tensor, float] | None = None
) -> Gated:
    """Mixtral's rule: the K largest logits, softmax over those K (Jiang et al., 2024, §2.1); ties to the lower id.

    Args:
        norm: (weight_D, eps): ``rms_norm`` of the rows comes first. None takes them as they are.
    """
    wants_gradient = gate_ED.requires_grad and torch.is_grad_enabled()
    if not runs_triton(x_TD) or wants_gradient or x_TD.numel() == 0 or x_TD.dtype != gate_ED.dtype:
        return gate_plain(x_TD, gate_ED, top_k, norm)
    from mixtralkit.ops.gate_triton import gate_rows

    return gate_rows(x_TD, gate_ED, top_k, norm)


def gate_plain(
    x_TD: torch.Tensor, gate_ED: torch.Tensor, top_k: int, norm: tuple[torch.Tensor, float] | None = None
) -> Gated:
    """The twin of ``gate``, with gradients; logits rounded to the dtype of the rows, as the product gives them."""
    normed_TD = x_TD if norm is None else rms_norm_plain(x_TD, *norm)
    logits_TE = F.linear(normed_TD, gate_ED).float()
    chosen_TK, experts_TK = logits_TE.topk(top_k, dim=-1)
    return Gated(experts_TK, chosen_TK.softmax(-1), logits_TE, normed_TD)
