"""What the page and the metrics show of the experts: who was chosen, and what the plan makes of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mixtralkit.engine.expert_rows import Figures
from mixtralkit.model.transformer import Transformer

if TYPE_CHECKING:
    from mixtralkit.server.service import Service

SECONDS = 10  # that the page looks back


class Loads:
    """Sums of what the layers did with rows, and those of the last seconds.

    Args:
        ranks: that have rows of their own.
    """

    def __init__(self, ranks: int, layers: int, experts: int) -> None:
        self._shape = layers, experts
        self._total_SN = np.zeros((ranks, 2 * layers * (experts + 2)), np.int64)
        self._seen: deque[tuple[float, np.ndarray]] = deque([(time.monotonic(), self._total_SN)])

    def take(self, sums: Mapping[int, np.ndarray]) -> None:
        """The sums of ranks as they are now; of those that are missing what they were."""
        now = time.monotonic()
        self._total_SN = self._total_SN.copy()
        for rank, sums_N in sums.items():
            self._total_SN[rank] = sums_N
        self._seen.append((now, self._total_SN))
        while len(self._seen) > 1 and now - self._seen[1][0] >= SECONDS:
            self._seen.popleft()

    @property
    def total(self) -> Figures:
        """Since the start."""
        return Figures.of(self._total_SN, *self._shape)

    @property
    def recent(self) -> Figures:
        """Of the last seconds."""
        return Figures.of(self._total_SN - self._seen[0][1], *self._shape)


def rank_shares(model: Transformer, figures: Figures) -> np.ndarray:
    """Share of each layer's rows that each rank computes, 0 where nothing came: float64 [L, W]."""
    tables = [model.store.tables[layer].replicas for layer in range(model.params.n_layers)]
    if model.layout.parallel.experts == "tp":  # every rank computes its part of each row
        seen_L = figures.choices_LE.any(1)
        return np.repeat(seen_L[:, None] / len(tables[0].slots_WE), len(tables[0].slots_WE), axis=1)
    if model.layout.parallel.attention == "coherent":  # rows may be anywhere
        tables = [replace(table, rows_everywhere=True) for table in tables]
    return figures.shares_LW(tables)


def balancedness(shares_LW: np.ndarray) -> np.ndarray:
    """Of each layer the ranks' mean load by the busiest's, 1 where all are even, 0 without rows: float64 [L]."""
    return shares_LW.mean(1) / np.maximum(shares_LW.max(1), 1e-9)


def live(service: Service) -> dict[str, Any]:
    """What the page shows."""
    found: dict[str, Any] = {"model": service.name, "state": service.state}
    snapshot = service.thread.snapshot
    if snapshot is None:
        return found
    model, manager = service.engine.model, service.engine.plan_manager
    plan, recent = model.layout.plan, service.loads.recent
    shares_LW, recent_LE = rank_shares(model, recent), recent.choices_LE
    even_L = balancedness(shares_LW)
    generated, prompt = service.metrics.tokens_per_s
    seen = shares_LW.any(1)
    facts = {"policy": plan.policy, "version": 0, "considered": 0, "experts_moved": 0, "longest_pause_ms": 0.0}
    if manager is not None:
        did = manager.statistics
        facts |= {
            "version": did.adopted, "considered": did.considered, "experts_moved": did.experts_moved,
            "longest_pause_ms": 1e3 * did.pauses.longest_s,
        }  # fmt: skip
    return found | {
        "requests": {
            "running": snapshot.running, "waiting": service.thread.waiting, "most": model.params.max_batch_size,
        },
        "pages": {
            "used": snapshot.pages_used, "total": snapshot.pages, "size": snapshot.page_size,
            "reusable": snapshot.pages_reusable,
        },
        "tokens_per_s": {"generated": round(generated, 1), "prompt": round(prompt, 1)},
        "experts": {"seconds": SECONDS, "loads": recent_LE.tolist(), **_shares_of(recent)},
        "ranks": {
            "shares": (shares_LW[seen].mean(0) if seen.any() else np.zeros(shares_LW.shape[1])).tolist(),
            "balancedness": float(even_L[seen].mean()) if seen.any() else None,
            "layers": {"shares": shares_LW.tolist(), "balancedness": even_L.tolist()},
        },
        "plan": facts,
        "tiers": asdict(snapshot.tiers),
    }  # fmt: skip


def _shares_of(figures: Figures) -> dict[str, float]:
    """Of all choices, those over a capacity and those that found their expert on every rank."""
    names = ("dropped", "rerouted", "hot_hits", "shadow_hits")
    sums = (*figures.cut_S2L.sum((0, 2)), *figures.hits_S2L.sum((0, 2)))
    choices = max(int(figures.choices_LE.sum()), 1)
    return {name: float(value / choices) for name, value in zip(names, sums, strict=True)}
