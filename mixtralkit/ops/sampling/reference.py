"""The likeliest token in plain torch."""

from __future__ import annotations

import torch

from mixtralkit.ops.sampling.types import Best


def best_token_reference(logits_NV: torch.Tensor, first_token: int = 0) -> Best:
    """The reference of ``best_token``."""
    logits_NV = logits_NV.float()
    values_N, tokens_N = logits_NV.max(dim=-1)
    return Best(tokens_N + first_token, values_N, logits_NV.logsumexp(dim=-1))


def merge_best_reference(
    values_WN: torch.Tensor, tokens_WN: torch.Tensor, logsumexp_WN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of ``merge_best``."""
    values_N = values_WN.amax(dim=0)
    # Where a value is NaN none equals it: then any token of the vocabulary does.
    tokens_N = torch.where(values_WN == values_N, tokens_WN, tokens_WN.amax(dim=0)).amin(dim=0)
    return tokens_N, values_N - logsumexp_WN.logsumexp(dim=0)
