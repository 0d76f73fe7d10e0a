"""A layer's experts in two memories, as its rows go through them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.experts import Experts
from mixtralkit.moe.tiers.parts import add_parts, only
from mixtralkit.moe.tiers.setup import Answer
from mixtralkit.moe.tiers.tiers import Tiers
from mixtralkit.ops.experts import expert_sum


class TieredExperts(Experts):
    """``Experts`` whose parameters lie in host memory, and some of which are on the GPU as well."""

    def __init__(self, tiers: Tiers, layer: int) -> None:
        super().__init__(tiers.hosts[layer].tensors, None, tiers.layout.groups(layer), tiers.columns)
        self.tiers, self.layer = tiers, layer

    def forward(self, rows: RoutedRows) -> torch.Tensor:
        """See ``Experts``, wherever the experts are. Waits for the router."""
        assert not self.trains, "experts in host memory do not train"
        tiers, layer = self.tiers, self.layer
        guessed = tiers.take_guess()
        if tiers.desk is not None:
            return tiers.desk.run(layer, rows, guessed)
        if not len(rows.x_RD):
            return self._sum(rows)
        tiers.begin(layer)
        asked = rows.slots_RK.flatten() if guessed is None else torch.cat([rows.slots_RK.flatten(), guessed.flatten()])
        values = tiers.on_host(asked)
        slots_N = values[: rows.slots_RK.numel()]
        rows_of = Counter(slots_N[slots_N >= 0].tolist())
        answer = tiers.ask(layer, rows_of)
        if answer.cpu or answer.first is not None:
            y_RD = self._by_parts(rows, slots_N, answer)
        else:
            tiers.wait(answer)
            tiers.tables.tell(layer)
            y_RD = self._sum(rows)
        tiers.look_ahead(layer, rows_of, None if guessed is None else values[len(slots_N) :])
        return y_RD

    def _sum(self, rows: RoutedRows) -> torch.Tensor:
        """Where all experts that rows name are on the GPU: as if all were."""
        tiers, slots = self.tiers, self.tiers.slots[self.layer]
        step, count = tiers.setup.piece_rows or max(len(rows.x_RD), 1), max(len(rows.x_RD), 1)
        out_RD = rows.out_RD
        if out_RD is None and step < count:
            out_RD = torch.empty_like(rows.x_RD, memory_format=torch.contiguous_format)
        for start in range(0, count, step):
            piece = slice(start, start + step)
            y_RD = expert_sum(
                rows.x_RD[piece], rows.slots_RK[piece], rows.weights_RK[piece], *tiers.matrices,
                None if rows.residual_RD is None else rows.residual_RD[piece],
                None if out_RD is None else out_RD[piece], rows.likely_rows if step >= count else None,
                tiers.tables.places_LS[self.layer, :slots], slots,
            )  # fmt: skip
        return y_RD if out_RD is None else out_RD

    def _by_parts(self, rows: RoutedRows, slots_N: np.ndarray, answer: Answer) -> torch.Tensor:
        """A part for each choice, from the GPU or the CPU, added as ``expert_sum`` adds them."""
        tiers, layer, x_RD, top_k = self.tiers, self.layer, rows.x_RD, rows.slots_RK.shape[1]
        x_ND, weights_N1 = x_RD.repeat_interleave(top_k, 0), rows.weights_RK.reshape(-1, 1)
        tiers.tables.tell(layer)
        here_N1, late_N1 = (tiers.tables.upload(only(slots_N, slots)) for slots in (answer.here, answer.late))
        places_S = tiers.tables.places_of(layer, tiers.slots[layer])
        parts = [tiers.product(layer, x_ND, here_N1, weights_N1)] if answer.here else []
        on_cpu_N1 = torch.from_numpy(only(slots_N, answer.cpu))
        on_cpu = tiers.product_on_cpu(layer, x_ND.cpu(), on_cpu_N1, weights_N1.cpu(), answer.first)
        parts.append(on_cpu.to(x_RD.device, non_blocking=True))
        if answer.late:
            tiers.wait(answer)
            parts.append(tiers.product(layer, x_ND, late_N1, weights_N1, places_S))
        return add_parts(parts, top_k, rows.residual_RD, x_RD.dtype, rows.out_RD)
