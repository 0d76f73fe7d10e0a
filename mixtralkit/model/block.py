"""One block: attention, then experts, each added to the residual stream together with the norm that follows."""

from __future__ import annotations

import torch
from torch import nn

from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.attention import Attention
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.norm import RMSNorm
from mixtralkit.moe.layer import MoEReport
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.hidden import Hidden


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)): of any batch, on one rank or several, in a graph or not."""

    def __init__(
        self, layer: int, layout: RankLayout, context: RankContext, dtype: torch.dtype, feed_forward: nn.Module
    ) -> None:
        super().__init__()
        config = layout.config
        self.attention = Attention(layer, layout, context, dtype)
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype, context.device)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype, context.device)

    def forward(
        self,
        hidden: Hidden,
        batch: ForwardBatch,
        following: RMSNorm,
        sums: RowReducer | None = None,
        wanted_N: torch.Tensor | None = None,
    ) -> tuple[Hidden, MoEReport]:
        """The stream in front of ``attention_norm`` to the stream in front of ``following``; what the experts did.

        Args:
            sums: adds the parts of attention, where each rank has some of the heads.
            wanted_N: the rows that go on behind attention; None for all.
        """
        if hidden.ids_T is not None:  # rows have moved between ranks
            batch = batch.take(hidden.ids_T)
        elif hidden.valid_T is not None:
            batch = batch.masked(hidden.valid_T)
        hidden = self.attention(hidden, batch, sums, self.ffn_norm.of, wanted_N)
        rows = batch.rows if wanted_N is None else batch.rows.take(wanted_N)
        return self.feed_forward(hidden, rows, following.of)
