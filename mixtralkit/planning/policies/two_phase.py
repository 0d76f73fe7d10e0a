"""Lina's two phases: ranks by estimated popularity, then a correction where the real counts disagree (ATC'23, §5)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.inputs import Budget, checked_loads
from mixtralkit.planning.popularity import same_top


@dataclass(frozen=True)
class Correction:
    """What phase two finds in one layer.

    Attributes:
        right: whether the 2k experts with most real rows are those of the estimate.
        distance: total-variation distance [0, 1] of the estimated and the real shares.
        corrected: whether the layer is assigned again, with real counts.
    """

    right: bool
    distance: float
    corrected: bool


def two_phase(
    estimate_LE: np.ndarray,
    world_size: int,
    real_LE: np.ndarray | None = None,
    top_k: int = 2,
    threshold: float | None = None,
    budget: Budget | None = None,
) -> ExpertPlan:
    """Phase one for every layer from the estimate, phase two where real counts are given.

    Args:
        estimate_LE: estimated rows of each expert; only their shares count.
        real_LE: counted rows after the gate; None leaves phase one's choice.
        top_k: experts of a token, k.
        threshold: as in ``check_estimate``.
        budget: its slots are the most experts of a rank.

    Raises:
        ValueError: for loads that are no numbers of at least 0, of different shape, or a budget too small.
    """
    estimate_LE = checked_loads(estimate_LE, world_size)
    num_layers, num_experts = estimate_LE.shape
    slots = (budget or Budget()).slots(num_layers, num_experts, world_size)
    used_LE, meta = estimate_LE, {}
    if real_LE is not None:
        real_LE = checked_loads(real_LE, world_size)
        if real_LE.shape != estimate_LE.shape:
            raise ValueError(f"real loads (shape {real_LE.shape}) must be {estimate_LE.shape}, as the estimate")
        checks = [check_estimate(e, r, top_k, threshold) for e, r in zip(estimate_LE, real_LE, strict=True)]
        used_LE = np.where(np.array([[c.corrected] for c in checks]), real_LE, estimate_LE)
        meta = summarise(checks)
    layers = [assign(loads_E, world_size, slots) for loads_E in used_LE]
    filled = [[[*rank, *[-1] * (slots - len(rank))] for rank in ranks] for ranks in layers]
    return ExpertPlan(np.array(filled), num_experts, policy="two_phase", meta=meta)


def assign(loads_E: np.ndarray, world_size: int, slots: int) -> list[list[int]]:
    """Experts of each rank: n_e = W · share ranks for expert e, rounded, then first fit by falling size.

    A rank has room for a share of 1, the even one, and ``slots`` experts; what fits nowhere goes to the lightest rank
    that has a slot and not this expert. Replicas that find none are left out, the last to come first. Every expert
    gets one slot, which takes W · ``slots`` ≥ E.
    """
    wanted_E = loads_E / loads_E.sum() * world_size
    copies_E = np.clip(np.rint(wanted_E), 1, world_size).astype(int)
    while copies_E.sum() > world_size * slots:
        copies_E[np.where(copies_E > 1, wanted_E / copies_E, np.inf).argmin()] -= 1
    size_E = wanted_E / copies_E
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    filled_W = np.zeros(world_size)
    once = [(size_E[e], e) for e in range(len(copies_E))]
    again = [(size_E[e], e) for e in range(len(copies_E)) for _ in range(copies_E[e] - 1)]
    for size, expert in sorted(once + again, key=lambda item: (-item[0], item[1])):
        free = [w for w in range(world_size) if len(ranks[w]) < slots and expert not in ranks[w]]
        if not free:
            continue
        fitting = [w for w in free if filled_W[w] + size <= 1 + 1e-9]
        rank = fitting[0] if fitting else min(free, key=lambda w: filled_W[w])
        ranks[rank].append(expert)
        filled_W[rank] += size
    return [sorted(rank) for rank in ranks]


def check_estimate(
    estimate_E: np.ndarray, real_E: np.ndarray, top_k: int = 2, threshold: float | None = None
) -> Correction:
    """Phase two's decision for one layer.

    Args:
        estimate_E, real_E: rows of each expert, any scale.
        threshold: None corrects where the 2k most popular experts are others (Lina; ``popularity.same_top``); a number
            corrects where the total-variation distance of the shares is above it.
    """
    most = min(2 * top_k, len(real_E))
    right = same_top(estimate_E, real_E, most)
    shares = [loads_E / max(loads_E.sum(), 1e-300) for loads_E in (np.asarray(estimate_E), np.asarray(real_E))]
    distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
    return Correction(right, distance, not right if threshold is None else distance > threshold)


def summarise(checks: list[Correction]) -> dict[str, float | list[dict]]:
    """Statistics of phase two over the layers."""
    return {
        "estimates_right": float(np.mean([check.right for check in checks])),
        "corrected": float(np.mean([check.corrected for check in checks])),
        "mean_distance": float(np.mean([check.distance for check in checks])),
        "layers": [asdict(check) for check in checks],
    }
