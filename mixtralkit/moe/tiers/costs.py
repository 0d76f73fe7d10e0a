"""What a miss costs: over the bus, or on the CPU where the expert lies; and who answers which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

ROWS = (1, 2, 4, 8, 16)  # of an expert, for which the CPU's product is measured


@dataclass(frozen=True)
class Costs:
    """Seconds that the machine takes for a whole expert.

    Attributes:
        fetch_s: over the bus.
        product_s: on the CPU for so many rows, the numbers rising; empty where no expert is computed there.
    """

    fetch_s: float
    product_s: tuple[tuple[int, float], ...] = ()

    def cpu_s(self, rows: int) -> float:
        """Of so many rows on the CPU, between the measured numbers in proportion and beyond them by the last."""
        if not self.product_s:
            return float("inf")
        points = ((0, self.product_s[0][1]), *self.product_s)
        for (low, low_s), (high, high_s) in pairwise(points):
            if rows <= high:
                return low_s + (high_s - low_s) * (rows - low) / (high - low)
        most, most_s = points[-1]
        return most_s * rows / most

    def deal(self, missing: Mapping[int, int], misses: str = "auto") -> tuple[list[int], list[int]]:
        """Missing experts to the CPU and to the bus, so that the later of both ends early.

        Args:
            missing: rows of each.
            misses: ``"cpu"`` or ``"fetch"`` sends all there.
        """
        if misses != "auto":
            return (list(missing), []) if misses == "cpu" and self.product_s else ([], list(missing))
        cpu, bus, cpu_s, bus_s = [], [], 0.0, 0.0
        for one in sorted(missing, key=lambda one: (-missing[one], one)):  # most rows first: the bus does not mind
            on_cpu, fetched = cpu_s + self.cpu_s(missing[one]), bus_s + self.fetch_s
            if on_cpu < fetched:
                cpu, cpu_s = [*cpu, one], on_cpu
            else:
                bus, bus_s = [*bus, one], fetched
        return cpu, bus

    def cpu_share(self, missing: Mapping[int, int], lean: float = 1.0) -> float:
        """Of the width of every missing expert, what the CPU takes if both are to end together.

        ``lean``: how many times as slow as measured the bus is, beside the CPU.
        """
        cpu_s, bus_s = sum(map(self.cpu_s, missing.values())), lean * self.fetch_s * len(missing)
        return 0.0 if cpu_s == float("inf") else bus_s / (bus_s + cpu_s)
