"""What is known of a row's likeliest token, and the rules that change a row's logits."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Best(NamedTuple):
    """Of each row: the likeliest token (int64), its logit (float32), log Σ exp of all logits (float32)."""

    tokens_N: torch.Tensor
    values_N: torch.Tensor
    logsumexp_N: torch.Tensor


class Rules(NamedTuple):
    """What is done to the logits of the sequence in each slot, on the device; the last slot asks for nothing.

    Attributes:
        asks_S: bool; the logits of other slots stay as they are.
        penalties_S3: float32 presence, frequency and repetition penalty.
        bias_SV: float32, added to the logits.
        counts_SV: int32, how often the answer has each token.
        in_prompt_SV: bool, whether the prompt has it.
        allowed_SW: int32, a bit for each token that may be chosen: token t is bit t % 32 of word t // 32.
        ends_SW: int32, a bit for each token that may not be chosen before ``free_from_S``.
        free_from_S: int64 position, counted in prompt and answer, that may be the first of such a token.
    """

    asks_S: torch.Tensor
    penalties_S3: torch.Tensor
    bias_SV: torch.Tensor
    counts_SV: torch.Tensor
    in_prompt_SV: torch.Tensor
    allowed_SW: torch.Tensor
    ends_SW: torch.Tensor
    free_from_S: torch.Tensor
