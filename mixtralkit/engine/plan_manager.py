"""New plans between steps: count, plan, judge, move, a layer at a time.

::

    window of update_step steps          pass: one layer between two steps
    first half │ second half       ──►   policy(first half) ─► pays by the second half? ─► move the layer's experts

The pass over the layers runs while the next window is counted. See docs/plan-manager.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from mixtralkit.engine.plan_judge import MoveJudge
from mixtralkit.engine.plan_policies import Policy
from mixtralkit.kernels.counting import count_keys
from mixtralkit.model.step import StepBatch
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.layer import MoEReport
from mixtralkit.moe.move import open_links
from mixtralkit.planning.plan import ExpertPlan


@dataclass(frozen=True)
class PlanStatistics:
    """What a manager did so far; the same on every rank.

    Attributes:
        considered: plans made, one a window.
        adopted: those of which at least one layer was moved.
        layers_kept: layers whose new slots were those they had, or did not pay.
        layers_moved, experts_moved, bytes_moved: layers that moved, and what crossed from rank to rank.
        longest_pause_s: longest time between two steps, on this rank.
    """

    considered: int = 0
    adopted: int = 0
    layers_kept: int = 0
    layers_moved: int = 0
    experts_moved: int = 0
    bytes_moved: int = 0
    longest_pause_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"plans: {self.considered} considered, {self.adopted} adopted; layers: {self.layers_moved} moved, "
            f"{self.layers_kept} kept; {self.experts_moved} experts, {self.bytes_moved / 1e6:,.3f} MB; "
            f"longest pause {self.longest_pause_s * 1e3:.1f} ms"
        )


@dataclass(frozen=True)
class _Window:
    """Rows of each expert in the two halves of a window, all ranks together, and tokens of a rank's step."""

    loads_HLE: np.ndarray
    tokens: int


class PlanManager:
    """Keeps a running model's plan near what a policy makes of the loads it sees.

    Engine and manager meet in two places: it is called with every step's reports, which it counts on the device, and
    ``between_steps`` may move one layer. The same on every rank: rank 0 plans and tells the others. Every choice of
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
        self.model, self.policy, self.update_step, self.judge = model, policy, update_step, judge
        self.context = model.context
        self.statistics = PlanStatistics()
        layers, num_experts = model.params.n_layers, model.params.num_experts
        self._shape_HLE = (2, layers, num_experts)
        self._first_key_L1 = (torch.arange(layers, device=self.context.device) * num_experts)[:, None]
        self._window: _Window | None = None
        self._next_layer = layers
        self._moved_before = 0
        self._restart()
        open_links(self.context)

    def __call__(self, batch: StepBatch, reports: list[MoEReport]) -> None:
        """Counts a step (an ``Observe``); nothing waits for the device."""
        _, layers, experts = self._shape_HLE
        chosen_LN = torch.stack([report.routing.experts_TK.flatten() for report in reports])
        keys_LN = chosen_LN + self._first_key_L1
        half = int(2 * self._steps >= self.update_step)
        self._counts_HLE[half] += count_keys(keys_LN, layers * experts).view(layers, experts)
        self._steps += 1
        self._late_steps += half

    def between_steps(self) -> None:
        """Goes on with the pass over the layers, by at most one move. Collective."""
        in_pass = self._next_layer < self._shape_HLE[1]
        if not in_pass and self._steps < self.update_step:
            return
        started = time.perf_counter()
        if not in_pass:
            self._window, self._next_layer = self._read(), 0
            self._restart()
            self._count(considered=1)
            self._moved_before = self.statistics.layers_moved
        self._update(self._next_layer)
        self._next_layer += 1
        pause_s = time.perf_counter() - started
        self.statistics = replace(self.statistics, longest_pause_s=max(self.statistics.longest_pause_s, pause_s))

    def _restart(self) -> None:
        """Begins a window."""
        self._counts_HLE = torch.zeros(self._shape_HLE, dtype=torch.int64, device=self.context.device)
        self._steps = self._late_steps = 0

    def _read(self) -> _Window:
        counts_HLE, world = self._counts_HLE, self.context.world_size
        if self.model.ranks_with_own_sequences > 1:
            counts_HLE = self.context.all_reduce(counts_HLE)
        loads_HLE = counts_HLE.cpu().numpy()  # host sync
        choices = loads_HLE[1, 0].sum() / self._late_steps / self.model.params.num_experts_per_tok
        return _Window(loads_HLE, max(1, round(choices / world)))

    def _update(self, layer: int) -> None:
        """One layer of the pass: rank 0 decides, all move."""
        slots_WS = None
        with self.context.agreed():
            if self.context.is_first:
                slots_WS = self._decide(layer)
        slots_WS = self.context.broadcast_object(slots_WS)
        if slots_WS is None:
            self._count(layers_kept=1)
            return
        report = self.model.adopt(layer, with_layer(self.model.layout.plan, layer, slots_WS))
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)  # so that the pause is the move's
        first = self.statistics.layers_moved == self._moved_before
        self._count(
            adopted=int(first), layers_moved=1, experts_moved=len(report.transfers), bytes_moved=report.bytes_moved
        )

    def _decide(self, layer: int) -> np.ndarray | None:
        """New slots [W, S] of the layer; None to keep those it has."""
        plan, tokens = self.model.layout.plan, self._window.tokens
        profile_1E, test_1E = self._window.loads_HLE[:, layer : layer + 1]
        now = replace(plan, slots_LWS=plan.slots_LWS[layer : layer + 1])
        wish = self.policy(profile_1E, tokens)
        wish.check_fits(1, plan.num_experts, plan.world_size)
        slots_WS = nearest_ranks(now.holds_LWE[0], wish.slots_LWS[0], plan.ranks_per_node)
        wish = replace(now, slots_LWS=slots_WS[None])
        if (wish.holds_LWE == now.holds_LWE).all():
            return None
        if self.judge is not None and not self.judge.pays(now, wish, test_1E, tokens):
            return None
        return slots_WS

    def _count(self, **more: int) -> None:
        now = self.statistics
        self.statistics = replace(now, **{name: getattr(now, name) + count for name, count in more.items()})


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


def with_layer(plan: ExpertPlan, layer: int, slots_WS: np.ndarray) -> ExpertPlan:
    """``plan`` with other slots in one layer, as wide as its widest rank needs."""
    layers = [plan.slots_LWS[i] if i != layer else slots_WS for i in range(plan.num_layers)]
    most = max(slots.shape[1] for slots in layers)
    padded = [np.pad(slots, ((0, 0), (0, most - slots.shape[1])), constant_values=-1) for slots in layers]
    return replace(plan, slots_LWS=np.stack(padded))
