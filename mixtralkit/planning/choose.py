"""The fastest way to spread a model that fits: layouts and plans side by side, by the time model and by memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.memory import RankMemory, Room, rank_memory
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.policies.named import named_plan
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import sample_routing, simulate
from mixtralkit.planning.trace import RoutingTrace

# Tokens that a prediction replays at least, and the steps that it averages at most.
_SAMPLED_TOKENS, _MOST_SAMPLES = 512, 8


@dataclass(frozen=True)
class Candidate:
    """One way to spread a model.

    Attributes:
        name: of the plan.
        layout: of the steps, as ``replay.Execution`` names it.
        step_ms: predicted decode step.
        memory: on the fullest rank.
    """

    name: str
    parallel: ParallelConfig
    plan: ExpertPlan
    layout: str
    step_ms: float
    memory: RankMemory

    def fits(self, memory_gb: float | None) -> bool:
        return memory_gb is None or self.memory.total <= memory_gb


@dataclass(frozen=True)
class Situation:
    """What the choice is for.

    Attributes:
        config: of the model.
        hardware: with figures of the fused kernels.
        world_size: ranks, all on one node.
        room: sequences, tokens and bytes of a number.
        attention, experts: ``"tp"``, ``"dp"`` or ``"ep"``; ``"auto"`` leaves it open.
        trace: real routing; None takes every expert as equally likely.
        context: tokens of each sequence in a decode step; None is half of ``room.max_seq_len``.
        plain_layout: of steps whose rows travel and not through memory (``room.symmetric_rows`` 0), launched by host.
    """

    config: ModelConfig
    hardware: Hardware
    world_size: int
    room: Room
    attention: str = "auto"
    experts: str = "auto"
    trace: RoutingTrace | None = None
    context: int | None = None
    plain_layout: str = "static"

    def __post_init__(self) -> None:
        trace, config = self.trace, self.config
        for name, own, wanted in (() if trace is None else (
            ("layers", trace.num_layers, config.n_layers), ("experts", trace.num_experts, config.num_experts),
            ("choices", trace.top_k, config.num_experts_per_tok),
        )):  # fmt: skip
            if own != wanted:
                raise ValueError(f"trace: {name} ({own}) must be {wanted}, which is the model's")

    @property
    def loads_LE(self) -> np.ndarray:
        if self.trace is None:
            return np.ones((self.config.n_layers, self.config.num_experts))
        return self.trace.loads_LE()


def candidates(situation: Situation) -> list[Candidate]:
    """Every layout that the model and the ranks allow, whole experts under several plans."""
    config, world = situation.config, situation.world_size
    samples = sample_steps(situation.loads_LE, situation.room.batch, config.num_experts_per_tok, situation.trace)
    plain = contiguous(config.n_layers, config.num_experts, world)
    heads_divide = config.n_heads % world == 0 and (config.n_kv_heads % world == 0 or world % config.n_kv_heads == 0)
    ways: list[tuple[ParallelConfig, str, str, ExpertPlan]] = []
    if heads_divide and config.hidden_dim >= world:
        ways.append((ParallelConfig("tp", "tp"), "tp", "split", plain))
    if world > 1:
        names = _plan_names(config.num_experts, world, situation.trace is not None)
        plans = {name: named_plan(name, situation.loads_LE, world) for name in names}
        if heads_divide:
            ways.append((ParallelConfig("tp", "ep"), "tp_ep", "contiguous", plain))
            ways += [(ParallelConfig("tp", "ep"), "tp_ep", n, p) for n, p in plans.items() if n.startswith("balanced")]
        layout = situation.plain_layout if situation.room.symmetric_rows == 0 else "peer"
        ways += [(ParallelConfig("dp", "ep"), layout, name, plan) for name, plan in plans.items()]
    return [
        Candidate(
            name, parallel, plan, layout, 1e3 * decode_step_s(situation, plan, layout, samples),
            rank_memory(config, parallel, plan, situation.room),
        )
        for parallel, layout, name, plan in ways
        if situation.attention in ("auto", parallel.attention) and situation.experts in ("auto", parallel.experts)
    ]  # fmt: skip


def choose(found: Sequence[Candidate], memory_gb: float | None) -> Candidate:
    """The fastest that fits; among equals the one that takes least memory.

    ValueError that names the budget and what the smallest needs, where none fits.
    """
    if not found:
        raise ValueError("no layout: attention and experts as asked for cannot be spread over these ranks")
    fitting = [candidate for candidate in found if candidate.fits(memory_gb)]
    if not fitting:
        least = min(found, key=lambda candidate: candidate.memory.total)
        memory = least.memory
        raise ValueError(
            f"memory_gb ({memory_gb:g}) must be at least {memory.total:.1f} a rank, which the smallest layout needs: "
            f"attention {least.parallel.attention}, experts {least.parallel.experts}, plan {least.name} "
            f"({memory.weights:.1f} weights, {memory.cache:.1f} keys and values, {memory.exchange:.2f} exchange, "
            f"{memory.working:.1f} working memory); take fewer or shorter sequences, or more ranks"
        )
    return min(fitting, key=lambda candidate: (candidate.step_ms, candidate.memory.total))


def table(found: Sequence[Candidate], chosen: Candidate, memory_gb: float | None) -> str:
    """Predicted milliseconds and 10⁹ bytes of every candidate, the fastest first."""
    head = f"{'attention':<10}{'experts':<9}{'plan':<16}{'ms/step':>9}{'weights':>9}{'cache':>8}{'exchange':>10}"
    lines = [f"{head}{'working':>9}{'GB':>8}"]
    for one in sorted(found, key=lambda candidate: candidate.step_ms):
        memory = one.memory
        note = "  chosen" if one is chosen else "" if one.fits(memory_gb) else "  too large"
        lines.append(
            f"{one.parallel.attention:<10}{one.parallel.experts:<9}{one.name:<16}{one.step_ms:>9.3f}"
            f"{memory.weights:>9.2f}{memory.cache:>8.2f}{memory.exchange:>10.3f}{memory.working:>9.2f}"
            f"{memory.total:>8.2f}{note}"
        )
    lines.append(f"budget: {'none' if memory_gb is None else f'{memory_gb:g} GB a rank'}")
    return "\n".join(lines)


def decode_step_s(situation: Situation, plan: ExpertPlan, layout: str, samples: Sequence[RoutingTrace]) -> float:
    """Mean seconds of a decode step; each sample is one step's tokens, of all ranks.

    Steps of ``situation.plain_layout`` are launched one kernel at a time, as plain torch; all others are graphs.
    """
    context = situation.room.max_seq_len // 2 if situation.context is None else situation.context
    execution = Execution(layout, context=context, fused=layout != situation.plain_layout)
    shape = ModelShape.of(situation.config, situation.room.data_bytes)
    return float(np.mean([simulate(plan, s, shape, situation.hardware, execution).step_s for s in samples]))


def sample_steps(
    loads_LE: np.ndarray, tokens: int, top_k: int, trace: RoutingTrace | None = None
) -> list[RoutingTrace]:
    """Steps of ``tokens`` tokens each: of a trace, begun again from its start where it ends, or drawn from loads."""
    steps = min(_MOST_SAMPLES, max(2, _SAMPLED_TOKENS // tokens))
    if trace is None:
        return [sample_routing(loads_LE, tokens, top_k, seed) for seed in range(steps)]
    place_N = np.arange(steps * tokens) % trace.num_tokens
    return [trace.take(place_N[step * tokens : (step + 1) * tokens]) for step in range(steps)]


def _plan_names(num_experts: int, world: int, loads_differ: bool) -> list[str]:
    """Plans to try: hot experts, slots beyond one for each expert, all experts everywhere."""
    hot = [f"hot_cold+{count}" for count in (1, 2, 4) if count < num_experts and loads_differ]
    extras = sorted({0, world // 2, world, 2 * world, 4 * world} - (set() if loads_differ else {0}))
    more = [f"balanced+{extra}" for extra in extras if extra < num_experts * (world - 1)]
    return ["contiguous", *hot, *more, "everywhere"]
