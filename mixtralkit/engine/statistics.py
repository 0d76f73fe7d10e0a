"""What the MoE layers did over a run: rows routed, cut, sent, and shadows moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from mixtralkit.model.step import StepBatch
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.layer import MoEReport


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


class MoEStatistics:
    """Adds up the layers' reports of every step (an ``Observe``); nothing waits for the device until ``totals``."""

    def __init__(self, model: Transformer) -> None:
        self.context = model.context
        self.tokens_are_shared = model.layout.parallel.attention == "tp"
        layers = model.params.n_layers
        self._cut_L2 = torch.zeros(layers, 2, dtype=torch.int64, device=self.context.device)  # dropped, rerouted
        self._host_L4 = torch.zeros(layers, 4, dtype=torch.int64)  # choices, sent, shadows, shadow bytes

    def __call__(self, batch: StepBatch, reports: list[MoEReport]) -> None:
        counts_for_all = self.context.is_first or not self.tokens_are_shared
        if not counts_for_all:
            return  # rank 0 has the same rows
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
        totals = [asdict(layer) for layer in self.totals()]
        names = list(totals[0])
        lines = ["layer  " + "  ".join(f"{name:>12}" for name in names)]
        lines += [f"{i:5}  " + "  ".join(f"{row[name]:>12,}" for name in names) for i, row in enumerate(totals)]
        return "\n".join(lines)


def _sent(handle: object) -> list[list[int]]:
    parts = handle if isinstance(handle, tuple) else (handle,)  # a two-stage exchange has a handle for each stage
    return [part.send for part in parts if hasattr(part, "send")]
