"""What a machine can do with an expert in host memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.moe.tiers import Tiers


@dataclass(frozen=True)
class Rates:
    """Bytes a second.

    Attributes:
        read: of the GPU's memory.
        bus: of pinned copies to the GPU, of whole experts.
        products: of experts on the CPU, for so many rows; empty where it has no kernels for them.
        both: of copies and of products of one row, both at once; None where the CPU computes none or there is no GPU.
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
        return cls(read, size / costs.fetch_s, products, _both(tiers) if products else None)

    def together(self, rows: float) -> float:
        """Of copies and of products for so many rows, both at once, added: what they are alone where nothing says."""
        if self.both is None:
            return self.bus + self.cpu(rows)
        return self.both[0] + self.both[1] * self.cpu(rows) / self.cpu(1)

    def rounded(self) -> dict[str, object]:
        """For JSON, in GB/s."""
        found: dict[str, object] = {
            "read_gb_s": rounded(self.read / 1e9), "bus_gb_s": rounded(self.bus / 1e9),
            "cpu_gb_s": {str(rows): rounded(rate / 1e9) for rows, rate in self.products},
        }  # fmt: skip
        if self.both is not None:
            found["both_gb_s"] = [rounded(rate / 1e9) for rate in self.both]
        return found


def rounded(value: float) -> float:
    """To five digits."""
    return float(f"{value:.5g}")


def _both(tiers: Tiers) -> tuple[float, float] | None:
    """Copies that are begun at once, and products until they are done; None where copies are not done by a device.

    As the engine does it: one thread begins the copies and computes. A second one that waits for them takes a core from
    the product, all of whose threads then wait for the slowest.
    """
    if tiers.context.device.type != "cuda":
        return None
    layer, place = tiers.layers[0], tiers.setup.places - 1
    slots, copies, products = tiers.slots[layer], 24, 0
    x_ND = torch.randn(1, tiers.columns[0]).to(tiers.dtype)
    started = time.perf_counter()
    tickets = [tiers.bring((layer, i % slots), place) for i in range(copies)]
    while not tickets[-1].query():
        tiers.product_on_cpu(layer, x_ND, torch.full((1, 1), (products + slots // 2) % slots), torch.ones(1, 1))
        products += 1
    seconds = time.perf_counter() - started
    return copies * tiers.expert_bytes / seconds, products * tiers.expert_bytes / seconds
