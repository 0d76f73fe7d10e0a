"""Next-token loss and the load-balance loss, as sums that add up over ranks to the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mixtralkit.moe.router import Routing


def next_token_nats(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p over the targets, in nats, float32; targets of -1 do not count."""
    flat = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(flat, targets_BT.flatten(), ignore_index=-1, reduction="sum")


def expert_counts(routings: Sequence[Routing], counted_T: torch.Tensor | None = None) -> torch.Tensor:
    """Rows each expert was chosen for, float32 [L, E], of the tokens where ``counted_T``; no host synchronisation."""
    experts_LTK = torch.stack([routing.experts_TK for routing in routings])
    if counted_T is not None:
        experts_LTK = experts_LTK.masked_fill(~counted_T[:, None], -1)
    ids_E = torch.arange(routings[0].logits_TE.shape[1], device=experts_LTK.device)
    return (experts_LTK.flatten(1)[..., None] == ids_E).sum(1, dtype=torch.float32)


def load_balance(routings: Sequence[Routing], counts_LE: torch.Tensor, tokens: int) -> torch.Tensor:
    """This rank's part of the auxiliary loss of the Switch Transformer (Fedus et al., 2021, eq. 4), mean over layers.

    ``E · Σ_e f_e · P_e``: f the share of routed rows that expert e got, P its mean router probability, both over the
    whole batch of all ranks; 1 when all is even. f has no gradient, so the parts of the ranks add up.

    Args:
        routings: of each layer, this rank's tokens.
        counts_LE: ``expert_counts`` summed over ranks.
        tokens: in the batches of all ranks together.
    """
    shares_LE = counts_LE / counts_LE.sum(1, keepdim=True)
    parts = [
        (shares_E * routing.logits_TE.softmax(-1).sum(0)).sum() * (shares_E.numel() / tokens)
        for shares_E, routing in zip(shares_LE, routings, strict=True)
    ]
    return torch.stack(parts).mean()
