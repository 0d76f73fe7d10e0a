"""The likeliest token of each row, and what its log-probability needs, in one pass over the logits."""

from __future__ import annotations

import torch

from mixtralkit.ops.runtime import runs_triton
from mixtralkit.ops.sampling.reference import best_token_reference, merge_best_reference
from mixtralkit.ops.sampling.types import Best

__all__ = ["Best", "best_token", "merge_best"]


def best_token(logits_NV: torch.Tensor, first_token: int = 0) -> Best:
    """The largest logit of each row; of equal ones that of the lowest token.

    A row with a NaN gets a NaN ``logsumexp_N`` and some token of the vocabulary.

    Args:
        first_token: added to the tokens: where this rank's part of the vocabulary starts.
    """
    if not runs_triton(logits_NV):
        return best_token_reference(logits_NV, first_token)
    from mixtralkit.ops.sampling.triton import best_of_rows

    return best_of_rows(logits_NV, first_token)


def merge_best(
    values_WN: torch.Tensor, tokens_WN: torch.Tensor, logsumexp_WN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Best`` of every rank's part of the vocabulary, tokens counted over the whole of it, to one.

    Returns:
        int64 tokens [N], of equal ones the lowest, and their float32 log-probabilities [N].
    """
    if not runs_triton(values_WN):
        return merge_best_reference(values_WN, tokens_WN, logsumexp_WN)
    from mixtralkit.ops.sampling.triton import merge_parts

    best = merge_parts(values_WN, tokens_WN, logsumexp_WN, relative=True)
    return best.tokens_N, best.values_N
