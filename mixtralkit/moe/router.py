"""The router: which experts a row goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from mixtralkit.ops.gate import gate
from mixtralkit.ops.hidden import Hidden


@dataclass(frozen=True)
class Routing:
    """A router's choice: expert ids int64 [T, K] by falling weight, weights float32 [T, K], logits float32 [T, E]."""

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor

    def take(self, rows_N: torch.Tensor | slice) -> Routing:
        """Of some of the rows."""
        return Routing(self.experts_TK[rows_N], self.weights_TK[rows_N], self.logits_TE[rows_N])


class Router(nn.Module):
    """Mixtral's rule: the K largest logits, softmax over those K (Jiang et al., 2024, §2.1)."""

    def __init__(self, dim: int, num_experts: int, top_k: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=dtype, device=device), requires_grad=False)

    def forward(self, hidden: Hidden) -> tuple[Routing, Hidden]:
        """The choice, and the rows with the norm that the router has made of them for the experts as well."""
        gated = gate(hidden.rows_TD, self.weight, self.top_k, hidden.pending)
        return Routing(gated.experts_TK, gated.weights_TK, gated.logits_TE), replace(hidden, normed_TD=gated.normed_TD)
