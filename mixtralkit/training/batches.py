"""Training batches that depend on (seed, step) alone, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from mixtralkit.training.corpus import digest
from mixtralkit.training.tokens import BOS_ID


class BatchSampler:
    """Windows of ``seq_len + 1`` tokens at random places of the domains' streams, the first token made a begin token.

    So a begin token comes before text from the middle of a document too, as it does before a prompt.
    A domain is drawn in proportion to ``tokens ** mix_power``: 1 draws every token equally often, 0 every domain.
    All tokens lie on ``device`` as one int32 tensor, so that a step copies only the places of its windows.
    """

    def __init__(
        self,
        streams: Mapping[str, np.ndarray],
        seq_len: int,
        sequences: int,
        seed: int,
        device: torch.device,
        mix_power: float = 0.6,
    ) -> None:
        for domain, ids in streams.items():
            if len(ids) <= seq_len:
                raise ValueError(f"seq_len ({seq_len}) must be less than the {len(ids)} tokens of domain {domain!r}")
        self.sequences, self.seed = sequences, seed
        lengths = torch.tensor([len(ids) for ids in streams.values()], dtype=torch.float64)
        self.shares = lengths**mix_power / (lengths**mix_power).sum()
        self._starts = lengths.cumsum(0).long() - lengths.long()
        self._places = lengths.long() - seq_len
        flat = np.concatenate([ids.astype(np.int32) for ids in streams.values()])
        self._tokens = torch.from_numpy(flat).to(device)
        self._window = torch.arange(seq_len + 1, device=device)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        """Tokens int64 [sequences of this rank, seq_len + 1] of the step: the ranks' parts make up the whole."""
        starts_B = self._draw(step)[share(self.sequences, rank, world_size)]
        places_BT = starts_B.to(self._tokens.device, non_blocking=True)[:, None] + self._window
        return _begun(self._tokens[places_BT].long())

    def _draw(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(digest("batch", self.seed, step))
        domains_B = torch.multinomial(self.shares, self.sequences, replacement=True, generator=generator)
        places = torch.rand(self.sequences, dtype=torch.float64, generator=generator) * self._places[domains_B]
        return self._starts[domains_B] + places.long()


def share(count: int, rank: int, world_size: int) -> slice:
    """The rank's part of ``count`` things, as even as it can be."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def windows(ids: np.ndarray, seq_len: int, sequences: int) -> list[torch.Tensor]:
    """A stream cut into batches [sequences, seq_len + 1] that predict each token but the first exactly once.

    The first token of each is a begin token, as in training. The end is filled with -1, which is not to be scored; at
    least one batch.
    """
    count = max(1, math.ceil((len(ids) - 1) / seq_len))
    padded = torch.full((count * seq_len + 1,), -1, dtype=torch.int64)
    padded[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return list(_begun(padded.unfold(0, seq_len + 1, seq_len).clone()).split(sequences))


def _begun(tokens_BT: torch.Tensor) -> torch.Tensor:
    tokens_BT[:, 0] = BOS_ID
    return tokens_BT
