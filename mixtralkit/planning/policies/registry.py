"""Policies and plans by name: one list for plan_experts, ``--plan``, simulate, benchmarks and the automatic choice.

A name is ``policy``, ``policy+N`` or ``policy/variant+N``. N is the number of hot experts for ``hot_cold``, else the
slots of a layer, over all ranks, beyond one for each expert.

=====================  =============================================================================================
``contiguous``         FastMoE's placement
``hot_cold+N``         the N most chosen experts of each layer on every rank (Pangu); ``hot_cold/node+N`` on every node
``two_phase+N``        ranks by estimated popularity, corrected by real counts (Lina)
``affinity+N``         a token's next expert where the token already is (ExFlow); ``affinity/even`` under a load cap
``balanced+N``         replicas and packing for even ranks (EPLB); ``balanced/node+N`` keeps an expert on one node
``shadow``             FasterMoE's choice, kept
``everywhere``         every expert on every rank
``bits``               contiguous, each expert in the format that harms least (needs measured errors)
``tiers``              contiguous, the experts that the GPU has no room for in host memory (needs a GPU's budget)
``auto``               the one of all these with the least predicted time
=====================  =============================================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mixtralkit.json_file import shown
from mixtralkit.planning.cost import ModelShape, ShadowModel
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from mixtralkit.planning.policies.affinity import affinity, least_cap
from mixtralkit.planning.policies.balanced import balanced
from mixtralkit.planning.policies.bits import bits
from mixtralkit.planning.policies.hot_cold import hot_cold, most_hot
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.policies.shadow import shadow
from mixtralkit.planning.policies.tiers import GpuBudget, tiers
from mixtralkit.planning.policies.two_phase import two_phase
from mixtralkit.planning.precision import ErrorTable
from mixtralkit.planning.trace import RoutingTrace

_EVEN_CAP = 1.05  # of ``affinity/even``: this many times the least peak that its placements can have


@dataclass(frozen=True)
class Given:
    """What a plan is made from.

    Attributes:
        loads_LE: rows of each expert.
        trace: every token's experts; None where only loads are known.
        ranks_per_node: None when all ranks are on one node.
        budget: most experts of a rank.
        shape, hardware: for policies that predict (``shadow``, ``auto``).
        rows: routed rows of a step, all ranks together, for ``shadow``.
        options: a policy's own, by name; those of other policies are not looked at.
    """

    loads_LE: np.ndarray
    world_size: int
    trace: RoutingTrace | None = None
    ranks_per_node: int | None = None
    budget: Budget = field(default_factory=Budget)
    shape: ModelShape | None = None
    hardware: Hardware | None = None
    rows: float = 1.0
    options: dict = field(default_factory=dict)

    @classmethod
    def of(cls, trace: RoutingTrace, world_size: int, **others) -> Given:
        """All that a trace says."""
        return cls(trace.loads_LE(), world_size, trace, **others)

    @property
    def slots(self) -> int:
        """Slots of a rank that the budget allows; without one as few as hold every expert once."""
        return self.budget.slots(*self.loads_LE.shape, self.world_size)

    def tokens(self, policy: str) -> RoutingTrace:
        """The trace; ValueError where there is none."""
        if self.trace is None:
            raise ValueError(f"policy {policy} needs every token's experts, and the file holds only loads")
        return self.trace

    def with_extra(self, extra: int | None) -> Given:
        """With a budget of so many slots more than experts, over all ranks; None leaves it."""
        if extra is None:
            return self
        num_experts = self.loads_LE.shape[1]
        slots = math.ceil((num_experts + extra) / self.world_size)
        if slots > num_experts:
            most = num_experts * (self.world_size - 1)
            raise ValueError(f"plan: {extra} extra slots must be at most {most}: then all experts are everywhere")
        return replace(self, budget=Budget(slots_per_rank=slots))


def _contiguous(given: Given, count: int | None) -> ExpertPlan:
    return contiguous(*given.loads_LE.shape, given.world_size)


def _everywhere(given: Given, count: int | None) -> ExpertPlan:
    return everywhere(*given.loads_LE.shape, given.world_size)


def _hot_cold(given: Given, count: int | None, hot_experts: int | None = None, hot_per: str = "rank", **options):
    if hot_per not in ("rank", "node"):
        raise ValueError(f"hot_per ({hot_per!r}) must be 'rank' or 'node'")
    if hot_per == "node" and given.ranks_per_node is None:
        raise ValueError("hot_per ('node') needs ranks_per_node")
    hot, ring = hot_experts if count is None else count, 1 if hot_per == "rank" else given.ranks_per_node
    return hot_cold(given.loads_LE, given.world_size, hot, given.budget, ring=ring, **options)


def _two_phase(given: Given, count: int | None, finetune_threshold: float | None = None) -> ExpertPlan:
    """Estimated from the first half of the trace, corrected by the counts of the second."""
    given = given.with_extra(count)
    if given.trace is None or given.trace.num_tokens < 2:
        return two_phase(given.loads_LE, given.world_size, budget=given.budget)
    profile, batch = (half.loads_LE() for half in given.trace.split(0.5))
    return two_phase(profile, given.world_size, batch, given.trace.top_k, finetune_threshold, given.budget)


def _affinity(given: Given, count: int | None, load_cap: float | None = None, bound: float = 0) -> ExpertPlan:
    given, transitions = given.with_extra(count), given.tokens("affinity").transitions_LEE()
    loads, world = given.loads_LE, given.world_size
    return affinity(transitions, world, given.ranks_per_node, given.budget, loads, load_cap, bound)


def _even_affinity(given: Given, count: int | None, bound: float = 0) -> ExpertPlan:
    return _affinity(given, count, _EVEN_CAP * least_cap(given.loads_LE, given.world_size), bound)


def _balanced(given: Given, count: int | None, num_groups: int | None = None, shares: str = "poured") -> ExpertPlan:
    budget = given.with_extra(count).budget
    return balanced(given.loads_LE, given.world_size, budget, given.ranks_per_node, num_groups, count, shares)


def _balanced_on_nodes(given: Given, count: int | None) -> ExpertPlan:
    return _balanced(given, count, num_groups=given.loads_LE.shape[1])


def _shadow(given: Given, count: int | None, shadow_steps: float = 1.0) -> ExpertPlan:
    if given.shape is None or given.hardware is None:
        raise ValueError("policy shadow needs hardware and the model's sizes")
    costs = ShadowModel.from_hardware(given.shape, given.hardware)
    return shadow(given.loads_LE, given.world_size, costs, given.rows, shadow_steps, given.budget)


def _bits(given: Given, count: int | None, errors: ErrorTable | Path | None = None) -> ExpertPlan:
    if errors is None:
        raise ValueError("errors is missing: policy bits needs what mixtralkit quantise-report measured")
    table = errors if isinstance(errors, ErrorTable) else ErrorTable.load_from(errors)
    if table.error.shape[:2] != given.loads_LE.shape:
        found, wanted = table.error.shape[:2], given.loads_LE.shape
        raise ValueError(f"errors: layers and experts {found} must be {wanted}, which is what the trace has")
    return bits(table, given.shape, given.world_size, given.budget)


def _tiers(given: Given, count: int | None, gpu: GpuBudget | None = None) -> ExpertPlan:
    if gpu is None:
        raise ValueError("gpu_memory_gb is missing: policy tiers fills it")
    return tiers(contiguous(*given.loads_LE.shape, given.world_size), given.loads_LE, gpu)


_HOT = ("hot_experts", "hot_per", "cold", "cold_capacity_factor", "cold_token_percent", "overflow", "cut_order")
POLICIES: dict[str, tuple[Callable[..., ExpertPlan], tuple[str, ...]]] = {
    "contiguous": (_contiguous, ()),
    "hot_cold": (_hot_cold, _HOT),
    "hot_cold/node": (lambda given, count, **options: _hot_cold(given, count, **options, hot_per="node"), _HOT[2:]),
    "two_phase": (_two_phase, ("finetune_threshold",)),
    "affinity": (_affinity, ("load_cap", "bound")),
    "affinity/even": (_even_affinity, ("bound",)),
    "balanced": (_balanced, ("num_groups", "shares")),
    "balanced/node": (_balanced_on_nodes, ()),
    "shadow": (_shadow, ("shadow_steps",)),
    "everywhere": (_everywhere, ()),
    "bits": (_bits, ("errors",)),
    "tiers": (_tiers, ("gpu",)),
}
"""How each policy makes a plan, and the options it takes."""
COUNTED = ("hot_cold", "two_phase", "affinity", "balanced")
NEEDS_LOADS = frozenset(POLICIES) - {"contiguous", "everywhere"}


def make_plan(name: str, given: Given) -> ExpertPlan:
    """The plan of a name; ``meta`` has the name.

    ValueError for another name, or where the policy lacks something or its numbers do not fit.
    """
    policy, _, count = name.partition("+")
    make = POLICIES.get(policy)
    counts = policy.partition("/")[0] in COUNTED
    if make is None or ("+" in name and not (counts and re.fullmatch(r"[0-9]{1,9}", count))):
        known = ", ".join(f"{n}[+N]" if n.partition("/")[0] in COUNTED else n for n in POLICIES)
        raise ValueError(f"plan ({shown(name)}) must be one of {known}")
    options = {option: given.options[option] for option in make[1] if option in given.options}
    plan = make[0](given, int(count) if count else None, **options)
    return replace(plan, ranks_per_node=given.ranks_per_node, meta={**plan.meta, "name": name})


def named_plan(name: str, loads_LE: np.ndarray, world_size: int) -> ExpertPlan:
    """``make_plan`` from loads alone on one node; ``hot_cold`` is ``hot_cold+1``."""
    return make_plan("hot_cold+1" if name == "hot_cold" else name, Given(loads_LE, world_size))


def needs_loads(name: str) -> bool:
    """Whether a plan of this name depends on how often experts are chosen."""
    return name.partition("+")[0] in NEEDS_LOADS


def candidate_names(given: Given, slots: int) -> list[str]:
    """Every plan worth trying: numbers of slots and of hot experts up to ``slots`` a rank, each twice the last.

    Where all loads are equal only those that do not go by loads.
    """
    world, num_experts = given.world_size, given.loads_LE.shape[1]
    nodes = given.ranks_per_node is not None and 1 < given.ranks_per_node < world
    fewest = -(-num_experts // world)
    differ = bool((given.loads_LE != given.loads_LE[:, :1]).any())
    extras = [(fewest + more) * world - num_experts for more in doubling(slots - fewest)]
    extras = [extra for extra in extras if extra < num_experts * (world - 1)]
    names = ["contiguous"]
    if differ:
        names += ["balanced+0"]
    names += [f"balanced+{extra}" for extra in extras]
    if differ and given.trace is not None and num_experts % world == 0:
        names += ["affinity+0", "affinity/even+0"] + [f"affinity+{extra}" for extra in extras]
    if differ:
        names += [f"two_phase+{extra}" for extra in [0, *extras]]
        names += [f"hot_cold+{hot}" for hot in doubling(most_hot(num_experts, world, slots)) if hot < num_experts]
        if given.hardware is not None and given.shape is not None:
            names += ["shadow"]
    if differ and nodes:
        ring = given.ranks_per_node
        names += [f"hot_cold/node+{hot}" for hot in doubling(most_hot(num_experts, world, slots, ring))]
        if num_experts % (world // ring) == 0:
            on_node = num_experts // (world // ring)
            fitting = [extra for extra in [0, *extras] if num_experts + extra <= world * on_node]
            names += [f"balanced/node+{extra}" for extra in fitting]
    return names + ["everywhere"] * (slots >= num_experts)


def doubling(most: int) -> list[int]:
    """1, 2, 4 … and ``most``; nothing below 1."""
    return sorted({min(2**i, most) for i in range(most.bit_length() + 1)}) if most > 0 else []
