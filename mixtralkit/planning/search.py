"""One search for the fastest plan: every name of the registry, made from one part of a trace and timed on another.

Policy ``auto`` searches plans for one way to run them; ``--plan auto`` searches layouts as well, within memory; and on
one GPU whose memory is too small for the model, formats and tiers of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.planning.cost import ModelShape, TimeModel
from mixtralkit.planning.dispatchers import Surroundings, choose_dispatcher
from mixtralkit.planning.fused_cost import FusedTimeModel
from mixtralkit.planning.hardware import Hardware, HostRates
from mixtralkit.planning.memory import RESERVE_GB, RankMemory, Room, rank_memory, room_for_experts
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.policies.bits import bits
from mixtralkit.planning.policies.inputs import Budget, gb_above
from mixtralkit.planning.policies.registry import Given, candidate_names, make_plan
from mixtralkit.planning.policies.tiers import GpuBudget, tiers
from mixtralkit.planning.precision import ErrorTable, loads_of
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import sample_routing, simulate
from mixtralkit.planning.tiers import simulate_tiers
from mixtralkit.planning.trace import RoutingTrace

# Times that differ by less than this part are the same: of plans alone, and of layouts, whose sample is smaller.
_PLANS_ALIKE, _LAYOUTS_ALIKE = 0.001, 0.01
# Tokens that the prediction for a layout replays at least, and the steps that it averages at most.
_SAMPLED_TOKENS, _MOST_STEPS = 512, 8
_MOST_TOKENS = 1 << 22  # of a step for policy auto, which replays every candidate on whole steps
# Formats that experts may be rounded to where memory asks for it, and what they are usually off by: Mixtral's weights
# are near to normal, and so are those of the model in ckpts/ (docs/quantised.md).
_USUAL_ERRORS = {"int8": 0.007, "int4:32": 0.086, "int4:64": 0.095, "int4:128": 0.103}


@dataclass(frozen=True)
class Candidate:
    """A plan by name, how it is run, and the mean seconds of a step on tokens that it was not made from.

    Attributes:
        size: what decides between equals: slots of a rank, or 10⁹ bytes of the fullest.
        parallel, plan, memory: of a layout of a model; ``execution`` is then of its decode steps.
    """

    name: str
    execution: Execution
    step_s: float
    size: float
    parallel: ParallelConfig | None = None
    plan: ExpertPlan | None = None
    memory: RankMemory | None = None

    @property
    def step_ms(self) -> float:
        return 1e3 * self.step_s

    @property
    def dispatcher(self) -> str:
        return self.execution.dispatcher

    def fits(self, memory_gb: float | None) -> bool:
        return memory_gb is None or self.memory.total <= memory_gb


def search(
    given: Given, runs: Sequence[tuple[Sequence[str], Execution]], most_steps: int | None = None
) -> list[Candidate]:
    """Every plan under every execution, made from one half of the trace and timed on the other, then the other way.

    Without a trace tokens are drawn from the loads, from which the plans are made too.

    Args:
        runs: names of plans, and how these run.
        most_steps: steps that are timed at most; None times all that the half has.
    """
    halves = (None,) if given.trace is None else given.trace.split(0.5)
    names = list(dict.fromkeys(name for of_run, _ in runs for name in of_run))
    parts = [given if fit is None else replace(given, trace=fit, loads_LE=fit.loads_LE()) for fit in halves]
    plans = {name: [make_plan(name, part) for part in parts] for name in names}
    found = []
    for of_run, execution in runs:
        steps = [_steps(given, check, execution, most_steps) for check in reversed(halves)]
        for name in of_run:
            tried = zip(plans[name], steps, strict=True)
            seconds = [_seconds(plan, tokens, given, execution) for plan, tokens in tried]
            slots = np.mean([plan.holds_LWE.sum(2).max(1).mean() for plan in plans[name]])
            found.append(Candidate(name, execution, float(np.mean(seconds)), float(slots)))
    return found


def best(found: Sequence[Candidate], alike: float) -> Candidate:
    """The least time; among those within a part ``alike`` of it the smallest."""
    most = (1 + alike) * min(one.step_s for one in found)
    return min((one for one in found if one.step_s <= most), key=lambda one: (one.size, one.step_s))


def auto(
    trace: RoutingTrace,
    world_size: int,
    shape: ModelShape,
    hardware: Hardware,
    execution: Execution | None = None,
    budget: Budget | None = None,
    ranks_per_node: int | None = None,
) -> ExpertPlan:
    """The plan with the least predicted time of a step under the budget.

    The one with the least mean held-out time, or among those within a thousandth the one with fewest slots, is made
    again from the whole trace; ``meta`` says which it is, the seconds a step expected of it, and those of every
    candidate, and those of the plan on the tokens it is made from.

    Args:
        shape, hardware: what ``simulate`` needs; ``shape`` of this trace's experts and choices.
        execution: None is ``exact`` with 64 tokens a rank.

    Raises:
        ValueError: for a budget that cannot hold every expert once, or a trace too short to be split.
    """
    execution = execution or Execution(batch=64)
    rows = (execution.batch or trace.num_tokens / world_size) * world_size * trace.top_k
    given = Given.of(
        trace, world_size, ranks_per_node=ranks_per_node, budget=budget or Budget(), shape=shape, hardware=hardware,
        rows=rows,
    )  # fmt: skip
    found = search(given, [(candidate_names(given, given.slots), execution)])
    chosen = best(found, _PLANS_ALIKE)
    plan = make_plan(chosen.name, given)
    again = simulate(plan, fill_steps(trace, _tokens(execution, given)), shape, hardware, execution)
    meta = {
        "chosen": chosen.name,
        "expected_step_s": chosen.step_s,
        "fitted_step_s": again.step_s,
        "candidates_step_s": {one.name: one.step_s for one in found},
        "dispatcher": execution.dispatcher,
        "batch": execution.batch,
        "hardware": hardware.name,
    }
    return replace(plan, policy="auto", meta=meta)


def auto_for(given: Given, execution: Execution) -> ExpertPlan:
    """``auto`` of the registry's input; where only loads are known tokens are drawn from them."""
    trace, tokens = given.trace, (execution.batch or 64) * given.world_size
    if tokens > _MOST_TOKENS:
        raise ValueError(f"batch: a step of {tokens:,} tokens, all ranks together, must have at most {_MOST_TOKENS:,}")
    if trace is None:
        trace = sample_routing(given.loads_LE, 2 * tokens, given.shape.top_k)
    return auto(trace, given.world_size, given.shape, given.hardware, execution, given.budget, given.ranks_per_node)


