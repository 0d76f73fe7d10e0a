"""The exchange through the group's collectives."""

from __future__ import annotations

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.ops.norm.reference import rms_norm_reference
from mixtralkit.ops.symmetric_exchange.types import SLOT_BITS, ArrivedRows, Norm


def dispatch_reference(
    context: RankContext,
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    places_EC: torch.Tensor,
    rows: int,
    valid_T: torch.Tensor | None = None,
    stays: bool = False,
) -> ArrivedRows:
    """The reference of ``SymmetricExchange.dispatch``: every row goes everywhere."""
    lost_TK = experts_TK < 0
    if valid_T is not None:
        lost_TK = lost_TK | (valid_T < 0)[:, None]
    turn_T = torch.arange(len(experts_TK), device=experts_TK.device) % places_EC.shape[1]
    places_TK = places_EC[experts_TK.clamp(min=0), turn_T[:, None]].masked_fill(lost_TK, -1)

    def everyone(values: torch.Tensor, fill: float) -> torch.Tensor:
        padded = torch.cat([values, values.new_full((rows - len(values), *values.shape[1:]), fill)])
        return context.all_gather(padded).transpose(0, 1).flatten(0, 1)

    places_RK = everyone(places_TK, -1)
    elsewhere_RK = places_RK >> SLOT_BITS != context.rank
    slots_RK = (places_RK & (2**SLOT_BITS - 1)).long().masked_fill(elsewhere_RK, -1)
    weights_RK = everyone(weights_TK, 0.0).masked_fill(elsewhere_RK, 0.0)
    members_T = _members(places_TK, context.world_size)
    if stays:
        is_valid_T = torch.ones_like(members_T) if valid_T is None else (valid_T >= 0).int()
        members_T = torch.where(members_T == 0, is_valid_T << context.rank, members_T)
    return ArrivedRows(everyone(x_TD, 0.0), slots_RK, weights_RK, members_T, places_RK if stays else None)


def _members(places_TK: torch.Tensor, world_size: int) -> torch.Tensor:
    """int32 [T]: bit w is set where some choice is at rank w."""
    ranks_W = torch.arange(world_size, device=places_TK.device)
    is_member_TW = (places_TK[:, :, None] >> SLOT_BITS == ranks_W).any(1)
    return (is_member_TW * 2**ranks_W).sum(1).int()


def combine_reference(
    context: RankContext,
    y_RD: torch.Tensor,
    members_T: torch.Tensor,
    residual_TD: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference of ``SymmetricExchange.combine``: every sum goes everywhere."""
    ranks, own = context.world_size, len(members_T)
    parts_WTD = context.all_gather(y_RD).unflatten(1, (-1, ranks))[:, :own, context.rank]
    return _add(parts_WTD, members_T, residual_TD, norm)


def combine_at_owner_reference(
    context: RankContext, y_RD: torch.Tensor, arrived: ArrivedRows, norm: Norm | None = None, residual: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The reference of ``SymmetricExchange.combine_at_owner``: every sum goes everywhere."""
    ranks, rank = context.world_size, context.rank
    places_TWK = arrived.places_RK.unflatten(0, (-1, ranks))
    rows = torch.arange(len(places_TWK), device=y_RD.device)
    kept_TWK = places_TWK >= 0
    first_TW1 = kept_TWK.int().argmax(-1, keepdim=True)
    owner_TW = (places_TWK >> SLOT_BITS).gather(-1, first_TW1).squeeze(-1).masked_fill(~kept_TWK.any(-1), -1)
    own = len(arrived.members_T)  # rows that this rank gave; of those without a choice left it stays the owner
    stays_T = (arrived.members_T != 0) & ~kept_TWK[:own, rank].any(-1)
    owner_TW[:own, rank] = owner_TW[:own, rank].masked_fill(stays_T, rank)
    is_mine_TW = owner_TW == rank
    sender_T = is_mine_TW.int().argmax(1)
    number_T = rows * ranks + sender_T
    members_T = _members(places_TWK[rows, sender_T], ranks)
    residual_TD = arrived.x_RD[number_T] if residual else None
    x_TD, normed_TD = _add(context.all_gather(y_RD)[:, number_T], members_T, residual_TD, norm)
    return x_TD, normed_TD, is_mine_TW.any(1).long() - 1


def _add(
    parts_WTD: torch.Tensor, members_T: torch.Tensor, residual_TD: torch.Tensor | None, norm: Norm | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The ranks' parts in their order in float32, where they have one; residual; norm."""
    sum_TD = torch.zeros(parts_WTD.shape[1:], dtype=torch.float32, device=parts_WTD.device)
    for rank, part_TD in enumerate(parts_WTD.float()):
        sum_TD += part_TD.masked_fill(((members_T >> rank) & 1 == 0)[:, None], 0.0)
    if residual_TD is not None:
        sum_TD += residual_TD
    x_TD = sum_TD.type_as(parts_WTD)
    return x_TD, None if norm is None else rms_norm_reference(x_TD, *norm)
