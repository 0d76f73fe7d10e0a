"""What is known of a row's likeliest token."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Best(NamedTuple):
    """Of each row: the likeliest token (int64), its logit (float32), log Σ exp of all logits (float32)."""

    tokens_N: torch.Tensor
    values_N: torch.Tensor
    logsumexp_N: torch.Tensor
