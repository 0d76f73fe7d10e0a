"""How an engine's steps ran: as replays of graphs, launched kernel by kernel, or with chunks of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mixtralkit.engine.runner import Runner


@contextmanager
def counted_steps() -> Iterator[Counter[str]]:
    """Counts ``graph``, ``launched`` and ``mixed`` steps of this process."""
    kinds, launch = Counter(), Runner.launch

    def counting(*args):
        flight = launch(*args)
        kinds[flight.kind] += 1
        return flight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "launch", counting)
        yield kinds
