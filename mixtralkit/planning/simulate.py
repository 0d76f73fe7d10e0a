"""Replays a routing trace against a plan: times, loads, bytes over every link, crossings, dropped rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtralkit.planning.cost import KernelCounts, ModelShape, TimeModel
from mixtralkit.planning.fused_cost import FusedTimeModel
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.replay import PHASES, Execution, Replay
from mixtralkit.planning.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a replay found. Bytes, crossings and dropped rows are of the MoE layers, over all steps.

    Attributes:
        execution, policy, world_size, tokens, steps: what was replayed.
        phases_LP: seconds of each layer's ``PHASES``, summed over steps, the slowest rank's.
        hidden_L: seconds of them that the schedule hides.
        ends_s: seconds of output matrix and, for ``coherent``, of gathering the context, summed over steps.
        rows_LW: choices that each rank computes; under ``split_width`` its W-th part of all.
        max_over_mean_L, mean_over_max_L: the busiest rank's choices against the mean, Σ over steps / Σ over steps.
        links_WW: bytes from rank to rank.
        bytes_L: bytes of each layer over all links.
        choices_away_L: choices that are not computed on the rank of their row.
        crossings_per_token: how often a token's heaviest choice is on another rank than in the layer before.
        node_crossings_per_token: the same for nodes.
        dropped_L, rerouted_L: choices over a capacity.
    """

    execution: Execution
    policy: str
    world_size: int
    ranks_per_node: int
    tokens: int
    steps: int
    phases_LP: np.ndarray
    hidden_L: np.ndarray
    ends_s: float
    rows_LW: np.ndarray
    max_over_mean_L: np.ndarray
    mean_over_max_L: np.ndarray
    links_WW: np.ndarray
    bytes_L: np.ndarray
    choices_away_L: np.ndarray
    crossings_per_token: float
    node_crossings_per_token: float
    dropped_L: np.ndarray
    rerouted_L: np.ndarray

    @property
    def seconds_L(self) -> np.ndarray:
        """Seconds of each layer, summed over steps."""
        return self.phases_LP.sum(1) - self.hidden_L

    @property
    def total_s(self) -> float:
        """Seconds of the whole replay."""
        return float(self.seconds_L.sum()) + self.ends_s

    @property
    def step_s(self) -> float:
        """Seconds of a mean step."""
        return self.total_s / self.steps

    @property
    def bytes_by_network(self) -> tuple[float, float]:
        """Bytes inside nodes, and across them."""
        node_W = np.arange(self.world_size) // self.ranks_per_node
        inside_WW = node_W[:, None] == node_W
        return float(self.links_WW[inside_WW].sum()), float(self.links_WW[~inside_WW].sum())

    @property
    def max_over_mean(self) -> float:
        """Mean over the layers of the busiest rank's choices against the mean."""
        return float(self.max_over_mean_L.mean())

    @property
    def mean_over_max(self) -> float:
        """Mean over the layers of the balance: 1 is even."""
        return float(self.mean_over_max_L.mean())

    def summary(self) -> dict[str, object]:
        """The figures of one line of JSON."""
        inside, across = self.bytes_by_network
        phases = dict(zip(PHASES, self.phases_LP.sum(0).tolist(), strict=True))
        return {
            "policy": self.policy,
            "dispatcher": self.execution.dispatcher,
            "chunks": self.execution.chunks,
            "world_size": self.world_size,
            "ranks_per_node": self.ranks_per_node,
            "batch": self.execution.batch,
            "tokens": self.tokens,
            "steps": self.steps,
            "step_s": self.step_s,
            "total_s": self.total_s,
            "phases_s": phases | {"hidden": float(self.hidden_L.sum()), "ends": self.ends_s},
            "max_over_mean": self.max_over_mean,
            "mean_over_max": self.mean_over_max,
            "bytes_inside": inside,
            "bytes_across": across,
            "busiest_link_bytes": float(self.links_WW.max(initial=0)),
            "crossings_per_token": self.crossings_per_token,
            "node_crossings_per_token": self.node_crossings_per_token,
            "choices": int(self.rows_LW.sum()),
            "dropped": int(self.dropped_L.sum()),
            "rerouted": int(self.rerouted_L.sum()),
        }


