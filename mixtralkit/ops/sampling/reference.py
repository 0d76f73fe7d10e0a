"""The likeliest token, and the rules in front of it, in plain torch."""

from __future__ import annotations

import torch

from mixtralkit.ops.sampling.types import Best, Rules


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


def adjust_logits_reference(
    logits_NV: torch.Tensor, rules: Rules, slots_N: torch.Tensor, positions_N: torch.Tensor
) -> torch.Tensor:
    """The reference of ``adjust_logits``."""
    presence_N1, frequency_N1, repetition_N1 = rules.penalties_S3[slots_N, :, None].unbind(1)
    counts_NV = rules.counts_SV[slots_N]
    in_answer_NV = counts_NV > 0
    found_NV = logits_NV + rules.bias_SV[slots_N]
    repeated_NV = torch.where(found_NV > 0, found_NV / repetition_N1, found_NV * repetition_N1)
    found_NV = torch.where(in_answer_NV | rules.in_prompt_SV[slots_N], repeated_NV, found_NV)
    found_NV = found_NV - frequency_N1 * counts_NV - presence_N1 * in_answer_NV
    is_early_N1 = (positions_N + 1 < rules.free_from_S[slots_N])[:, None]
    words_NW = rules.allowed_SW[slots_N] & ~torch.where(is_early_N1, rules.ends_SW[slots_N], 0)
    token_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    is_allowed_NV = (words_NW[:, token_V // 32] >> (token_V % 32)) & 1 == 1
    found_NV = found_NV.masked_fill(~is_allowed_NV, -torch.inf)
    return torch.where(rules.asks_S[slots_N, None], found_NV, logits_NV)
