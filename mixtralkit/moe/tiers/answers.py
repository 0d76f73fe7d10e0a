"""How the host's answer gets to a step that waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mixtralkit.moe.tiers.memory import Move
from mixtralkit.moe.tiers.setup import Answer

if TYPE_CHECKING:
    from mixtralkit.moe.tiers.tiers import Tiers


class BusAnswer:
    """The bus brings it into the device's memory, behind the experts: nobody waits for a copy but the step.

    Attributes:
        said_LS, cpu_TD, answers_L: as the step reads them (``ops.desk.triton.DeskMemory``).
        computed_TD: where the CPU writes what it computes.
    """

    def __init__(self, tiers: Tiers, rows: int) -> None:
        self.tiers, device, width = tiers, tiers.context.device, tiers.layout.config.dim
        is_cuda = device.type == "cuda"
        sizes = [tiers.tables.said_LS.nbytes, 4 * rows * width]  # side by side, so that one copy brings both
        self._sent = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=is_cuda)
        self._brought = torch.zeros_like(self._sent, device=device)
        (sent_LS, self.computed_TD), (self.said_LS, self.cpu_TD) = (
            (said.view(torch.int64).view_as(tiers.tables.said_LS), cpu.view(torch.float32).view(rows, width))
            for said, cpu in (memory.split(sizes) for memory in (self._sent, self._brought))
        )
        self._sent_LS, self._table_bytes = sent_LS.numpy(), sizes[0]
        self.answers_L = torch.zeros(len(tiers.tables.table_LS), dtype=torch.int32, device=device)
        self._ones_L = torch.ones_like(self.answers_L, device="cpu", pin_memory=is_cuda)
        self._aside = torch.cuda.Stream(device) if is_cuda else None

    def give(self, layer: int, answer: Answer) -> None:
        """Lets the step go on when the copies have ended, and what the CPU has computed is there."""
        self.tiers.balance(answer)
        self._sent_LS[:] = self.tiers.tables.said
        nbytes, value = (self._sent.nbytes, 2) if answer.cpu else (self._table_bytes, 1)
        move = Move(self._brought.data_ptr(), self._sent.data_ptr(), nbytes)
        self.tiers.bus.answer(answer.tickets, [move], self.answers_L.data_ptr() + 4 * layer, value)

    def let_go(self) -> None:
        """Lets it go on wherever it may come to wait: something has failed."""
        with torch.cuda.stream(self._aside):  # not by the bus, which may be what has failed
            self.answers_L.copy_(self._ones_L, non_blocking=True)

    def take_back(self) -> None:
        """Nothing is answered; no step runs."""
        self.answers_L.zero_()