def fill_steps(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """The trace, begun again from its start until it fills whole steps of ``tokens`` tokens."""
    steps = -(-trace.num_tokens // tokens)
    return trace.take(np.arange(steps * tokens) % trace.num_tokens)


def _seconds(plan: ExpertPlan, tokens: RoutingTrace, given: Given, execution: Execution) -> float:
    return simulate(plan, tokens, given.shape, given.hardware, execution).step_s


def _tokens(execution: Execution, given: Given) -> int:
    """Of a step, all ranks together; without a batch those of the whole trace."""
    whole = 0 if given.trace is None else given.trace.num_tokens
    return execution.step_tokens or (execution.batch or 0) * given.world_size or whole


def _steps(given: Given, check: RoutingTrace | None, execution: Execution, most: int | None) -> RoutingTrace:
    tokens = _tokens(execution, given)
    if check is None:
        return sample_routing(given.loads_LE, tokens * (most or 1), given.shape.top_k)
    if most is None:
        return fill_steps(check, tokens)
    return check.take(np.arange(most * tokens) % check.num_tokens)


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
        may_round: experts may get fewer bits than ``room.weights`` has.
        host: memory behind the GPU, where experts may lie; None where there is none.
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
    may_round: bool = False
    host: HostRates | None = None

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

    @property
    def shape(self) -> ModelShape:
        room = self.room
        return ModelShape.of(self.config, room.data_bytes, room.weights, room.attention_weights)

    @property
    def given(self) -> Given:
        """What plans are made from."""
        rows = self.room.batch * self.config.num_experts_per_tok
        return Given(
            self.loads_LE, self.world_size, self.trace, self.ranks_per_node, shape=self.shape, hardware=self.hardware,
            rows=rows,
        )  # fmt: skip

    def execution(self, parallel: ParallelConfig) -> Execution:
        """How decode steps run."""
        room = self.room
        context = room.max_seq_len // 2 if self.context is None else self.context
        return Execution(
            self.dispatcher(parallel), step_tokens=room.batch, exchange_rows=room.symmetric_rows or None,
            context=context,
        )  # fmt: skip

    def dispatcher(self, parallel: ParallelConfig) -> str:
        """What decode steps run."""
        symmetric = self.room.symmetric_rows != 0
        here = (parallel.attention, parallel.experts, self.world_size, self.ranks_per_node, symmetric, self.exchange)
        return choose_dispatcher(Surroundings(*here), rows_known=True, decode=True)


def candidates(situation: Situation) -> list[Candidate]:
    """Every layout that the model and the ranks allow, whole experts under every plan of the registry's list."""
    config, world, room, given = situation.config, situation.world_size, situation.room, situation.given
    names = candidate_names(given, config.num_experts) if world > 1 else ["contiguous"]
    steps = min(_MOST_STEPS, max(2, _SAMPLED_TOKENS // room.batch))
    layouts = _layouts(situation, names)
    found = search(given, [(of_these, situation.execution(parallel)) for parallel, of_these in layouts], steps)
    plans, placed = {name: make_plan(name, given) for name in names}, []
    for one, parallel in zip(found, [parallel for parallel, of_these in layouts for _ in of_these], strict=True):
        plan = plans[one.name]
        memory = rank_memory(config, parallel, plan, room)
        name = "split" if parallel.experts == "tp" else one.name
        placed.append(replace(one, name=name, size=memory.total, parallel=parallel, plan=plan, memory=memory))
    return placed


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


def squeezed(situation: Situation, memory_gb: float) -> list[Candidate]:
    """Ways to fit a model into one GPU that is too small for it, the first that fits being the one to take.

    Fewer bits come first, where they keep every expert in the GPU's memory: each gets the format that harms least, by
    its load and the usual errors. Else as many experts as there is room for stay there, in the fewest bits, and the
    others go behind it. Single formats follow, to compare.

    Args:
        memory_gb: for all that torch allocates; the device's own context comes on top.
    """
    config, room, shape = situation.config, situation.room, situation.shape
    kinds = (situation.attention, "tp"), (situation.experts, "ep")
    parallel = ParallelConfig(*(usual if asked == "auto" else asked for asked, usual in kinds))
    names = list(_USUAL_ERRORS)
    plain = contiguous(config.n_layers, config.num_experts, 1)
    uniform = {name: replace(plain, precision=[[name] * config.num_experts] * config.n_layers) for name in names}
    plans: dict[str, ExpertPlan] = {}
    if situation.may_round:
        error = np.broadcast_to(list(_USUAL_ERRORS.values()), (config.n_layers, config.num_experts, len(names)))
        table = ErrorTable.of_weights(names, shape.sizes(names), error, *loads_of(situation.trace, config))
        left = memory_gb - rank_memory(config, parallel, uniform[names[0]], room).total
        left += float(shape.rank_bytes(uniform[names[0]])[0][0]) / 1e9
        if left * 1e9 >= plain.holds_LWE.sum() * shape.sizes(names).min():
            plans["bits"] = bits(table, shape, 1, Budget(memory_gb=left, expert_bytes=shape.expert_bytes))
    if situation.host is not None:
        smallest = names[-1] if situation.may_round else None
        gpu = GpuBudget(memory_gb + RESERVE_GB, config, room, situation.host)
        held = uniform.get(smallest, plain)
        if room_for_experts(config, parallel, held, room, gpu.memory_gb).left > 0:
            plans[f"tiers {smallest or room.weights.name}"] = tiers(held, situation.loads_LE, gpu)
    plans |= uniform if situation.may_round else {}
    execution, given = situation.execution(parallel), situation.given
    tokens = _steps(given, situation.trace, execution, _MOST_STEPS)
    found = []
    for name, plan in plans.items():
        memory = rank_memory(config, parallel, plan, room)
        if plan.tier is None:
            step_s = _seconds(plan, tokens, given, execution)
        else:
            model = (TimeModel if situation.hardware.fused is None else FusedTimeModel)(shape, situation.hardware)
            run = (situation.host, room.batch, execution.context, ("lru",))
            step_s = simulate_tiers(plan, tokens, model, *run)["lru"].split_step_s
        found.append(Candidate(name, execution, step_s, memory.total, parallel, plan, memory))
    return found


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
    return best(fitting, _LAYOUTS_ALIKE)


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
