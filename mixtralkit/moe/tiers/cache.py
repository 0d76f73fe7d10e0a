"""Which experts are in the places of GPU memory, and which of them make way."""

from __future__ import annotations

from collections.abc import Collection, Iterable

Key = tuple[int, int]  # layer, and the expert's slot there
DECAY = 0.98  # a step, of an expert's count of uses


class PlaceCache:
    """Places 0 … P-1 and the experts in them. Time counts the model's steps.

    Policies: ``lru`` lets go what was used longest ago, ``frequency`` what was used least, a use of n steps ago
    counting ``DECAY`` ** n. Of equals goes the one whose layer is furthest ahead. After ``settle`` layers keep their
    shares: what comes takes a place of its own layer, or while this has less than its share, of one that has more. Over
    all layers at once, the least recently used experts are those of the layer that comes next.

    Attributes:
        place_of: the experts that have a place.
    """

    def __init__(self, places: int, layers: int, policy: str = "lru") -> None:
        self.places, self.layers, self.policy = places, layers, policy
        self.place_of: dict[Key, int] = {}
        self._of: list[dict[Key, None]] = [{} for _ in range(layers)]  # the same experts by layer
        self._free = list(range(places))[::-1]
        self._uses: dict[Key, tuple[float, int]] = {}  # a count and the step that it is of
        self._now = 0
        self._shares: dict[int, int] | None = None  # places of each layer

    def settle(self) -> None:
        """What every layer has now is its share."""
        self._shares = {layer: len(own) for layer, own in enumerate(self._of)}

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

    def likelihood(self, key: Key) -> float:
        """Share of the last steps that used it, the nearer ones counting more."""
        return self._count(key) * (1.0 - DECAY)

    def _count(self, key: Key) -> float:
        count, step = self._uses.get(key, (0.0, self._now))
        return count * DECAY ** (self._now - step)

    def take(
        self, key: Key, keep: Collection[Key], layer: int, in_turn: bool = False, most: float = float("inf")
    ) -> tuple[int, Key | None] | None:
        """A place for an expert and who had it, None for nobody; None where all places are kept.

        Args:
            keep: experts that stay.
            layer: the one that runs.
            in_turn: every layer touches nearly all its experts, so what lets go is what comes last in turn.
            most: what is likelier than this stays as well.
        """
        assert key not in self.place_of
        victim = None
        if not self._free:
            victim = self._victim(key, keep, layer, in_turn)
            if victim is None or self.likelihood(victim) > most:
                return None
            self._free.append(self._pop(victim))
        self._put(key, self._free.pop())
        return self.place_of[key], victim

    def exchange(self, key: Key, place: int, keep: Collection[Key]) -> tuple[int, Key | None] | None:
        """An expert stays in a place that nobody has; the place given for it, and who had that, as ``take`` says.

        Of its layer, or while this has less than its share, of one that has more. None where all others are worth as
        much.
        """
        assert key not in self.place_of
        victim = None
        if not self._free:
            others = [other for of in self._over_share(key[0]) for other in self._of[of] if other not in keep]
            victim = self._least(others, key[0])
            if victim is None or self.value(victim) >= self.value(key):
                return None
            self._free.append(self._pop(victim))
        self._put(key, place)
        return self._free.pop(), victim

    def _victim(self, key: Key, keep: Collection[Key], layer: int, in_turn: bool = False) -> Key | None:
        if in_turn:
            others = [other for other in self.place_of if other not in keep]
            return min(others, key=lambda k: (-((k[0] - layer) % self.layers), self.value(k), k), default=None)
        for layers in (self._over_share(key[0]), range(self.layers)):
            others = [other for of in layers for other in self._of[of] if other not in keep]
            if others:
                return self._least(others, layer)
        return None

    def _least(self, keys: Collection[Key], layer: int) -> Key | None:
        return min(keys, key=lambda k: (self.value(k), -((k[0] - layer) % self.layers), k), default=None)

    def lacks(self, layer: int) -> bool:
        """Whether a layer has less than its share."""
        return self._shares is not None and len(self._of[layer]) < self._shares[layer]

    def _over_share(self, layer: int) -> Iterable[int]:
        """Layers whose experts go first when one of a layer comes."""
        if self._shares is None:
            return ()
        if not self.lacks(layer):
            return (layer,)
        return [of for of, share in self._shares.items() if len(self._of[of]) > share]

    def _put(self, key: Key, place: int) -> None:
        self.place_of[key], self._of[key[0]][key] = place, None

    def _pop(self, key: Key) -> int:
        del self._of[key[0]][key]
        return self.place_of.pop(key)

    def drop(self, key: Key) -> None:
        """Its place is free."""
        self._free.append(self._pop(key))
