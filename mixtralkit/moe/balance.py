"""Rows to the ranks that ``planning.replicas`` has shared them out to."""

from __future__ import annotations

import torch

from mixtralkit.ops.counting import count_keys


def ranks_in_turn(
    experts_N: torch.Tensor, first_row_E: torch.Tensor, ends_EW: torch.Tensor, lost_N: torch.Tensor
) -> torch.Tensor:
    """Rank of each choice when an expert's rows, in order, fill its ranks' shares one after the other.

    Args:
        experts_N: int64 expert of each choice, in row order.
        first_row_E: how many of each expert's rows come before this rank's first.
        ends_EW: int64 cumulative shares of each expert over the ranks (``spread_rows(…).cumsum(1)``).
        lost_N: choices that were dropped; they take no share and come back with any number.
    """
    keys_N = experts_N.masked_fill(lost_N, len(first_row_E))
    order_N = keys_N.argsort(stable=True)
    sorted_N = experts_N[order_N]
    counts_E = count_keys(keys_N, len(first_row_E) + 1)[:-1]
    start_N = (counts_E.cumsum(0) - counts_E)[sorted_N]
    index_N = torch.arange(len(sorted_N), device=sorted_N.device) - start_N + first_row_E[sorted_N]
    ranks_N = (index_N[:, None] >= ends_EW[sorted_N]).sum(1)
    return torch.empty_like(ranks_N).scatter_(0, order_N, ranks_N)
