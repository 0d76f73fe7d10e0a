"""Logits to tokens. What is drawn depends on the seed, the request and the position, on nothing else.

Penalties, biases and what a request allows change the logits before a token is chosen; its log-probability stays the
model's own. They are on the device by slot (``SlotRules``), so that a step in a CUDA graph finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F

from mixtralkit.config.options import Natural, NotNegative, Options, Positive, Rule, Seed
from mixtralkit.distributed import RankContext
from mixtralkit.ops.sampling import Rules, adjust_logits, best_token, merge_best


def _is_bias(text: object) -> bool:
    id, _, bias = str(text).partition(":")
    try:
        return isinstance(text, str) and id.isascii() and id.isdigit() and abs(float(bias)) <= 100
    except ValueError:
        return False


Penalty = Annotated[float, Rule("in [-2, 2]", lambda value: -2 <= value <= 2)]
Bias = Annotated[str, Rule("TOKEN:BIAS, a token id and a number in [-100, 100]", _is_bias)]


@dataclass(frozen=True)
class SamplingOptions(Options):
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: Draw from the likeliest tokens that together have this probability, of those that top_k keeps.
        top_k: Draw from this many likeliest tokens; 0 is all.
        min_p: Draw from tokens with at least this share of the likeliest one's probability.
        seed: Decides what is drawn; the same seed gives the same text.
        presence_penalty: Taken off the logits of tokens that the answer has; below 0 favours them.
        frequency_penalty: Taken off as often as the answer has the token.
        repetition_penalty: Divides the logits above 0, and multiplies those below, of tokens that prompt or answer has.
        logit_bias: Added to the logits of tokens, each as TOKEN:BIAS with the token's id; in Python also a dict.
    """

    temperature: NotNegative = 0.6
    top_p: Annotated[float, Rule("in (0, 1]", lambda value: 0 < value <= 1)] = 0.9
    top_k: Natural = 0
    min_p: Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)] = 0.0
    seed: Seed = 1
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Positive = 1.0
    logit_bias: tuple[Bias, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(f"{id}:{bias}" for id, bias in self.logit_bias.items()))
        super().__post_init__()

    def check(self) -> None:
        if len(self.biases) < len(self.logit_bias):
            raise ValueError(f"logit_bias ({self.logit_bias}) must name each token once")

    @property
    def biases(self) -> dict[int, float]:
        """``logit_bias`` by token."""
        return {int(id): float(bias) for id, bias in (one.split(":") for one in self.logit_bias)}

    @property
    def asks(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1) or bool(self.logit_bias)

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError unless the model has every token that is named."""
        for id in self.biases:
            if id >= vocab_size:
                raise ValueError(f"logit_bias names token {id}; ids are below {vocab_size}")


def draw_key(seed: int, request_id: int) -> int:
    """What, with a position, decides a draw: 64 bits, unlike those of any other pair."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{request_id}".encode(), digest_size=8).digest(), "little")