def simulate(
    plan: ExpertPlan,
    trace: RoutingTrace,
    shape: ModelShape,
    hardware: Hardware,
    execution: Execution | None = None,
    kernels: KernelCounts | None = None,
) -> Simulation:
    """Runs the tokens of ``trace`` in steps of ``batch`` a rank, in their order, through every layer of ``plan``.

    A step's tokens are dealt to the ranks in blocks; the last step's, which may be fewer, in even blocks.

    Args:
        execution: None is ``exact``, the whole trace in one step.
        hardware: where it has figures of this project's kernels, steps run by them; else as plain torch.
    """
    execution = Execution() if execution is None else execution
    plan.check_fits(trace.num_layers, trace.num_experts, plan.world_size)
    for name, own, wanted in (
        ("num_experts", shape.num_experts, trace.num_experts),
        ("top_k", shape.top_k, trace.top_k),
    ):
        if own != wanted:
            raise ValueError(f"model: {name} ({own}) must be {wanted}, which is the trace's")
    if trace.num_tokens == 0:
        raise ValueError("trace has no tokens")
    time_model = TimeModel if hardware.fused is None else FusedTimeModel
    model = time_model(shape, hardware, plan.world_size, plan.ranks_per_node, kernels or KernelCounts())
    replay = Replay(plan, trace, model, execution)
    for layer in range(plan.num_layers):
        replay.layer(layer)
    peak_L, mean_L = replay.peak_and_mean()
    over_L = np.divide(peak_L, mean_L, out=np.ones(plan.num_layers), where=mean_L > 0)
    return Simulation(
        execution, plan.policy, plan.world_size, replay.per_node, trace.num_tokens, replay.steps,
        replay.phases_LP, replay.hidden_L, replay.ends_s(), replay.rows_LW, over_L, 1 / over_L,
        replay.links_WW, replay.bytes_L, replay.away_L,
        replay.crossings / trace.num_tokens, replay.node_crossings / trace.num_tokens,
        replay.dropped_L, replay.rerouted_L,
    )  # fmt: skip


def predict(
    plan: ExpertPlan,
    routing: RoutingTrace | np.ndarray,
    shape: ModelShape,
    hardware: Hardware,
    execution: Execution | None = None,
    kernels: KernelCounts | None = None,
) -> float:
    """Seconds of a mean step under ``plan``.

    Args:
        execution: None is ``exact`` with 64 tokens a rank.
        routing: a trace, or loads [L, E], from which one step's tokens are drawn (``sample_routing``). Who predicts
            for several plans draws once and passes the trace.
    """
    execution = Execution(batch=64) if execution is None else execution
    if isinstance(routing, np.ndarray):
        routing = sample_routing(routing, (execution.batch or 64) * plan.world_size, shape.top_k)
    return simulate(plan, routing, shape, hardware, execution, kernels=kernels).step_s


def sample_routing(loads_LE: np.ndarray, tokens: int, top_k: int, seed: int = 0) -> RoutingTrace:
    """A trace of ``tokens`` that choose ``top_k`` different experts with the shares of ``loads_LE``.

    Systematic sampling: an expert with share p of the choices is among a token's with probability K·p, which is at
    most 1; what a load has beyond that goes to the others. Layers and tokens are independent.
    """
    loads_LE = np.asarray(loads_LE, float)
    if loads_LE.ndim != 2 or not np.isfinite(loads_LE).all() or (loads_LE < 0).any() or (loads_LE.sum(1) <= 0).any():
        raise ValueError("loads must be numbers of at least 0, [layers, experts], with a sum above 0 in every layer")
    num_layers, num_experts = loads_LE.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k ({top_k}) must lie in 1 … {num_experts}")
    rng = np.random.default_rng(seed)
    experts = np.empty((tokens, num_layers, top_k), np.int16)
    for layer, loads_E in enumerate(loads_LE):
        order_TE = rng.random((tokens, num_experts)).argsort(1)
        ends_TE = _inclusion(loads_E, top_k)[order_TE].cumsum(1)
        ends_TE[:, -1] = top_k  # the sum, without its rounding
        aims_TK = rng.random((tokens, 1)) + np.arange(top_k)
        place_TK = (ends_TE[:, None, :] <= aims_TK[:, :, None]).sum(-1)
        experts[:, layer] = np.take_along_axis(order_TE, place_TK, 1)
    return RoutingTrace(experts, num_experts)


def _inclusion(loads_E: np.ndarray, top_k: int) -> np.ndarray:
    """Probability of each expert to be among a token's choices; sums to ``top_k``, none above 1."""
    chance_E = top_k * loads_E / loads_E.sum()
    while (chance_E > 1 + 1e-12).any():
        full_E = chance_E >= 1
        rest = loads_E[~full_E].sum()
        left = top_k - full_E.sum()
        others_E = loads_E * left / rest if rest else np.full_like(loads_E, left / max((~full_E).sum(), 1))
        chance_E = np.where(full_E, 1.0, others_E)
    return chance_E
