"""Log-likelihoods of continuations and of texts: many sequences scored together, on any number of ranks.

Only ``Mixtral.request`` and the engine's loop are used: a request of length 0 with ``prompt_logprobs`` is one pass
over its tokens, and the engine flattens as many of these into a step as there are places. Every rank makes the same
calls and gets the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tqdm import tqdm

from mixtralkit.engine.requests import Completion, Request
from mixtralkit.mixtral import Mixtral

Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]  # context and continuation

# Float32 sums over one vocabulary, in different batches, agree within this (nats).
ROUNDING = 1e-4
# Tokens that one round of the test for greediness generates: most continuations fail at their first.
GREEDY_TOKENS = 8


class Likelihood(NamedTuple):
    """Of one continuation: the sum of its tokens' log-probabilities (nats), and whether each token is the likeliest."""

    logprob: float
    is_greedy: bool


def loglikelihoods(
    mixtral: Mixtral, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], progress: bool = False
) -> list[Likelihood]:
    """log P(continuation | context) of each pair, in their order.

    Equal sequences run once, the longest first, so that the ranks' shares of a step are alike. ``is_greedy`` is known
    from the log-probabilities for almost all pairs; for the others the model is asked what it would have said.

    Args:
        pairs: token ids (context, continuation), each at least one; the context begins with the begin token as a rule.
        progress: a bar on rank 0's stderr.
    """
    clean = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
    logprobs = token_logprobs(mixtral, clean, progress)
    greedy = _are_greedy(mixtral, clean, logprobs)
    return [Likelihood(math.fsum(own), is_greedy) for own, is_greedy in zip(logprobs, greedy, strict=True)]


def windows(ids: Sequence[int], begin: int, window: int, context: int = 1) -> list[Pair]:
    """Cuts ``begin`` + ``ids`` into (context, continuation) so that every id is in just one continuation.

    A pair has at most ``window`` tokens. The first has ``begin`` alone as its context, the others at least ``context``
    ids; the last reaches back as far as the window allows. With begin B, ids 1 … 6, window 4 and context 2:
    ``(B | 1 2 3), (2 3 | 4 5), (3 4 5 | 6)``. Context 1 is what lm-evaluation-harness calls rolling.
    """
    if window < 2:
        raise ValueError(f"window ({window}) must be at least 2")
    if not 1 <= context < window:
        raise ValueError(f"context ({context}) must lie in 1 … {window - 1} (window - 1)")
    whole = (begin, *ids)
    pairs, scored = [], 1
    while scored < len(whole):
        stop = min(len(whole), scored + window - (1 if scored == 1 else context))
        start = max(0, stop - window)
        pairs.append((whole[start:scored], whole[scored:stop]))
        scored = stop
    return pairs


def token_logprobs(mixtral: Mixtral, pairs: Sequence[Pair], progress: bool = False) -> list[list[float]]:
    """Log-probabilities of each continuation's tokens; arguments as for ``loglikelihoods``."""
    for i, pair in enumerate(pairs):
        check_pair(pair, f"pair {i}", mixtral.model.params.max_seq_len)
    sequences = sorted({context + continuation for context, continuation in pairs}, key=lambda s: (-len(s), s))
    requests = [score_request(mixtral, i, sequence) for i, sequence in enumerate(sequences)]
    found: dict[Ids, list[float]] = {}
    is_shown = progress and mixtral.model.context.is_first
    with tqdm(total=len(requests), unit="sequence", disable=not is_shown) as bar:
        for done in mixtral.generate_many(requests):
            found[sequences[done.id]] = done.prompt_logprobs
            bar.update()
    own = [found[context + continuation][len(context) :] for context, continuation in pairs]
    for i, values in enumerate(own):
        check_finite(values, f"pair {i}", mixtral)
    return own


def score_request(mixtral: Mixtral, id: int, sequence: Ids) -> Request:
    """A request that scores the tokens of ``sequence`` and generates nothing."""
    return mixtral.request(id, sequence, max_gen_len=0, prompt_logprobs=True, temperature=0.0)


def check_pair(pair: Pair, name: str, max_seq_len: int) -> None:
    """ValueError that begins with ``name`` unless the pair can be scored."""
    context, continuation = pair
    if not context:
        raise ValueError(f"{name} has no context; give the begin token at least")
    if not continuation:
        raise ValueError(f"{name} has no continuation")
    if len(context) + len(continuation) > max_seq_len:
        raise ValueError(
            f"{name} has {len(context)} + {len(continuation)} tokens, more than max_seq_len ({max_seq_len})"
        )


def check_finite(logprobs: Sequence[float], name: str, mixtral: Mixtral) -> None:
    """RuntimeError that names what was scored where the model computed NaN or infinity."""
    for place, value in enumerate(logprobs):
        if not math.isfinite(value):
            raise RuntimeError(
                f"the model gave no finite log-probability for {name}, token {place} of the continuation, in "
                f"{mixtral.model.dtype}; float16 overflows where bfloat16 does not"
            )


def _are_greedy(mixtral: Mixtral, pairs: Sequence[Pair], logprobs: Sequence[Sequence[float]]) -> list[bool]:
    """Whether the likeliest token each time gives the continuation.

    A token with more than half of the probability is the likeliest; one that another pair's token beats behind the
    same context is not. What stays open is generated from the first open token on and compared, a few tokens a round.
    """
    best: dict[Ids, float] = {}
    for (context, _), own in zip(pairs, logprobs, strict=True):
        best[context] = max(own[0], best.get(context, -math.inf))
    verdicts = [own[0] > best[context] - ROUNDING for (context, _), own in zip(pairs, logprobs, strict=True)]
    certain = math.log(0.5) + ROUNDING
    unsure = {
        i: [place for place, value in enumerate(own) if value <= certain]
        for i, own in enumerate(logprobs)
        if verdicts[i]
    }
    while unsure := {i: places for i, places in unsure.items() if places}:
        answers = _likeliest(mixtral, {i: _open_part(pairs[i], places) for i, places in unsure.items()})
        for i, places in unsure.items():
            start, answer = places[0], answers[i]
            verdicts[i] = answer == pairs[i][1][start : start + len(answer)]
            unsure[i] = [p for p in places if p >= start + len(answer)] if verdicts[i] else []
    return verdicts


def _open_part(pair: Pair, places: Sequence[int]) -> tuple[Ids, int]:
    """The ids before the first open token, and how many tokens a round asks for."""
    context, continuation = pair
    return context + continuation[: places[0]], min(places[-1] - places[0] + 1, GREEDY_TOKENS)


def _likeliest(mixtral: Mixtral, asked: Mapping[int, tuple[Ids, int]]) -> dict[int, Ids]:
    """What the model says next, 1 to as many tokens as asked for: up to the end token, which is among them."""
    wanted = sorted(set(asked.values()), key=lambda question: (-len(question[0]), question))
    requests = [mixtral.request(i, ids, length, temperature=0.0) for i, (ids, length) in enumerate(wanted)]
    answers = [_with_end(done) for done in mixtral.engine.complete(requests)]
    of = dict(zip(wanted, answers, strict=True))
    return {i: of[question] for i, question in asked.items()}


def _with_end(completion: Completion) -> Ids:
    return (*completion.tokens, *([] if completion.end_token is None else [completion.end_token]))
