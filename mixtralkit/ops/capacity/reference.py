"""The cut in plain torch, with gradients of the weights; nothing waits for the host on a GPU."""

from __future__ import annotations

import torch

from mixtralkit.ops.capacity.types import Cut
from mixtralkit.planning.capacity import CapacityRule, cut_choices


def cut_to_capacity_reference(
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    local_E: torch.Tensor,
    rule: CapacityRule,
    valid_T: torch.Tensor | None = None,
) -> Cut:
    """The reference of ``cut_to_capacity``."""
    rows, top_k = experts_TK.shape
    valid = rows if valid_T is None else (valid_T >= 0).sum()
    capacity_1 = torch.as_tensor(rule.capacity(valid * top_k), dtype=torch.int64, device=experts_TK.device).reshape(1)
    worth_TK = weights_TK.detach() if rule.by_weight else torch.ones_like(weights_TK)
    offers = next_best(experts_TK, logits_TE)[:, top_k:].unbind(1) if rule.reroutes else ()
    cut = cut_choices(experts_TK, worth_TK, local_E[None], capacity_1, offers, valid_T=valid_T)
    kept_TK = weights_TK
    if rule.reroutes:  # a row that lost no choice keeps its weights to the last bit; one that lost all has only zeros
        chosen_TK = logits_TE.gather(1, cut.experts_TK.clamp(min=0)).masked_fill(cut.experts_TK < 0, -torch.inf)
        kept_TK = torch.where(cut.over_TK.any(1, keepdim=True), chosen_TK.softmax(-1).nan_to_num(0.0), weights_TK)
    return Cut(cut.experts_TK, kept_TK.masked_fill(cut.experts_TK < 0, 0.0), cut.dropped, cut.rerouted)


def next_best(experts_TK: torch.Tensor, logits_TE: torch.Tensor) -> torch.Tensor:
    """int64 [T, E]: each row's experts by falling logit, ties to the lower id, but its choices before all others."""
    order_TE = logits_TE.argsort(dim=1, descending=True, stable=True)
    is_chosen_TE = torch.zeros_like(order_TE, dtype=torch.bool).scatter_(1, experts_TK, True)
    return order_TE.gather(1, (~is_chosen_TE.gather(1, order_TE)).int().argsort(dim=1, stable=True))
