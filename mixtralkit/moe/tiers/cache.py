"""Which experts are in the places of GPU memory, and which of them make way."""

from __future__ import annotations

from collections.abc import Collection, Iterable

Key = tuple[int, int]  # layer, and the expert's slot there
DECAY = 0.98  # a step, of an expert's count of uses


class PlaceCache:
    """Places 0 … P-1 and the experts in them. Time counts the model's steps.

    Policies: ``lru`` lets go what was used longest ago, ``frequency`` what was used least, a use of n steps ago
    counting ``DECAY`` ** n. Of equals goes the one whose layer is furthest ahead.

    Attributes:
        place_of: the experts that have a place.
    """

    def __init__(self, places: int, layers: int, policy: str = "lru") -> None:
        self.places, self.layers, self.policy = places, layers, policy
        self.place_of: dict[Key, int] = {}
        self._free = list(range(places))[::-1]
        self._uses: dict[Key, tuple[float, int]] = {}  # a count and the step that it is of
        self._now = 0

    def next_step(self) -> None:
        self._now += 1

    def use(self, keys: Iterable[Key]) -> None:
        """A layer's rows name them in this step, whether they have places or not."""
        for key in keys:
            self._uses[key] = (self._count(key) + 1.0, self._now)

    def value(self, key: Key) -> float:
        """What it is worth to keep: the least goes first."""
        if self.policy == "lru":
            return float(self._uses[key][1]) if key in self._uses else -1.0
        return self._count(key)

    def _count(self, key: Key) -> float:
        count, step = self._uses.get(key, (0.0, self._now))
        return count * DECAY ** (self._now - step)

    def take(self, key: Key, keep: Collection[Key], layer: int, in_turn: bool = False) -> tuple[int, Key | None] | None:
        """A place for an expert and who had it, None for nobody; None where all places are kept.

        Args:
            keep: experts that stay.
            layer: the one that runs.
            in_turn: every layer touches nearly all its experts, so what lets go is what comes last in turn.
        """
        assert key not in self.place_of
        victim = None
        if not self._free:
            others = [other for other in self.place_of if other not in keep]
            if not others:
                return None
            ahead = {other: (other[0] - layer) % self.layers for other in others}
            if in_turn:
                victim = min(others, key=lambda other: (-ahead[other], self.value(other), other))
            else:
                victim = min(others, key=lambda other: (self.value(other), -ahead[other], other))
            self._free.append(self.place_of.pop(victim))
        self.place_of[key] = self._free.pop()
        return self.place_of[key], victim

    def drop(self, key: Key) -> None:
        """Its place is free."""
        self._free.append(self.place_of.pop(key))
