"""The likeliest token of each row with what its log-probability needs, and the rules in front of it; one pass each."""

from __future__ import annotations

import torch

from mixtralkit.ops.runtime import runs_cpu, runs_triton
from mixtralkit.ops.sampling.reference import adjust_logits_reference, best_token_reference, merge_best_reference
from mixtralkit.ops.sampling.types import Best, Rules

__all__ = ["Best", "Rules", "adjust_logits", "best_token", "merge_best"]


def best_token(logits_NV: torch.Tensor, first_token: int = 0) -> Best:
    """The largest logit of each row; of equal ones that of the lowest token.

    A row with a NaN gets a NaN ``logsumexp_N`` and some token of the vocabulary.

    Args:
        first_token: added to the tokens: where this rank's part of the vocabulary starts.
    """
    if runs_cpu(logits_NV) and logits_NV.dtype == torch.float32:
        from mixtralkit.ops.cpu.products import best_token_cpu

        return best_token_cpu(logits_NV, first_token)
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


def adjust_logits(
    logits_NV: torch.Tensor, rules: Rules, slots_N: torch.Tensor, positions_N: torch.Tensor
) -> torch.Tensor:
    """The logits from which the rules of its slot let each row choose: float32 [N, V], those given unchanged.

    In this order, as vLLM does it: the bias; the repetition penalty r of tokens of prompt and answer, l/r above 0 and
    l·r below; less frequency penalty · count and presence penalty of tokens of the answer; -inf where a token is not
    allowed, or would end the answer too early. Rows whose slots ask for nothing are copied to the bit.

    Args:
        logits_NV: float32, of the whole vocabulary.
        slots_N: int64, -1 for a row that only fills the shape.
        positions_N: int64, of each row's token; the one that is chosen stands behind it.
    """
    if not runs_triton(logits_NV):
        return adjust_logits_reference(logits_NV, rules, slots_N, positions_N)
    from mixtralkit.ops.sampling.triton import adjust_rows

    return adjust_rows(logits_NV, rules, slots_N, positions_N)
