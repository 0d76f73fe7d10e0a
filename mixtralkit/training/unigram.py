"""The plainest language model there is, as a baseline: each token by itself, as often as in the training text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtralkit.json_file import load_json


class Unigram:
    """log P of tokens from their counts; a token that was never seen counts as if it had been, once."""

    def __init__(self, counts_V: Sequence[int] | np.ndarray) -> None:
        smooth_V = np.maximum(np.asarray(counts_V, np.float64), 1.0)
        self.logprobs_V = np.log(smooth_V / smooth_V.sum())

    @classmethod
    def load(cls, path: str | Path) -> Unigram:
        """Reads ``{"counts": [times of each id]}``; errors name the file."""
        return load_json(path, cls._from_json)

    @classmethod
    def _from_json(cls, content: Any) -> Unigram:
        if not isinstance(content, dict) or "counts" not in content:
            raise ValueError("has no counts")
        return cls(content["counts"])

    def logprob(self, ids: Sequence[int]) -> float:
        """Sum over ``ids``, nats."""
        return float(self.logprobs_V[list(ids)].sum())
