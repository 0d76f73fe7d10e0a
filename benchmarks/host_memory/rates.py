"""What a machine can do with an expert in host memory."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.moe.tiers import Costs, Tiers
from mixtralkit.moe.tiers.warm import bring_and_wait


@dataclass(frozen=True)
class Rates:
    """Bytes a second.

    Attributes:
        read: of the GPU's memory.
        bus: of pinned copies to the GPU, of whole experts.
        products: of experts on the CPU, for so many rows; empty where it has no kernels for them.
        both: of copies and of products of one row, both at once; None where the CPU computes none.
    """

    read: float
    bus: float
    products: tuple[tuple[int, float], ...]
    both: tuple[float, float] | None

    def cpu(self, rows: float) -> float:
        """Of an expert's product for so many rows; 0 without."""
        if not self.products:
            return 0.0
        numbers, rates = zip(*self.products, strict=True)
        return float(np.interp(rows, numbers, rates))

    @classmethod
    def measure(cls, tiers: Tiers, read: float) -> Rates:
        """With the costs that the tiers have measured."""
        size, costs = tiers.expert_bytes, tiers.costs
        products = tuple((rows, size / seconds) for rows, seconds in costs.product_s)
        return cls(read, size / costs.fetch_s, products, _both(tiers, costs) if products else None)

    def rounded(self) -> dict[str, object]:
        """For JSON, in GB/s."""
        found: dict[str, object] = {
            "read_gb_s": round(self.read / 1e9, 1), "bus_gb_s": round(self.bus / 1e9, 2),
            "cpu_gb_s": {str(rows): round(rate / 1e9, 2) for rows, rate in self.products},
        }  # fmt: skip
        if self.both is not None:
            found["both_gb_s"] = [round(rate / 1e9, 2) for rate in self.both]
        return found


def _both(tiers: Tiers, costs: Costs) -> tuple[float, float]:
    """Copies in a thread of their own while the CPU computes, eight experts each."""
    layer, place = tiers.layers[0], tiers.setup.places - 1
    slots, seconds = tiers.slots[layer], [0.0, 0.0]
    x_ND = torch.randn(1, tiers.columns[0]).to(tiers.dtype)

    def copy() -> None:
        if tiers.context.device.type == "cuda":
            torch.cuda.synchronize(tiers.context.device)  # gives this thread the device's context
        started = time.perf_counter()
        for i in range(8):
            bring_and_wait(tiers, (layer, i % slots), place)
        seconds[0] = time.perf_counter() - started

    thread = threading.Thread(target=copy)
    thread.start()
    started = time.perf_counter()
    for i in range(8):
        tiers.product_on_cpu(layer, x_ND, np.full(1, (i + 3) % slots), torch.ones(1, 1))
    seconds[1] = time.perf_counter() - started
    thread.join()
    return tuple(8 * tiers.expert_bytes / s for s in seconds)