def uniforms(keys_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that only ``draw_key`` (uint64) and position decide: float32 [N], 24 bits each.

    The splitmix64 generator: the key is its first state, the position counts its steps.
    """
    x_N = keys_N + (positions_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x_N ^ (x_N >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def uniform(seed: int, request_id: int, position: int) -> float:
    """``uniforms`` of one row."""
    return float(uniforms(np.array([draw_key(seed, request_id)], np.uint64), np.array([position]))[0])


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
    logits_NV: torch.Tensor,
    settings_4N: torch.Tensor | None,
    uniforms_N: torch.Tensor | None,
    adjusted_NV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``sample``, from the whole vocabulary's logits and the rows' settings (``settings_of``) on their device.

    Args:
        settings_4N: None where no row draws, and then no ``uniforms_N``.
        adjusted_NV: ``SlotRules.adjusted``, of which tokens are chosen, where a row asks for that.
    """
    best = best_token(logits_NV)
    chosen_NV, tokens_N = logits_NV, best.tokens_N
    if adjusted_NV is not None:
        chosen_NV, tokens_N = adjusted_NV, best_token(adjusted_NV).tokens_N
    if settings_4N is not None:
        tokens_N = torch.where(settings_4N[0] > 0, _draw(chosen_NV, *settings_4N, uniforms_N), tokens_N)
    return tokens_N, logits_NV.gather(-1, tokens_N[:, None])[:, 0] - best.logsumexp_N


@dataclass(frozen=True)
class Asked:
    """What a sequence asks of the logits from which its tokens are chosen, and what it has so far.

    Attributes:
        prompt, answer: token ids.
        min_tokens: so many tokens of the answer come before one of ``ends``.
        ends: ids that end the answer.
    """

    sampling: SamplingOptions
    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    min_tokens: int = 0
    ends: tuple[int, ...] = ()


class SlotRules:
    """What sequences ask of their logits, by slot on the device. Addresses never change.

    ::

        place      a sequence takes a slot                          ┐ launched in front of a step
        allow      the tokens that a grammar allows next            ┘
        adjusted   the logits to choose from                        ┐ inside a step, also in a graph
        count      the tokens that were chosen                      ┘

    Steps in which no sequence asks need none of it. Takes about 10 bytes a slot and token of the vocabulary.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        size, words, like = slots + 1, -(-vocab_size // 32), {"device": device}
        self._asking: set[int] = set()
        self.rules = Rules(
            torch.zeros(size, dtype=torch.bool, **like),
            torch.zeros(size, 3, **like),
            torch.zeros(size, vocab_size, **like),
            torch.zeros(size, vocab_size, dtype=torch.int32, **like),
            torch.zeros(size, vocab_size, dtype=torch.bool, **like),
            torch.full((size, words), -1, dtype=torch.int32, **like),
            torch.zeros(size, words, dtype=torch.int32, **like),
            torch.zeros(size, dtype=torch.int64, **like),
        )

    def place(self, slot: int, asked: Asked | None) -> None:
        """A sequence takes the slot; None for one that asks for nothing. Nothing waits for the device."""
        rules = self.rules
        if asked is None:
            if slot in self._asking:
                self._asking.remove(slot)
                rules.asks_S[slot] = False
            return
        self._asking.add(slot)
        sampling = asked.sampling
        penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
        rules.asks_S[slot] = True
        rules.penalties_S3[slot] = self._upload(penalties, torch.float32)
        self._fill(rules.bias_SV[slot], list(sampling.biases), list(sampling.biases.values()))
        self._fill(rules.counts_SV[slot], asked.answer, [1] * len(asked.answer))
        prompt = tuple(set(asked.prompt))
        self._fill(rules.in_prompt_SV[slot], prompt, [True] * len(prompt))
        rules.allowed_SW[slot] = -1
        ends_W = np.zeros(rules.ends_SW.shape[1], dtype=np.uint32)
        for token in asked.ends:
            ends_W[token // 32] |= np.uint32(1 << token % 32)
        rules.ends_SW[slot] = self._upload(ends_W.view(np.int32), torch.int32)
        rules.free_from_S[slot] = len(asked.prompt) + asked.min_tokens

    def allow(self, slots: Sequence[int], masks_BW: np.ndarray) -> None:
        """The only tokens that the sequences in ``slots`` may get next: a bit each, int32 words as ``Rules`` has them.

        For sequences that ask. Nothing waits for the device.
        """
        self.rules.allowed_SW[self._upload(slots, torch.int64)] = self._upload(masks_BW, torch.int32)

    def adjusted(self, logits_NV: torch.Tensor, slots_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """``ops.sampling.adjust_logits`` by the rules of the rows' slots."""
        return adjust_logits(logits_NV, self.rules, slots_N, positions_N)

    def count(self, slots_N: torch.Tensor, tokens_N: torch.Tensor) -> None:
        """The sequences' answers have these tokens now, one each; slot -1 is no sequence's."""
        counts_SV = self.rules.counts_SV
        counts_SV[slots_N, tokens_N] = counts_SV[slots_N, tokens_N] + 1

    def _fill(self, row_V: torch.Tensor, ids: Sequence[int], values: Sequence[float]) -> None:
        """Zero but for sums of ``values`` at ``ids``."""
        row_V.zero_()
        if ids:
            at_N = self._upload(ids, torch.int64)
            row_V.index_put_((at_N,), self._upload(values, row_V.dtype), accumulate=row_V.dtype != torch.bool)

    def _upload(self, values: Sequence | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        device, made = self.rules.asks_S.device, torch.as_tensor(values, dtype=dtype)
        made = made.pin_memory() if device.type == "cuda" else made
        return made.to(device, non_blocking=True)


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
