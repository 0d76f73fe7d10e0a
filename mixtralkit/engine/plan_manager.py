"""New plans between steps: count, plan, judge, move, a layer at a time.

::

    window of update_step steps          pass: one layer between two steps
    first half │ second half       ──►   policy(first half) ─► pays by the second half? ─► move the layer's experts

The pass over the layers runs while the next window is counted. Nothing is in flight when a layer moves; but for a pass,
decode steps run ahead of their text as they do without a manager. See docs/plan-manager.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from mixtralkit.distributed import RankFailed
from mixtralkit.engine.flight import Flight
from mixtralkit.engine.plan_judge import MoveJudge
from mixtralkit.engine.plan_policies import Policy
from mixtralkit.engine.plan_statistics import PlanStatistics
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.transfers import open_links
from mixtralkit.planning.plan import ExpertPlan


@dataclass(frozen=True)
class _Window:
    """Rows of each expert in the two halves of a window, all ranks together, and tokens of a rank's step."""

    loads_HLE: np.ndarray
    tokens: int


@dataclass(frozen=True)
class _Wish:
    """What rank 0 wants of a layer: new slots [W, S], None to keep those it has; or why it could not tell."""

    slots_WS: np.ndarray | None
    error: Exception | None = None


class PlanManager:
    """Keeps a running model's plan near what a policy makes of the loads it sees.

    Engine and manager meet in two places: the manager is told of every step, whose choices the device has counted,
    and ``between_steps`` may move one layer. The same on every rank: rank 0 plans and tells the others. Every choice of
    experts stays as it was, so that no token of an answer changes.

    Attributes:
        statistics: what it did so far.
    """

    def __init__(self, model: Transformer, policy: Policy, update_step: int, judge: MoveJudge | None = None) -> None:
        """Collective. ``judge`` decides what is worth its move; None adopts every plan.

        Raises:
            ValueError: ``update_step`` below 2, experts not 'ep', or moe_backend 'fastmoe'.
        """
        if update_step < 2:
            raise ValueError(f"update_step ({update_step}) must be at least 2: a half to plan by, a half to judge by")
        experts, backend = model.layout.parallel.experts, model.options.backend
        if experts != "ep":
            raise ValueError(f"update_step needs experts 'ep', not {experts!r}: 'tp' has a part of each on every rank")
        if backend != "mixtralkit":
            raise ValueError(f"update_step needs moe_backend 'mixtralkit', not {backend!r}, which knows one plan")
        model.layout.check_one_format("update_step")
        self.model, self.policy, self.update_step, self.judge = model, policy, update_step, judge
        self.context = model.context
        self.statistics = PlanStatistics()
        layers, num_experts = model.params.n_layers, model.params.num_experts
        self._shape_HLE = (2, layers, num_experts)
        self._window: _Window | None = None
        self._next_layer = layers
        self._wish: _Wish | None = None
        self._moved_before = 0
        self._late_plan_s = 0.0
        self._restart()
        open_links(self.context)

    def launched(self, flight: Flight) -> None:
        """Counts a step that is in flight, before the next is launched; nothing waits for the device.

        Meanwhile rank 0 plans the next layer of a pass.
        """
        self._add(flight.counts_LE)
        kind = {"mixed": "plain_steps", "launched": "launched_steps", "graph": "graph_steps"}[flight.kind]
        self._count(**{kind: 1}, recaptures=int(flight.recapture_s > 0), recapture_s=flight.recapture_s)
        if self.in_pass and self.context.is_first:
            started = time.perf_counter()
            self._wish = self._decide(self._next_layer)
            if not flight.is_running:  # the device has waited for it, how long is not known
                self._late_plan_s = time.perf_counter() - started

    @property
    def in_pass(self) -> bool:
        """Whether layers are still to be planned by the last window; the same on every rank."""
        return self._next_layer < self._shape_HLE[1]

    @property
    def is_due(self) -> bool:
        """Whether ``between_steps`` has something to do, so that no step may be in flight; the same on every rank."""
        return self.in_pass or self._steps >= self.update_step

    def between_steps(self) -> None:
        """Goes on with the pass over the layers, by at most one move. Collective."""
        if not self.is_due:
            return
        started = time.perf_counter() - self._late_plan_s
        self._late_plan_s = 0.0
        if not self.in_pass:
            self._window, self._next_layer = self._read(), 0
            self._restart()
            self._count(considered=1)
            self._moved_before = self.statistics.layers_moved
        self._update(self._next_layer)
        self._next_layer += 1
        pauses = self.statistics.pauses.with_one(time.perf_counter() - started)
        self.statistics = replace(self.statistics, pauses=pauses)

    def _restart(self) -> None:
        """Begins a window."""
        self._counts_HLE = torch.zeros(self._shape_HLE, dtype=torch.int64, device=self.context.device)
        self._steps = self._late_steps = 0

    def _add(self, counts_LE: torch.Tensor) -> None:
        half = int(2 * self._steps >= self.update_step)
        self._counts_HLE[half] += counts_LE
        self._steps += 1
        self._late_steps += half

    def _read(self) -> _Window:
        counts_HLE, world = self._counts_HLE, self.context.world_size
        if self.model.ranks_with_own_sequences > 1:
            counts_HLE = self.context.all_reduce(counts_HLE)
        loads_HLE = counts_HLE.cpu().numpy()  # host sync
        choices = loads_HLE[1, 0].sum() / self._late_steps / self.model.params.num_experts_per_tok
        return _Window(loads_HLE, max(1, round(choices / world)))

    def _update(self, layer: int) -> None:
        """One layer of the pass: rank 0 decides, all move."""
        slots_WS = self._agreed_slots(layer)
        if slots_WS is None:
            self._count(layers_kept=1)
            return
        started = time.perf_counter()
        report = self.model.adopt(layer, with_layer(self.model.layout.plan, layer, slots_WS))
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)  # so that the pause is the move's, and no graph is running
        move_s = time.perf_counter() - started
        first = self.statistics.layers_moved == self._moved_before
        self._count(
            adopted=int(first), layers_moved=1, layers_relocated=int(not report.in_place),
            experts_moved=len(report.transfers), bytes_moved=report.bytes_moved,
        )  # fmt: skip
        longest_s = max(self.statistics.longest_move_s, move_s)
        self.statistics = replace(self.statistics, longest_move_s=longest_s)

    def _agreed_slots(self, layer: int) -> np.ndarray | None:
        """Rank 0's wish for the layer; its error on all ranks, in the one message that tells them the slots."""
        wish, self._wish = self._wish, None
        if self.context.is_first and wish is None:
            wish = self._decide(layer)
        slots_WS, words = self.context.broadcast_object(wish and (wish.slots_WS, wish.error and str(wish.error)))
        if wish is not None and wish.error is not None:
            raise wish.error
        if words is not None:
            raise RankFailed(f"rank 0: {words}")
        return slots_WS

    def _decide(self, layer: int) -> _Wish:
        """Of rank 0: plans and judges a layer; no collective, and no error leaves it."""
        try:
            return _Wish(self._better_slots(layer))
        except Exception as error:
            return _Wish(None, error)

    def _better_slots(self, layer: int) -> np.ndarray | None:
        """New slots [W, S] of the layer; None to keep those it has."""
        plan, tokens = self.model.layout.plan, self._window.tokens
        profile_1E, test_1E = self._window.loads_HLE[:, layer : layer + 1]
        now = replace(plan, slots_LWS=plan.slots_LWS[layer : layer + 1])
        wish = self.policy(profile_1E, tokens)
        wish.check_fits(1, plan.num_experts, plan.world_size)
        slots_WS = nearest_ranks(now.holds_LWE[0], wish.slots_LWS[0], plan.ranks_per_node)
        slots_WS = nearest_slots(now.slot_of_LWE[0], slots_WS)
        wish = replace(now, slots_LWS=slots_WS[None])
        if (wish.holds_LWE == now.holds_LWE).all():
            return None
        if self.judge is not None and not self.judge.pays(now, wish, test_1E, tokens):
            return None
        return slots_WS

    def _count(self, **more: float) -> None:
        self.statistics = self.statistics.plus(**more)


