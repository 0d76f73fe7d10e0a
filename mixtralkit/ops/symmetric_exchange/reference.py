"""The exchange through the group's collectives."""

from __future__ import annotations

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.ops.norm.reference import rms_norm_reference
from mixtralkit.ops.symmetric_exchange.types import ArrivedRows, ExpertPlaces, Norm


def dispatch_reference(
    context: RankContext,
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    places: ExpertPlaces,
    rows: int,
    kept_T: torch.Tensor | None = None,
) -> ArrivedRows:
    """The reference of ``SymmetricExchange.dispatch``: every row goes everywhere."""
    if kept_T is not None:
        experts_TK = experts_TK.masked_fill((kept_T < 0)[:, None], -1)
    ranks_TK, slots_TK = places.look_up(experts_TK)

    def everyone(values: torch.Tensor, fill: float) -> torch.Tensor:
        padded = torch.cat([values, values.new_full((rows - len(values), *values.shape[1:]), fill)])
        return context.all_gather(padded).transpose(0, 1).flatten(0, 1)

    elsewhere_RK = everyone(ranks_TK, -1) != context.rank
    slots_RK = everyone(slots_TK, -1).masked_fill(elsewhere_RK, -1)
    weights_RK = everyone(weights_TK, 0.0).masked_fill(elsewhere_RK, 0.0)
    is_member_TW = (ranks_TK[:, :, None] == torch.arange(context.world_size, device=x_TD.device)).any(1)
    bits_W = 2 ** torch.arange(context.world_size, device=x_TD.device)
    members_T = (is_member_TW * bits_W).sum(1).int()
    return ArrivedRows(everyone(x_TD, 0.0), slots_RK, weights_RK, members_T)


def combine_reference(
    context: RankContext,
    y_RD: torch.Tensor,
    members_T: torch.Tensor,
    residual_TD: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference of ``SymmetricExchange.combine``: every sum goes everywhere."""
    ranks, own = context.world_size, len(members_T)
    parts_WTD = context.all_gather(y_RD).unflatten(1, (-1, ranks))[:, :own, context.rank].float()
    sum_TD = torch.zeros(own, y_RD.shape[1], dtype=torch.float32, device=y_RD.device)
    for rank, part_TD in enumerate(parts_WTD):
        sum_TD += part_TD.masked_fill(((members_T >> rank) & 1 == 0)[:, None], 0.0)
    if residual_TD is not None:
        sum_TD += residual_TD
    x_TD = sum_TD.type_as(y_RD)
    return x_TD, None if norm is None else rms_norm_reference(x_TD, *norm)
