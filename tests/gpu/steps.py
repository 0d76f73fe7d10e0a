"""How an engine's decode steps ran: as replays of graphs, or launched kernel by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mixtralkit.engine.decoding import DecodeSteps


@contextmanager
def counted_steps() -> Iterator[Counter[str]]:
    """Counts ``replayed`` and ``launched`` decode steps of this process."""
    kinds, launch = Counter(), DecodeSteps.launch

    def counting(*args):
        flight = launch(*args)
        kinds["replayed" if flight.replayed else "launched"] += 1
        return flight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeSteps, "launch", counting)
        yield kinds
