"""The fastest layout and plan that fit: dispatchers and plans side by side, by the time model and by memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.dispatchers import Surroundings, choose_dispatcher
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.memory import RankMemory, Room, rank_memory
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.policies.auto import held_out
from mixtralkit.planning.policies.inputs import gb_above
from mixtralkit.planning.policies.registry import Given, candidate_names, make_plan
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.trace import RoutingTrace

# Tokens that a prediction replays at least, and the steps that it averages at most.
_SAMPLED_TOKENS, _MOST_STEPS = 512, 8
# Times that differ by less than this part are the same: the routing of the sample alone makes as much.
_ALIKE = 0.01


@dataclass(frozen=True)
class Candidate:
    """One layout of a model and its plan.

    Attributes:
        name: of the plan.
        dispatcher: of the decode steps.
        step_ms: predicted decode step.
        memory: on the fullest rank.
    """

    name: str
    parallel: ParallelConfig
    plan: ExpertPlan
    dispatcher: str
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
        world_size: ranks.
        room: sequences, tokens and bytes of a number.
        attention, experts: ``"tp"``, ``"dp"`` or ``"ep"``; ``"auto"`` leaves it open.
        trace: real routing; None takes every expert as equally likely.
        context: tokens of each sequence in a decode step; None is half of ``room.max_seq_len``.
        exchange: as ``dispatchers.Surroundings`` has it; ranks reach each other's memory unless
            ``room.symmetric_rows`` is 0.
        ranks_per_node: None when all ranks are on one node.
    """

    config: ModelConfig
    hardware: Hardware
    world_size: int
    room: Room
    attention: str = "auto"
    experts: str = "auto"
    trace: RoutingTrace | None = None
    context: int | None = None
    exchange: str = "auto"
    ranks_per_node: int | None = None

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

    def dispatcher(self, parallel: ParallelConfig) -> str:
        """What decode steps run."""
        symmetric = self.room.symmetric_rows != 0
        here = (parallel.attention, parallel.experts, self.world_size, self.ranks_per_node, symmetric, self.exchange)
        return choose_dispatcher(Surroundings(*here), rows_known=True, decode=True)


def candidates(situation: Situation) -> list[Candidate]:
    """Every layout that the model and the ranks allow, whole experts under every plan of the registry's list."""
    config, world, room = situation.config, situation.world_size, situation.room
    given = Given(
        situation.loads_LE, world, situation.trace, situation.ranks_per_node,
        shape=ModelShape.of(config, room.data_bytes, room.weights), hardware=situation.hardware,
        rows=room.batch * config.num_experts_per_tok,
    )  # fmt: skip
    names = candidate_names(given, config.num_experts) if world > 1 else ["contiguous"]
    found: list[Candidate] = []
    for parallel, of_these in _layouts(situation, names):
        execution = Execution(
            situation.dispatcher(parallel), step_tokens=room.batch, exchange_rows=room.symmetric_rows or None,
            context=room.max_seq_len // 2 if situation.context is None else situation.context,
        )  # fmt: skip
        steps = min(_MOST_STEPS, max(2, _SAMPLED_TOKENS // room.batch))
        for one in held_out(of_these, given, [execution], steps):
            plan = make_plan(one.name, given)
            memory = rank_memory(config, parallel, plan, room)
            name = "split" if parallel.experts == "tp" else one.name
            found.append(Candidate(name, parallel, plan, execution.dispatcher, 1e3 * one.step_s, memory))
    return found


def _layouts(situation: Situation, names: Sequence[str]) -> list[tuple[ParallelConfig, list[str]]]:
    """The layouts asked for that the model's heads and experts can be divided by, and the plans to try under each."""
    config, world = situation.config, situation.world_size
    heads_divide = config.n_heads % world == 0 and (config.n_kv_heads % world == 0 or world % config.n_kv_heads == 0)
    layouts = []
    if heads_divide and config.hidden_dim >= world:
        layouts.append((ParallelConfig("tp", "tp"), ["contiguous"]))
    if world > 1:
        if heads_divide:
            plans = [name for name in names if name == "contiguous" or name.startswith("balanced")]
            layouts.append((ParallelConfig("tp", "ep"), plans))
        layouts.append((ParallelConfig("dp", "ep"), list(names)))
    asked = situation.attention, situation.experts
    return [
        (parallel, plans)
        for parallel, plans in layouts
        if all(a in ("auto", own) for a, own in zip(asked, (parallel.attention, parallel.experts), strict=True))
    ]


def choose(found: Sequence[Candidate], memory_gb: float | None) -> Candidate:
    """The fastest that fits; of those that are as good as equal (1%) the one that takes least memory.

    ValueError that names the budget and what the smallest needs, where none fits.
    """
    if not found:
        raise ValueError("no layout: attention and experts as asked for cannot be spread over these ranks")
    fitting = [candidate for candidate in found if candidate.fits(memory_gb)]
    if not fitting:
        least = min(found, key=lambda candidate: candidate.memory.total)
        memory = least.memory
        raise ValueError(
            f"memory_gb ({memory_gb:g}) must be at least {gb_above(memory.total, memory_gb)} a rank, "
            "which the smallest layout needs: "
            f"attention {least.parallel.attention}, experts {least.parallel.experts}, plan {least.name} "
            f"({memory.weights:.1f} weights, {memory.cache:.1f} keys and values, {memory.exchange:.2f} exchange, "
            f"{memory.working:.1f} working memory); take fewer or shorter sequences, or more ranks"
        )
    most_ms = (1 + _ALIKE) * min(candidate.step_ms for candidate in fitting)
    alike = [candidate for candidate in fitting if candidate.step_ms <= most_ms]
    return min(alike, key=lambda candidate: (candidate.memory.total, candidate.step_ms))


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
    lines += chosen.plan.notes()
    lines.append(f"budget: {'none' if memory_gb is None else f'{memory_gb:g} GB a rank'}")
    return "\n".join(lines)
