"""The gate in plain torch, with gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixtralkit.ops.gate.types import Gated
from mixtralkit.ops.norm.reference import rms_norm_reference


def gate_reference(
    x_TD: torch.Tensor, gate_ED: torch.Tensor, top_k: int, norm: tuple[torch.Tensor, float] | None = None
) -> Gated:
    """The reference of ``gate``, with gradients; logits rounded to the dtype of the rows, as the product gives them."""
    normed_TD = x_TD if norm is None else rms_norm_reference(x_TD, *norm)
    return choose(F.linear(normed_TD, gate_ED).float(), normed_TD, top_k)


def choose(logits_TE: torch.Tensor, normed_TD: torch.Tensor, top_k: int) -> Gated:
    """Mixtral's rule on float32 logits."""
    chosen_TK, experts_TK = logits_TE.topk(top_k, dim=-1)
    return Gated(experts_TK, chosen_TK.softmax(-1), logits_TE, normed_TD)
