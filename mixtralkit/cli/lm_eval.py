"""``mixtralkit lm-eval``: lm-evaluation-harness, which takes all words that follow."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def lm_eval(words: Sequence[str]) -> None:
    """lm-evaluation-harness with Mixtral as its model mixtralkit; takes the harness's options (docs/evaluation.md)."""
    try:
        from mixtralkit.evaluation.lm_eval import harness
    except ImportError as error:
        raise ValueError(str(error)) from None
    sys.argv = ["lm_eval", *words]
    harness()


lm_eval.takes_words = True
