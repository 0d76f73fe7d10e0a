"""How the host's answer gets to a step that waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mixtralkit.moe.tiers.memory import Move
from mixtralkit.moe.tiers.setup import Answer

if TYPE_CHECKING:
    from mixtralkit.moe.tiers.tiers import Tiers


class HostAnswer:
    """It lies in memory of the host, which the step reads.

    Attributes:
        said_LS, cpu_TD, answers_L: as the step reads them (``ops.desk.triton.DeskMemory``).
        computed_TD: where the CPU writes what it computes.
    """

    def __init__(self, tiers: Tiers, rows: int) -> None:
        self.tiers = tiers
        config, self._cuda = tiers.layout.config, tiers.context.device.type == "cuda"
        self.computed_TD = torch.zeros(rows, config.dim, pin_memory=self._cuda)
        self._flags_L = torch.zeros(config.n_layers, dtype=torch.int32, pin_memory=self._cuda)
        self.said_LS, self.cpu_TD, self.answers_L = tiers.said_LS, self.computed_TD, self._flags_L

    def give(self, layer: int, answer: Answer) -> None:
        """Lets the step go on, once the copies have ended."""
        self.tiers.end(answer)
        self._flags_L.numpy()[layer] = 2 if answer.cpu else 1

    def let_go(self) -> None:
        """Lets it go on wherever it may come to wait: something has failed."""
        self._flags_L.fill_(1)

    def take_back(self) -> None:
        """Nothing is answered; no step runs."""
        self.answers_L.zero_()


class BusAnswer(HostAnswer):
    """The bus brings it into the device's memory, behind the experts: the host waits for no copy."""

    def __init__(self, tiers: Tiers, rows: int) -> None:
        super().__init__(tiers, rows)
        device = tiers.context.device
        self.said_LS, self.cpu_TD, self.answers_L = (
            torch.zeros_like(of, device=device) for of in (tiers.said_LS, self.computed_TD, self._flags_L)
        )
        self._moves = [
            Move(there.data_ptr(), here.data_ptr(), here.nbytes)
            for there, here in ((self.said_LS, tiers.said_LS), (self.cpu_TD, self.computed_TD))
        ]
        self._aside = torch.cuda.Stream(device) if self._cuda else None

    def give(self, layer: int, answer: Answer) -> None:
        """As there, but the step goes on when the bus has come so far."""
        self.tiers.end(answer, waits=False)
        moves, value = (self._moves, 2) if answer.cpu else (self._moves[:1], 1)
        self.tiers.bus.answer(answer.tickets, moves, self.answers_L.data_ptr() + 4 * layer, value)

    def let_go(self) -> None:
        super().let_go()
        with torch.cuda.stream(self._aside):  # not by the bus, which may be what has failed
            self.answers_L.copy_(self._flags_L, non_blocking=True)
