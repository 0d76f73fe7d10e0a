"""The likeliest token of each row, and what its log-probability needs, in one pass over the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mixtralkit.ops.runtime import runs_triton


class Best(NamedTuple):
    """Of each row: the likeliest token (int64), its logit (float32), log Σ exp of all logits (float32)."""

    tokens_N: torch.Tensor
    values_N: torch.Tensor
    logsumexp_N: torch.Tensor


def best_token(logits_NV: torch.Tensor, first_token: int = 0) -> Best:
    """The largest logit of each row; of equal ones that of the lowest token.

    A row with a NaN gets a NaN ``logsumexp_N`` and some token of the vocabulary.

    Args:
        first_token: added to the tokens: where this rank's part of the vocabulary starts.
    """
    if not runs_triton(logits_NV) or logits_NV.numel() == 0:
        return best_token_plain(logits_NV, first_token)
    from mixtralkit.ops.sampling_triton import best_of_rows

    return best_of_rows(logits_NV, first_token)


def best_token_plain(logits_NV: torch.Tensor, first_token: int = 0) -> Best:
    """The twin of ``best_token``."""
    logits_NV = logits_NV.float()
    values_N, tokens_N = logits_NV.max(dim=-1)
    return Best(tokens_N + first_token, values_N, logits_NV.logsumexp(dim=-1))


def merge_best(
    values_WN: torch.Tensor, tokens_WN: torch.Tensor, logsumexp_WN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Best`` of every rank's part of the vocabulary, tokens counted over the whole of it, to one.

    Returns:
        int64 tokens [N], of equal ones the lowest, and their float32 log-probabilities [N].
    """
    if not runs_triton(values_WN) or values_WN.numel() == 0:
        return merge_best_plain(values_WN, tokens_WN, logsumexp_WN)
    from mixtralkit.ops.sampling_triton import merge_parts

    best = merge_parts(values_WN, tokens_WN, logsumexp_WN, relative=True)
    return best.tokens_N, best.values_N


def merge_best_plain(
    values_WN: torch.Tensor, tokens_WN: torch.Tensor, logsumexp_WN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of ``merge_best``."""
    values_N = values_WN.amax(dim=0)
    # Where a value is NaN none equals it: then any token of the vocabulary does.
    tokens_N = torch.where(values_WN == values_N, tokens_WN, tokens_WN.amax(dim=0)).amin(dim=0)
    return tokens_N, values_N - logsumexp_WN.logsumexp(dim=0)
