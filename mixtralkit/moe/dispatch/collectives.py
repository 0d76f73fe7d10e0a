"""Collectives with gradients: what each sends forward comes back along the same way."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, group, send_counts, receive_counts):
        ctx.group, ctx.send_counts, ctx.receive_counts = group, send_counts, receive_counts
        out_RD = x_ND.new_empty((sum(receive_counts), *x_ND.shape[1:]))
        dist.all_to_all_single(out_RD, x_ND.contiguous(), receive_counts, send_counts, group=group)
        return out_RD

    @staticmethod
    def backward(ctx, grad_RD):
        return _AllToAll.apply(grad_RD, ctx.group, ctx.receive_counts, ctx.send_counts), None, None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, context):
        ctx.context = context
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.context.all_reduce(grad.contiguous().clone()), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, context):
        return context.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, context):
        ctx.context = context
        return context.all_gather(x_TD)

    @staticmethod
    def backward(ctx, grad_WTD):
        return ctx.context.all_reduce(grad_WTD.contiguous().clone())[ctx.context.rank], None


def all_to_all(x_ND: torch.Tensor, context: RankContext, send: list[int], receive: list[int]) -> torch.Tensor:
    """Sends the first ``send[0]`` rows to rank 0, the next ``send[1]`` to rank 1 …; returns rows in rank order."""
    return x_ND if context.group is None else _AllToAll.apply(x_ND, context.group, send, receive)


def enter_replicated(x: torch.Tensor, context: RankContext) -> torch.Tensor:
    """The same ``x`` on every rank enters work that is split over ranks: its gradients are summed over them."""
    return x if context.group is None else _Enter.apply(x, context)


def sum_over_ranks(x: torch.Tensor, context: RankContext) -> torch.Tensor:
    """Sum of every rank's ``x``, on every rank; the gradient of the (replicated) sum goes to each unchanged."""
    return x if context.group is None else _Sum.apply(x, context)


def gather_ranks(x_TD: torch.Tensor, context: RankContext) -> torch.Tensor:
    """Every rank's ``x_TD`` of one shape as [W, T, D]; gradients return to the rank they belong to, summed."""
    return x_TD.unsqueeze(0) if context.group is None else _Gather.apply(x_TD, context)
