"""The gate: which experts a row goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mixtralkit.ops.gate import gate


@dataclass(frozen=True)
class Routing:
    """A gate's choice: expert ids int64 [T, K] by falling weight, weights float32 [T, K], logits float32 [T, E]."""

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor


class TopKGate(nn.Module):
    """Mixtral's rule: the K largest logits, softmax over those K (Jiang et al., 2024, §2.1)."""

    def __init__(self, dim: int, num_experts: int, top_k: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x_TD: torch.Tensor) -> Routing:
        gated = gate(x_TD, self.weight, self.top_k)
        return Routing(gated.experts_TK, gated.weights_TK, gated.logits_TE)
