"""What the page and the metrics show of the experts: who was chosen, and what the plan makes of it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from mixtralkit.planning.plan import ExpertPlan

if TYPE_CHECKING:
    from mixtralkit.server.service import Service

SECONDS = 10  # that the page looks back


class Loads:
    """Sums of the rows that chose each expert, and those of the last seconds.

    Attributes:
        total_LE: int64, since the start.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.total_LE = np.zeros((layers, experts), np.int64)
        self._seen: deque[tuple[float, np.ndarray]] = deque([(time.monotonic(), self.total_LE)])

    def take(self, total_LE: np.ndarray) -> None:
        """The sums as they are now."""
        now = time.monotonic()
        self.total_LE = total_LE
        self._seen.append((now, total_LE))
        while len(self._seen) > 1 and now - self._seen[1][0] >= SECONDS:
            self._seen.popleft()

    @property
    def recent_LE(self) -> np.ndarray:
        """int64, of the last seconds."""
        return self.total_LE - self._seen[0][1]


def rank_shares(plan: ExpertPlan, loads_LE: np.ndarray) -> np.ndarray:
    """Share of each layer's rows that each rank computes, replicas evenly: float64 [L, W], 0 where nothing came."""
    shares_LWE = plan.holds_LWE / plan.holds_LWE.sum(1, keepdims=True)
    rows_LW = (shares_LWE * loads_LE[:, None]).sum(-1)
    return rows_LW / np.maximum(rows_LW.sum(1, keepdims=True), 1)


def balancedness(shares_LW: np.ndarray) -> float | None:
    """Mean over the layers of the ranks' mean load by the busiest's, 1 where all are even; None without rows."""
    seen_LW = shares_LW[shares_LW.any(1)]
    return float((seen_LW.mean(1) / seen_LW.max(1)).mean()) if len(seen_LW) else None


def live(service: Service) -> dict[str, Any]:
    """What the page shows."""
    found: dict[str, Any] = {"model": service.name, "state": service.state}
    snapshot = service.thread.snapshot
    if snapshot is None:
        return found
    model, manager = service.engine.model, service.engine.plan_manager
    plan, recent_LE = model.layout.plan, service.loads.recent_LE
    shares_LW = rank_shares(plan, recent_LE)
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
        "experts": {"seconds": SECONDS, "loads": recent_LE.tolist()},
        "ranks": {
            "shares": (shares_LW[seen].mean(0) if seen.any() else np.zeros(shares_LW.shape[1])).tolist(),
            "balancedness": balancedness(shares_LW),
        },
        "plan": facts,
        "tiers": asdict(snapshot.tiers),
    }  # fmt: skip
