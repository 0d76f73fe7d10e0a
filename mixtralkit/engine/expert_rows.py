"""What the MoE layers did with the rows so far, for whoever looks while the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.engine.flight import Flight
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.layer import CHUNKED
from mixtralkit.planning.replicas import ReplicaTable, is_small


@dataclass(frozen=True)
class Figures:
    """int64 sums of some ranks' rows, one rank's behind the other's (S).

    Attributes:
        choices_S2LE: rows that chose each expert, in large batches and in small ones, which replicas serve otherwise.
        cut_S2L: choices over a cold expert's capacity, dropped and rerouted.
        hits_S2L: choices of an expert that all ranks hold: by the plan (hot), and by a copy alone (shadow).
    """

    choices_S2LE: np.ndarray
    cut_S2L: np.ndarray
    hits_S2L: np.ndarray

    @classmethod
    def of(cls, sums_SN: np.ndarray, layers: int, experts: int) -> Figures:
        """From what ``ExpertRows.read`` gave on each rank that has rows of its own."""
        choices, cut, hits = np.split(sums_SN, [2 * layers * experts, 2 * layers * (experts + 1)], axis=1)
        return cls(choices.reshape(-1, 2, layers, experts), cut.reshape(-1, 2, layers), hits.reshape(-1, 2, layers))

    @property
    def choices_LE(self) -> np.ndarray:
        return self.choices_S2LE.sum((0, 1))

    def shares_LW(self, replicas: Sequence[ReplicaTable]) -> np.ndarray:
        """Share of each layer's rows that each rank computes, 0 where nothing came: float64 [L, W].

        As the dispatchers assign them, by each layer's table; replicas that take turns have equal parts.
        """
        rows_LW = np.array([rank_rows(table, *self.choices_S2LE[:, :, i].swapaxes(0, 1))
                            for i, table in enumerate(replicas)])  # fmt: skip
        return rows_LW / np.maximum(rows_LW.sum(1, keepdims=True), 1)


def rank_rows(replicas: ReplicaTable, large_SE: np.ndarray, small_SE: np.ndarray) -> np.ndarray:
    """Rows of a layer that each rank computes: float64 [W].

    Args:
        large_SE: choices of each expert in large batches, by each rank; [1, E] where all have the same rows.
        small_SE: those in small batches.
    """
    rows_W = np.bincount(replicas.small_E, small_SE.sum(0), len(replicas.slots_WE)).astype(float)
    for rank, large_E in enumerate(large_SE):
        group_E, holds_GW = replicas.group_WE[rank], replicas.group_holds_GW
        stays_E = group_E < 0
        rows_W[rank] += large_E[stays_E].sum()
        holds_EW = holds_GW[group_E[~stays_E]]
        rows_W += (large_E[~stays_E, None] * holds_EW / np.maximum(holds_EW.sum(1, keepdims=True), 1)).sum(0)
    return rows_W


class ExpertRows:
    """Sums of this rank's rows. Adding waits for nothing, and reading never for the device."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        layers, experts = model.params.n_layers, model.params.num_experts
        device = model.context.device
        self._sums = torch.zeros(2 * layers * (experts + 2), dtype=torch.int64, device=device)
        self._host = torch.zeros(len(self._sums), dtype=torch.int64, pin_memory=device.type == "cuda")
        choices, cut, hits = self._sums.split([2 * layers * experts, 2 * layers, 2 * layers])
        self._choices_2LE = choices.view(2, layers, experts)
        self._cut_2L, self._hits_2L = cut.view(2, layers), hits.view(2, layers)
        self._held: tuple[object, ...] = ()
        self._held_2LE: torch.Tensor | None = None

    def add(self, flight: Flight) -> None:
        """A step's, before the next is launched."""
        params, plan = self.model.params, self.model.layout.plan
        rows = flight.routed[0] * self.model.ranks_with_own_sequences
        # an exchange that counts rows pours them over the replicas, however few they are
        pours = self.model.dispatchers.name(True, flight.kind != "mixed") in CHUNKED
        small = not pours and is_small(rows, params.num_experts_per_tok, params.num_experts)
        self._choices_2LE[int(small)] += flight.counts_LE
        if plan.cold_capacity_factor is not None:
            self._cut_2L += torch.stack([torch.stack([r.dropped, r.rerouted]) for r in flight.reports], dim=1)
        self._look(tuple(() if r.shadows is None else r.shadows.experts for r in flight.reports))
        if self._held_2LE is not None:
            self._hits_2L += (flight.counts_LE * self._held_2LE).sum(-1)
        self._host.copy_(self._sums, non_blocking=True)

    def read(self) -> np.ndarray:
        """int64 sums, as ``Figures.of`` takes them, up to the last step or the one before. Any thread may ask."""
        return self._host.numpy().copy()

    def _look(self, copied: tuple[tuple[int, ...], ...]) -> None:
        """Which experts all ranks hold in the step: by the plan, and by a copy; told to the device where it changed."""
        plan = self.model.layout.plan
        if self._held == (plan, copied):
            return
        self._held = plan, copied
        hot_LE = plan.holds_LWE.all(1) & (plan.world_size > 1 and self.model.layout.parallel.experts == "ep")
        held_2LE = np.stack([hot_LE, np.zeros_like(hot_LE)])
        for layer, experts in enumerate(copied):
            held_2LE[1, layer, [expert for expert in experts if not hot_LE[layer, expert]]] = True
        self._held_2LE = None
        if held_2LE.any():
            values = torch.from_numpy(held_2LE.astype(np.int64))
            values = values.pin_memory() if self._sums.is_cuda else values
            self._held_2LE = values.to(self._sums.device, non_blocking=True)
