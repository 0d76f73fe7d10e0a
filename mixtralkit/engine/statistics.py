"""What the MoE layers did over a run: rows routed, cut, sent, and shadows moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.dispatch.exact import ExactHandle
from mixtralkit.moe.layer import MoEReport
from mixtralkit.moe.two_phase import Timing


@dataclass(frozen=True)
class LayerTotals:
    """One layer's sums over all steps and ranks.

    Attributes:
        choices: routed rows, K for every token.
        dropped, rerouted: choices over a cold expert's capacity.
        sent: rows that left a rank in exact exchanges; a static exchange keeps room for every row and is not counted.
        shadows: copies of experts broadcast.
        shadow_bytes: what these weigh, once for each copy.
    """

    choices: int
    dropped: int
    rerouted: int
    sent: int
    shadows: int
    shadow_bytes: int


@dataclass(frozen=True)
class PhaseTotals:
    """What Lina's two phases did for one layer over all steps (``moe/two_phase.py``).

    Attributes:
        estimates: steps that had an estimate.
        right: those whose estimated 2K most popular experts were the real ones.
        corrections: those in which phase two chose again.
        bytes_ahead: weights that phase one moved; the rest of ``LayerTotals.shadow_bytes`` moved late.
        hidden_ms, waited_ms: while weights moved, time with other work to do and without, the mean over the ranks.
    """

    estimates: int
    right: int
    corrections: int
    bytes_ahead: int
    hidden_ms: float
    waited_ms: float


class MoEStatistics:
    """Adds up the layers' reports of every step (an ``Observe``); nothing waits for the step that runs."""

    def __init__(self, model: Transformer) -> None:
        self.context = model.context
        self.tokens_are_shared = model.ranks_with_own_sequences == 1
        layers = model.params.n_layers
        self._cut_L2 = torch.zeros(layers, 2, dtype=torch.int64, device=self.context.device)  # dropped, rerouted
        self._host_L4 = torch.zeros(layers, 4, dtype=torch.int64)  # choices, sent, shadows, shadow bytes
        self.phases = PhaseStatistics(model)

    def __call__(self, batch: ForwardBatch, reports: list[MoEReport]) -> None:
        counts_for_all = self.context.is_first or not self.tokens_are_shared
        if not counts_for_all:
            return  # rank 0 has the same rows
        self.phases(batch, reports)
        self._cut_L2 += torch.stack([torch.stack([report.dropped, report.rerouted]) for report in reports])
        for report, row in zip(reports, self._host_L4, strict=True):
            row[0] += report.routing.experts_TK.numel()
            row[1] += sum(sum(rows) for handle in report.handles for rows in _sent(handle))
            if report.shadows is not None and self.context.is_first:  # every rank reports the same ones
                row[2] += len(report.shadows.broadcast)
                row[3] += report.shadows.bytes_broadcast

    def totals(self) -> list[LayerTotals]:
        """Sums over the ranks, by layer. Collective; synchronises host and device."""
        together = torch.cat([self._cut_L2, self._host_L4.to(self.context.device)], dim=1)
        rows = self.context.all_reduce(together).tolist()
        return [
            LayerTotals(choices, dropped, rerouted, sent, shadows, size)
            for dropped, rerouted, choices, sent, shadows, size in rows
        ]

    def table(self) -> str:
        """The totals as text, a layer a line. Collective."""
        phases = self.phases.totals()
        return _table(self.totals()) + ("\n\n" + _table(phases) if phases else "")


class PhaseStatistics:
    """Adds up how estimates fared and what moved for them (an ``Observe``); nothing waits for the step that runs."""

    def __init__(self, model: Transformer) -> None:
        self.context = model.context
        self._sums_L6 = torch.zeros(model.params.n_layers, 6, dtype=torch.float64)  # as in PhaseTotals
        self._timed: list[tuple[int, Timing]] = []

    def __call__(self, batch: ForwardBatch, reports: list[MoEReport]) -> None:
        self._take_timings()
        for layer, report in enumerate(reports):
            phases = report.shadows and report.shadows.phases
            if phases is None:
                continue
            counts = [1.0, phases.right, phases.corrected, phases.bytes_ahead]
            self._sums_L6[layer, :4] += torch.tensor(counts, dtype=torch.float64)
            if phases.timing is not None:
                self._timed.append((layer, phases.timing))

    def totals(self) -> list[PhaseTotals]:
        """By layer; empty where no step had an estimate. Collective, and synchronises host and device."""
        self._take_timings()
        # Every rank has the same counts and times of its own: the mean serves both.
        sums_L6 = self.context.all_reduce(self._sums_L6.to(self.context.device, copy=True)) / self.context.world_size
        if not sums_L6[:, 0].any():
            return []
        return [PhaseTotals(*map(round, row[:4]), *(round(t, 3) for t in row[4:])) for row in sums_L6.tolist()]

    def _take_timings(self) -> None:
        """Those of the step before: on a GPU its marks have passed, since what it sampled has been read."""
        for layer, timing in self._timed:
            self._sums_L6[layer, 4] += 1e3 * timing.hidden_s
            self._sums_L6[layer, 5] += 1e3 * timing.waited_s
        self._timed.clear()


def _table(totals: Sequence[LayerTotals | PhaseTotals]) -> str:
    rows = [asdict(layer) for layer in totals]
    lines = ["layer  " + "  ".join(f"{name:>12}" for name in rows[0])]
    lines += [f"{i:5}  " + "  ".join(f"{value:>12,}" for value in row.values()) for i, row in enumerate(rows)]
    return "\n".join(lines)


def _sent(handle: object) -> list[list[int]]:
    return [stage.send for stage in handle.exchange] if isinstance(handle, ExactHandle) else []
