"""How good a plan is before it runs: crossings, balance and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.policies.inputs import checked_loads, memory_gb
from mixtralkit.planning.replicas import ReplicaTable
from mixtralkit.planning.trace import RoutingTrace

_ROWS = 10_000_000  # of a layer, over which loads are poured


@dataclass(frozen=True)
class Quality:
    """Figures of a plan on given routing.

    Attributes:
        crossings_per_token: times that a token changes rank between consecutive layers when it stays where its last
            expert was (ExFlow's context coherence); None without transitions.
        uniform_crossings_per_token: the same if every expert followed every other equally often, none replicated.
        node_crossings_per_token: of those, between nodes; None without transitions.
        balancedness_mean_over_max: mean over the layers of mean/max load of the ranks, 1 is even.
        max_over_mean: mean over the layers of max/mean.
        slots_per_rank: largest number of experts on a rank, mean over the layers.
    """

    crossings_per_token: float | None
    uniform_crossings_per_token: float
    node_crossings_per_token: float | None
    balancedness_mean_over_max: float
    max_over_mean: float
    slots_per_rank: float

    def memory_gb_per_rank(self, num_layers: int, expert_bytes: int) -> float:
        """10⁹ bytes of experts on the fullest rank, all layers."""
        return memory_gb(1, num_layers, expert_bytes) * self.slots_per_rank


@dataclass(frozen=True)
class HeldOut:
    """What a policy's plan is worth on tokens that it was not made from: means over both halves of a trace.

    Attributes:
        fitted, held_out: figures on the half that the plan was made from, and on the other.
        plain: of contiguous experts, on the other half.
        noise: how far ``plain`` is apart on the two halves, which no fitting explains.
    """

    fitted: dict[str, float]
    held_out: dict[str, float]
    plain: dict[str, float]
    noise: dict[str, float]

    def doubts(self) -> list[str]:
        """A sentence for each figure whose gain over contiguous experts is within the noise."""
        found = []
        for name, value in self.held_out.items():
            gain = self.plain[name] - value
            if self.fitted[name] < self.plain[name] and gain <= self.noise[name]:
                own = self.plain[name] - self.fitted[name]
                found.append(
                    f"{name}: a gain of {gain:.3f} on other tokens ({own:.3f} on its own) is within the noise of "
                    f"{self.noise[name]:.3f}: record more tokens"
                )
        return found


FIGURES = ("crossings_per_token", "max_over_mean")


def measure_held_out(make: Callable[[RoutingTrace], ExpertPlan], trace: RoutingTrace) -> HeldOut:
    """Plans from one half of the trace and measures on both, then the other way round."""
    halves = trace.split(0.5)
    rows: dict[str, list[list[float]]] = {"fitted": [], "held_out": [], "plain": []}
    for fit, check in (halves, halves[::-1]):
        plan = make(fit)
        plain = replace(
            contiguous(plan.num_layers, plan.num_experts, plan.world_size), ranks_per_node=plan.ranks_per_node
        )
        for name, one, tokens in (("fitted", plan, fit), ("held_out", plan, check), ("plain", plain, check)):
            found = measure(one, tokens.loads_LE(), tokens.transitions_LEE())
            rows[name].append([float(getattr(found, figure)) for figure in FIGURES])
    means = {name: dict(zip(FIGURES, np.mean(both, 0).tolist(), strict=True)) for name, both in rows.items()}
    noise = np.abs(np.subtract(*rows["plain"]))
    return HeldOut(**means, noise=dict(zip(FIGURES, noise.tolist(), strict=True)))


def measure(plan: ExpertPlan, loads_LE: np.ndarray, transitions_LEE: np.ndarray | None = None) -> Quality:
    """Figures of ``plan`` for these loads.

    Args:
        loads_LE: rows of each expert.
        transitions_LEE: [layers - 1, E, E] weight of expert a in a layer and b in the next for the same token.
    """
    loads_LW = rank_loads(plan, loads_LE)
    mean_L, max_L = loads_LW.mean(1), loads_LW.max(1)
    per_node = plan.ranks_per_node or plan.world_size
    crossings = [None, None]
    if transitions_LEE is not None:
        crossings = [float(crossings_J(plan, transitions_LEE, size).sum()) for size in (1, per_node)]
    return Quality(
        crossings_per_token=crossings[0],
        uniform_crossings_per_token=(plan.num_layers - 1) * (1 - 1 / plan.world_size),
        node_crossings_per_token=crossings[1],
        balancedness_mean_over_max=float((mean_L / max_L).mean()),
        max_over_mean=float((max_L / mean_L).mean()),
        slots_per_rank=float(plan.holds_LWE.sum(2).max(1).mean()),
    )


def rank_loads(plan: ExpertPlan, loads_LE: np.ndarray) -> np.ndarray:
    """Rows of each rank [L, W] as the layer pours them when every rank sends an even part of each expert's rows."""
    loads_LE = checked_loads(loads_LE, plan.world_size)
    if loads_LE.shape != (plan.num_layers, plan.num_experts):
        raise ValueError(f"loads (shape {loads_LE.shape}) must be the plan's {(plan.num_layers, plan.num_experts)}")
    found_LW = np.zeros((plan.num_layers, plan.world_size))
    for layer, loads_E in enumerate(loads_LE):
        table = ReplicaTable.of(plan, layer)
        each_E = np.rint(loads_E / loads_E.sum() * _ROWS / plan.world_size).astype(np.int64)
        counts_SE = np.tile(each_E, (plan.world_size, 1))
        rows_W = table.pour(counts_SE).sum(0) + (counts_SE * table.local_WE).sum(1)
        found_LW[layer] = rows_W / rows_W.sum() * loads_E.sum()
    return found_LW


def crossings_J(plan: ExpertPlan, transitions_LEE: np.ndarray, ranks: int = 1) -> np.ndarray:
    """Expected moves of a token between groups of ``ranks`` consecutive ranks, for each pair of layers [L-1].

    A token stays on its rank where that holds the next expert, else it goes to one of the expert's ranks, each as
    likely, those of its own group first. With replicas, where it stood is followed through the layers by the
    distribution that transitions give, as if its path had no longer memory.
    """
    wanted = (plan.num_layers - 1, plan.num_experts, plan.num_experts)
    if transitions_LEE.shape != wanted:
        raise ValueError(f"transitions (shape {transitions_LEE.shape}) must be the plan's {wanted}")
    group_W = np.arange(plan.world_size) // ranks
    near_WW = (group_W[:, None] == group_W).astype(float)
    at_EW = (plan.holds_LWE[0] / plan.holds_LWE[0].sum(0)).T
    crossings = np.zeros(len(transitions_LEE))
    for layer, weight_EE in enumerate(transitions_LEE):
        holds_WE = plan.holds_LWE[layer + 1]
        wants_WE = at_EW.T @ (weight_EE / max(weight_EE.sum(), 1e-300))  # a token on rank w wants expert e
        near_WE = near_WW @ holds_WE
        leaves_WE = np.where(near_WE == 0, wants_WE, 0)
        shifts_WE = np.where((near_WE > 0) & ~holds_WE, wants_WE, 0)
        crossings[layer] = leaves_WE.sum() + (shifts_WE.sum() if ranks == 1 else 0)
        close_WE = near_WW @ np.divide(shifts_WE, near_WE, out=np.zeros_like(wants_WE), where=near_WE > 0)
        even_WE = holds_WE / holds_WE.sum(0)
        arrive_WE = holds_WE * (wants_WE + close_WE) + even_WE * leaves_WE.sum(0)
        total_E = arrive_WE.sum(0)
        at_EW = np.where(total_E > 0, arrive_WE / np.where(total_E > 0, total_E, 1), even_WE).T
    return crossings
