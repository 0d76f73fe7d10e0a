"""Where a rank's experts are: as the host knows it, as kernels read it, and as an answer says it."""

from __future__ import annotations

import numpy as np
import torch

from mixtralkit.moe.tiers.cache import Key, PlaceCache
from mixtralkit.moe.tiers.setup import Answer


class Tables:
    """Places of L layers with S slots at most.

    Attributes:
        places_LS: on the device, int64: where experts are or were, for kernels that are launched behind ``tell``.
        table_LS: on the device, int64: where they are, -1 where not, for steps that ask (``Desk``).
        said_LS: [L + 1, S], the host's: that table as it is to be, and what an answer says of its layer. ``said`` is
            the same memory.
    """

    def __init__(self, layers: int, slots: int, cache: PlaceCache, device: torch.device) -> None:
        self.places_LS = torch.zeros(layers, slots, dtype=torch.int64, device=device)
        self.table_LS = torch.full((layers, slots), -1, device=device)
        self.said_LS = torch.full((layers + 1, slots), -1, pin_memory=device.type == "cuda")
        self.said, self._is_shown, self._cache = self.said_LS.numpy(), False, cache
        self._told = np.zeros((layers, slots), np.int64)  # where experts are or were, as the host knows it
        self._untold: set[int] = set()  # layers that have changed since

    def note(self, key: Key) -> None:
        """The expert is where the cache has it."""
        self._told[key] = self.said[key] = self._cache.place_of[key]
        self._untold.add(key[0])
        self._is_shown = False

    def lend(self, key: Key, place: int) -> None:
        """The expert is somewhere for the rows at hand, and nobody else is to find it there."""
        self._told[key] = place

    def forget(self, key: Key | None) -> None:
        """The expert, if any, is not on the device any more."""
        if key is not None:
            self.said[key], self._is_shown = -1, False

    def tell(self, layer: int) -> None:
        """The layer's places on the device, in stream order."""
        if layer in self._untold:
            self._untold.remove(layer)
            self.places_LS[layer] = self.upload(self._told[layer].copy())

    def show(self) -> None:
        """Where experts are, to a step that is launched behind this."""
        if not self._is_shown:
            self.table_LS.copy_(self.said_LS[:-1], non_blocking=True)
            self._is_shown = True

    def unshow(self) -> None:
        """A step has failed, and nobody knows what it has left in the table."""
        self._is_shown = False

    def say(self, layer: int, answer: Answer) -> None:
        """Writes where a layer that waits finds its experts when the answer's copies are done."""
        self.said[-1] = -1
        for slot in (*answer.here, *answer.late):
            self.said[-1, slot] = self._told[layer, slot]

    def places_of(self, layer: int, slots: int) -> torch.Tensor:
        """int64 [S] on the device: where each slot's expert is; also what was lent for the rows at hand."""
        return self.upload(self._told[layer, :slots].copy())

    def upload(self, values: np.ndarray) -> torch.Tensor:
        """On the device when it gets there; from pinned memory, which torch keeps until then."""
        tensor = torch.from_numpy(values)
        tensor = tensor.pin_memory() if self.places_LS.is_cuda else tensor
        return tensor.to(self.places_LS.device, non_blocking=True)
