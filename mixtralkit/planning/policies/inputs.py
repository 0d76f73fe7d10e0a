"""What every policy is given: loads that make sense, and a budget of slots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_MOST_EXPERTS = 8192  # time goes by their square


@dataclass(frozen=True)
class Budget:
    """Most experts that a rank may hold.

    Attributes:
        slots_per_rank: in each layer; None sets no limit.
        memory_gb: for the experts of all layers, in 10⁹ bytes; None sets no limit.
        expert_bytes: bytes of one expert's weights in one layer; needed with ``memory_gb``.
    """

    slots_per_rank: int | None = None
    memory_gb: float | None = None
    expert_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.slots_per_rank is not None and self.slots_per_rank < 1:
            raise ValueError(f"slots_per_rank ({self.slots_per_rank}) must be at least 1")
        if self.memory_gb is None:
            return
        if not 0 < self.memory_gb < float("inf"):
            raise ValueError(f"memory_gb ({self.memory_gb}) must be a number above 0")
        if self.expert_bytes is None or self.expert_bytes < 1:
            raise ValueError(f"expert_bytes ({self.expert_bytes}) must be at least 1 when memory_gb is given")

    def most_slots(self, num_layers: int, num_experts: int) -> int | None:
        """Slots a rank may have in each layer, never more than there are experts; None without a limit."""
        limits = [num_experts]
        if self.slots_per_rank is not None:
            limits.append(self.slots_per_rank)
        if self.memory_gb is not None:
            limits.append(int(min(self.memory_gb * 1e9 / (num_layers * self.expert_bytes) + 1e-9, num_experts)))
        return min(limits) if len(limits) > 1 else None

    def slots(self, num_layers: int, num_experts: int, world_size: int) -> int:
        """All slots the budget allows; without a limit as few as hold every expert once."""
        fewest = -(-num_experts // world_size)
        self.require(fewest, num_layers, f"{num_experts} experts over {world_size} ranks")
        most = self.most_slots(num_layers, num_experts)
        return fewest if most is None else most

    def require(self, slots: int, num_layers: int, why: str) -> None:
        """ValueError that says how much is lacking unless a rank may have ``slots`` slots in each layer."""
        if self.slots_per_rank is not None and slots > self.slots_per_rank:
            raise ValueError(
                f"slots_per_rank ({self.slots_per_rank}) must be at least {slots} for {why}: "
                f"it lacks {slots - self.slots_per_rank}"
            )
        if self.memory_gb is not None:
            needed_gb = memory_gb(slots, num_layers, self.expert_bytes)
            if needed_gb > self.memory_gb * (1 + 1e-9):
                raise ValueError(
                    f"memory_gb ({self.memory_gb:g}) must be at least {gb_above(needed_gb, self.memory_gb)} for {why}: "
                    f"it lacks {gb_above(needed_gb - self.memory_gb, 0)} GB"
                )


def gb_above(gb: float, limit_gb: float) -> str:
    """``gb`` rounded up, with at least two digits and so many that what is printed is above ``limit_gb``, as it is."""
    for digits in range(2, 12):
        text = f"{math.ceil(gb * 10**digits - 1e-6) / 10**digits:.{digits}f}"
        if float(text) > float(f"{limit_gb:g}"):
            return text
    return f"{gb:g}"


def memory_gb(slots: int, num_layers: int, expert_bytes: int) -> float:
    """10⁹ bytes that ``slots`` experts a layer take."""
    return slots * num_layers * expert_bytes / 1e9


def checked_loads(loads_LE: Any, world_size: int) -> np.ndarray:
    """Loads as float64 [layers, experts]; a layer without any counts as even.

    ValueError for another shape, a load that is not a number of at least 0, or no rank.
    """
    loads = np.asarray(loads_LE).astype(np.float64)  # a copy of our own
    if loads.ndim != 2 or 0 in loads.shape:
        raise ValueError(f"loads (shape {loads.shape}) must be [layers, experts]")
    if loads.shape[1] > _MOST_EXPERTS:
        raise ValueError(f"num_experts ({loads.shape[1]}) must be at most {_MOST_EXPERTS} to be planned for")
    if world_size < 1:
        raise ValueError(f"world_size ({world_size}) must be at least 1")
    wrong = np.argwhere(~(np.isfinite(loads) & (loads >= 0)))
    if len(wrong):
        layer, expert = wrong[0]
        raise ValueError(
            f"loads: layer {layer}, expert {expert} has {loads[layer, expert]}, which is no number of at least 0"
        )
    loads[loads.sum(1) == 0] = 1
    return loads
