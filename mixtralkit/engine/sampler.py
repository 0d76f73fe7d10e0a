"""Logits to tokens. What is drawn depends on the seed, the request and the position, on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from mixtralkit.config.options import Natural, NotNegative, Options, Rule
from mixtralkit.distributed import RankContext
from mixtralkit.ops.sampling import best_token, merge_best


@dataclass(frozen=True)
class SamplingOptions(Options):
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: Draw from the likeliest tokens that together have this probability, of those that top_k keeps.
        top_k: Draw from this many likeliest tokens; 0 is all.
        min_p: Draw from tokens with at least this share of the likeliest one's probability.
        seed: Decides what is drawn; the same seed gives the same text.
    """

    temperature: NotNegative = 0.6
    top_p: Annotated[float, Rule("in (0, 1]", lambda value: 0 < value <= 1)] = 0.9
    top_k: Natural = 0
    min_p: Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)] = 0.0
    seed: Natural = 1


def uniform(seed: int, request_id: int, position: int) -> float:
    """A number in [0, 1) that only its three arguments decide (24 bits, exact in float32)."""
    digest = hashlib.blake2b(f"{seed},{request_id},{position}".encode(), digest_size=3).digest()
    return int.from_bytes(digest, "little") / 2**24


def sample(
    logits_NV: torch.Tensor, options: Sequence[SamplingOptions], uniforms: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token for each row.

    Args:
        logits_NV: float32.
        options: of each row.
        uniforms: a number in [0, 1) for each row, see ``uniform``.

    Returns:
        int64 tokens [N], and float32 [N] their log-probabilities under the model itself: temperature 1, nothing cut.
        Nothing here waits for the device.
    """
    assert len(options) == len(uniforms) == len(logits_NV)
    if all(o.temperature == 0 for o in options):
        return sample_likeliest(logits_NV)
    settings_4N, uniforms_N = (
        torch.tensor(values, dtype=torch.float32).to(logits_NV.device, non_blocking=True)
        for values in (settings_of(options), uniforms)
    )
    return sample_each(logits_NV, settings_4N, uniforms_N)


def settings_of(options: Sequence[SamplingOptions]) -> list[list[float]]:
    """Temperatures, ``top_p``, ``top_k`` and ``min_p``, a list of each, as ``sample_each`` takes them."""
    return [[getattr(o, name) for o in options] for name in ("temperature", "top_p", "top_k", "min_p")]


def sample_likeliest(
    logits_NV: torch.Tensor, first_token: int = 0, context: RankContext | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``sample`` at temperature 0; of equal logits the lowest token.

    Args:
        first_token: of the logits, where they are this rank's part of the vocabulary.
        context: the ranks with the other parts; None where the logits are whole. Three numbers a row cross the ranks.
    """
    best = best_token(logits_NV, first_token)
    if context is None or context.world_size == 1:
        return best.tokens_N, best.values_N - best.logsumexp_N
    assert first_token + logits_NV.shape[1] < 2**24  # float32 holds every token exactly
    parts_W3N = context.all_gather(torch.stack([best.values_N, best.tokens_N.float(), best.logsumexp_N]))
    values_WN, tokens_WN, logsumexp_WN = parts_W3N.unbind(1)
    return merge_best(values_WN, tokens_WN.long(), logsumexp_WN)


def sample_each(
    logits_NV: torch.Tensor, settings_4N: torch.Tensor, uniforms_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``sample``, from the whole vocabulary's logits and the rows' settings (``settings_of``) on their device."""
    best = best_token(logits_NV)
    drawn_N = _draw(logits_NV, *settings_4N, uniforms_N)
    tokens_N = torch.where(settings_4N[0] > 0, drawn_N, best.tokens_N)
    return tokens_N, logits_NV.gather(-1, tokens_N[:, None])[:, 0] - best.logsumexp_N


def gather_vocabulary(part_NV: torch.Tensor, vocab_size: int, context: RankContext) -> torch.Tensor:
    """The whole vocabulary's logits [N, V] from every rank's part, cut as ``RankLayout.vocab`` cuts."""
    world = context.world_size
    if world == 1:
        return part_NV
    bounds = [vocab_size * rank // world for rank in range(world + 1)]
    parts_WNV = context.all_gather(F.pad(part_NV, (0, -(-vocab_size // world) - part_NV.shape[1])))
    return torch.cat([parts_WNV[w, :, : bounds[w + 1] - bounds[w]] for w in range(world)], dim=1)


def logprobs_of(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """Float32 log-probability [N] of each row's token."""
    return logits_NV.gather(-1, tokens_N[:, None])[:, 0] - logits_NV.logsumexp(dim=-1)


def _draw(logits_NV, temperature_N, top_p_N, top_k_N, min_p_N, uniform_N) -> torch.Tensor:
    """Inverts the cumulative distribution of the kept tokens, likeliest first."""
    temperature_N1 = torch.where(temperature_N > 0, temperature_N, 1.0)[:, None]
    shifted_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)  # a tiny temperature must not overflow
    sorted_NV, order_NV = (shifted_NV / temperature_N1).sort(dim=-1, descending=True, stable=True)
    probs_NV = sorted_NV.softmax(dim=-1)
    rank_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
    in_top_k_NV = (top_k_N[:, None] == 0) | (rank_V < top_k_N[:, None])
    probs_NV = probs_NV * in_top_k_NV
    cumulative_NV = probs_NV.cumsum(dim=-1)
    keep_NV = (probs_NV > 0) & (cumulative_NV - probs_NV < top_p_N[:, None] * cumulative_NV[:, -1:])
    keep_NV &= probs_NV >= min_p_N[:, None] * probs_NV[:, :1]
    keep_NV[:, 0] = True
    cumulative_NV = (probs_NV * keep_NV).cumsum(dim=-1)
    place_N = (cumulative_NV <= uniform_N[:, None] * cumulative_NV[:, -1:]).sum(dim=-1)
    # Rounding may put the number past the end; the kept ones come first, so their last is meant.
    place_N = torch.minimum(place_N, keep_NV.sum(dim=-1) - 1)
    return order_NV.gather(-1, place_N[:, None])[:, 0]
