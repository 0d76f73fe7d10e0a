"""The slow oracle: the MoE layer as its definition reads, one row and one choice at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def moe_reference(
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    w13_EGD: torch.Tensor,
    w2_EDF: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Σ over the row's top-k experts of softmax weight · w2·(silu(w1·x) * (w3·x)), all experts in one place.

    float32 inside; differentiable; ties go to whichever ``topk`` takes.
    """
    rows = []
    for x_D in x_TD:
        logits_E = F.linear(x_D.float(), gate_ED.float())
        chosen_K, experts_K = logits_E.topk(top_k)
        row_D = torch.zeros_like(x_D, dtype=torch.float32)
        for weight, expert in zip(chosen_K.softmax(-1), experts_K.tolist(), strict=True):
            gate_F, up_F = F.linear(x_D.float(), w13_EGD[expert].float()).chunk(2)
            row_D = row_D + weight * F.linear(F.silu(gate_F) * up_F, w2_EDF[expert].float())
        rows.append(row_D)
    return torch.stack(rows).type_as(x_TD) if rows else x_TD.clone()
