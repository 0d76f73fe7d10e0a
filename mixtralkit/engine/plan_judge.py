"""Is a new plan of a layer worth moving its weights?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.transfers import Transfer, stays_in_place, transfers
from mixtralkit.planning.cost import ModelShape, TimeModel
from mixtralkit.planning.dispatchers import Surroundings, choose_dispatcher
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import sample_routing, simulate

_SAMPLED_TOKENS, _MOST_STEPS = 2048, 32  # so many, in steps of the real size, tell two plans apart


@dataclass(frozen=True)
class MoveJudge:
    """Weighs the seconds that a new plan saves in ``steps`` steps against those that moving to it takes.

    Attributes:
        shape, hardware: what the time model needs.
        steps: over which a plan has to pay.
        surroundings: what decides which dispatcher runs.
        exchange_rows: rows of a rank that symmetric memory holds at once; None holds all.
        decode_tokens: steps with at most so many tokens a rank are taken as decoding.
        margin: how many times its price a move must save; above 1 moves less often.
    """

    shape: ModelShape
    hardware: Hardware
    steps: int
    surroundings: Surroundings
    exchange_rows: int | None = None
    decode_tokens: int = 1
    margin: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps ({self.steps}) must be at least 1")
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin ({self.margin}) must be a number of at least 0")

    @classmethod
    def for_model(cls, model: Transformer, hardware: Hardware, steps: int, margin: float = 1.0) -> MoveJudge:
        """For this model as it runs."""
        layout, plan, dispatchers = model.layout, model.layout.plan, model.dispatchers
        hardware.networks(plan.world_size, plan.ranks_per_node)
        shape = ModelShape.of(model.params, model.dtype.itemsize, layout.weights, layout.attention_weights)
        rows = dispatchers.most_rows or None
        return cls(shape, hardware, steps, dispatchers.surroundings, rows, model.sequences_per_rank, margin)

    def pays(self, now: ExpertPlan, wish: ExpertPlan, loads_1E: np.ndarray, tokens: int) -> bool:
        """Whether going from ``now`` to ``wish``, plans of one layer, saves more than it costs.

        Args:
            loads_1E: rows of each expert.
            tokens: of a rank's step.
        """
        saved_s = self.gain_s(now, wish, loads_1E, tokens) * self.steps
        return bool(saved_s > self.margin * self.move_s(now, wish))

    def gain_s(self, now: ExpertPlan, wish: ExpertPlan, loads_1E: np.ndarray, tokens: int) -> float:
        """Predicted seconds that a step of the layer gets shorter; both plans replay the same sampled tokens."""
        in_step = tokens * now.world_size
        steps = min(max(1, _SAMPLED_TOKENS // in_step), _MOST_STEPS)
        sample = sample_routing(loads_1E, in_step * steps, self.shape.top_k)
        execution = self.execution(tokens)
        before, after = (simulate(plan, sample, self.shape, self.hardware, execution) for plan in (now, wish))
        return float(before.step_s - after.step_s)

    def move_s(self, now: ExpertPlan, wish: ExpertPlan) -> float:
        """Predicted seconds of the move: the busiest rank's bytes on the slower network, and what is copied on a rank.

        That is what comes where weights stay in place, and what stays where they do not.
        """
        model = TimeModel(self.shape, self.hardware, now.world_size, now.ranks_per_node)
        now_WE, wish_WE = now.holds_LWE[0], wish.holds_LWE[0]
        moves = transfers(now_WE, wish_WE, now.ranks_per_node)
        copied_WE = wish_WE & (~now_WE if stays_in_place(now_WE, wish_WE) else now_WE)
        copied_s = 2 * copied_WE.sum(1).max() * self.shape.expert_bytes / self.hardware.memory_bandwidth
        return copied_s + float(model.exchange_s(*self._bytes(moves, now), messages=1))

    def _bytes(self, moves: tuple[Transfer, ...], now: ExpertPlan) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each network, inside nodes and across, bytes that leave and reach each rank."""
        per_node = now.ranks_per_node or now.world_size
        networks = len(self.hardware.networks(now.world_size, now.ranks_per_node))
        out_NW, into_NW = np.zeros((2, networks, now.world_size))
        for move in moves:
            network = int(move.source // per_node != move.target // per_node)
            out_NW[network, move.source] += self.shape.expert_bytes
            into_NW[network, move.target] += self.shape.expert_bytes
        return list(out_NW), list(into_NW)

    def execution(self, tokens: int) -> Execution:
        """How steps of so many tokens a rank run: every rank has their plan, so shapes are known beforehand."""
        dispatcher = choose_dispatcher(self.surroundings, rows_known=True, decode=tokens <= self.decode_tokens)
        return Execution(dispatcher, tokens, exchange_rows=self.exchange_rows)
