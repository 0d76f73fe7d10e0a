"""What MoE layers are compared with: MixtralKit's loop over all experts, and the padded all-gather of course notes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixtralkit.distributed import RankContext
from mixtralkit.moe.router import Routing


def loop_over_experts(
    x_TD: torch.Tensor, routing: Routing, w13_EGD: torch.Tensor, w2_EDF: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """One expert after the other, each on the rows a mask finds for it, as MixtralKit computes its layer.

    The experts are those from ``first`` on; rows of others add nothing.
    """
    y_TD = torch.zeros_like(x_TD)
    for number in range(w13_EGD.shape[0]):
        rows_N, choice_N = torch.where(routing.experts_TK == first + number)  # host sync
        gate_NF, up_NF = F.linear(x_TD[rows_N], w13_EGD[number]).chunk(2, dim=-1)
        y_ND = F.linear(F.silu(gate_NF) * up_NF, w2_EDF[number])
        y_TD.index_add_(0, rows_N, y_ND * routing.weights_TK[rows_N, choice_N, None].type_as(y_ND))
    return y_TD


class PaddedAllGather:
    """Every rank's rows, padded to equal numbers, go to every rank; each adds its experts' part; one all-reduce."""

    def __init__(self, context: RankContext, w13_SGD: torch.Tensor, w2_SDF: torch.Tensor, first: int) -> None:
        self.context, self.w13_SGD, self.w2_SDF, self.first = context, w13_SGD, w2_SDF, first

    def __call__(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        context, own = self.context, x_TD.shape[0]
        most = int(context.all_gather(torch.tensor([own], device=x_TD.device)).max())  # host sync

        def everyone(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
            padding = values.new_full((most - own, *values.shape[1:]), fill)
            return context.all_gather(torch.cat([values, padding])).flatten(0, 1)

        together = Routing(everyone(routing.experts_TK, -1), everyone(routing.weights_TK), routing.logits_TE)
        y_RD = loop_over_experts(everyone(x_TD), together, self.w13_SGD, self.w2_SDF, self.first)
        start = context.rank * most
        return context.all_reduce(y_RD)[start : start + own]
