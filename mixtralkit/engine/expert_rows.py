"""How many rows chose each expert, for whoever looks while the engine runs."""

from __future__ import annotations

import numpy as np
import torch


class ExpertRows:
    """Sums of this rank's rows by layer and expert. Adding waits for nothing, and reading never for the device."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self._sums_LE = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._host_LE = torch.zeros(layers, experts, dtype=torch.int64, pin_memory=device.type == "cuda")

    def add(self, counts_LE: torch.Tensor) -> None:
        """A step's, on the device."""
        self._sums_LE += counts_LE
        self._host_LE.copy_(self._sums_LE, non_blocking=True)

    def read(self) -> np.ndarray:
        """int64 [L, E], up to the last step or the one before. Any thread may ask."""
        return self._host_LE.numpy().copy()