def nearest_ranks(old_WE: np.ndarray, slots_WS: np.ndarray, ranks_per_node: int | None = None) -> np.ndarray:
    """The rows of ``slots_WS`` in the order in which fewest experts must move; each stays on its node.

    A policy does not care which of a node's ranks gets which of the sets that it made.

    Args:
        old_WE: True where a rank holds an expert now.
        slots_WS: experts of each rank, -1 for an empty slot.
    """
    world, num_experts = old_WE.shape
    per_node = ranks_per_node or world
    new_WE = np.zeros((world, num_experts + 1), bool)
    np.put_along_axis(new_WE, slots_WS, True, axis=1)  # -1 marks the last column
    ordered_WS = np.empty_like(slots_WS)
    for first in range(0, world, per_node):
        node = slice(first, first + per_node)
        shared = old_WE[node].astype(int) @ new_WE[node, :-1].T
        ranks, sets = linear_sum_assignment(shared, maximize=True)
        ordered_WS[node][ranks] = slots_WS[node][sets]
    return ordered_WS


def nearest_slots(old_WE: np.ndarray, slots_WS: np.ndarray) -> np.ndarray:
    """The same experts on the same ranks, those that a rank keeps in the slots where they are, empty slots last.

    Args:
        old_WE: slot of each expert on each rank now, -1 where it is not held.
        slots_WS: experts of each rank, -1 for an empty slot.
    """
    ordered_WS = np.full_like(slots_WS, -1)
    for old_E, slots_S, ordered_S in zip(old_WE, slots_WS, ordered_WS, strict=True):
        experts = [int(expert) for expert in slots_S if expert >= 0]
        stay = [expert for expert in experts if 0 <= old_E[expert] < len(experts)]
        come = iter([expert for expert in experts if expert not in stay])
        ordered_S[old_E[stay]] = stay
        for slot in range(len(experts)):
            if ordered_S[slot] < 0:
                ordered_S[slot] = next(come)
    return ordered_WS


def with_layer(plan: ExpertPlan, layer: int, slots_WS: np.ndarray) -> ExpertPlan:
    """``plan`` with other slots in one layer, as wide as its widest rank needs."""
    layers = [plan.slots_LWS[i] if i != layer else slots_WS for i in range(plan.num_layers)]
    most = max(slots.shape[1] for slots in layers)
    padded = [np.pad(slots, ((0, 0), (0, most - slots.shape[1])), constant_values=-1) for slots in layers]
    return replace(plan, slots_LWS=np.stack(padded))
