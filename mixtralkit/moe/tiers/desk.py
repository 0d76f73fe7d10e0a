"""A decode step that runs as one graph while the host answers for the experts that are not on the GPU.

::

    GPU    router 0 │ experts here │ router 1 │ experts here ┄ waits ┄ late ones, sum │ router 2 …
    host            └► notes       │          └► copies, product on the CPU ─┘

Each layer's choices go to memory of the host. Where all of them are on the GPU the step runs on, and the host only
counts. Where one is missing the step waits, behind the product of those that are there, for a word in its own memory.
The bus brings that word behind the experts and behind what the CPU has computed, so the host waits for no copy, and no
kernel reads memory of the host, which takes long while the bus is busy.

**What the host may change, and when.** A step reads at each layer a line of the table of places. The host changes it
before a step is launched and while one waits, and lets experts of other layers go only then: no layer that has read its
line is running but the one that waits, whose experts stay. Of a layer that has run experts may go at once, since its
line is read again by the next step. So what a line said still holds when its layer's products run.

**No step waits for ever.** While one waits the host launches nothing that would come behind it, takes no memory and
waits for nothing. Whatever fails there, the step is let go on before anybody is told.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.tiers.memory import Move

if TYPE_CHECKING:
    from mixtralkit.moe.tiers.tiers import Tiers

POLLS = 1 << 14  # between two looks at whether the device still runs


class Desk:
    """What GPU and host hand each other in steps of so many rows: T of width D, N = T · K choices."""

    def __init__(self, tiers: Tiers, rows: int) -> None:
        config, device, dtype = tiers.layout.config, tiers.context.device, tiers.dtype
        layers, choices, width = config.n_layers, rows * config.num_experts_per_tok, config.dim
        slots, cuda = tiers.shown_LS.shape[1], device.type == "cuda"
        self.tiers = tiers
        # what comes ahead takes places of layers that have run, so the host must know how far the step is
        self.always = (tiers.guesses and bool(tiers.routers)) or tiers.is_sure(rows)

        def on_host(*shape: int, dtype: torch.dtype = torch.int64, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, pin_memory=cuda)

        self._asked_LN, self._guesses_N = on_host(layers, choices), on_host(choices, fill=-1)
        self._weights_N, self._x_TD = on_host(choices, dtype=torch.float32), on_host(rows, width, dtype=dtype)
        self._told_L, self._answers_L = (on_host(layers, dtype=torch.int32) for _ in range(2))
        self.asked_LN, self.guesses_N, self.told_L, self.answers_L = (
            t.numpy() for t in (self._asked_LN, self._guesses_N, self._told_L, self._answers_L)
        )
        self._x_ND = self._x_TD.unsqueeze(1).expand(rows, choices // rows, width)
        places = min(choices, slots)
        sizes = (8 * choices, 8 * places, 4 * choices * width)
        self._sent, self._brought = (
            on_host(sum(sizes), dtype=torch.uint8),
            torch.zeros(sum(sizes), dtype=torch.uint8, device=device),
        )
        sent, brought = (
            (late.view(torch.int64), at.view(torch.int64), cpu.view(torch.float32).view(choices, width))
            for late, at, cpu in (memory.split(sizes) for memory in (self._sent, self._brought))
        )
        self.late_N, self.late_places_P, self._cpu_ND = sent[0].numpy(), sent[1].numpy(), sent[2]
        self._late_N, self._late_places_P, self._cpu_on_gpu_ND = brought

        def on_device(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._here_N1, self._late_N1 = on_device(choices, 1), on_device(choices, 1)
        self._places_S, self._places_P = on_device(slots), on_device(places)
        self._waits_2, self._fence = on_device(2, dtype=torch.int32), on_device(1, dtype=torch.int32)
        self._heard_L = on_device(layers, dtype=torch.int32)
        self._go_on = torch.ones_like(self._answers_L, pin_memory=cuda)
        self._aside, self._launched = (torch.cuda.Stream(device), torch.cuda.Event()) if cuda else (None, None)
        self._failed = False

    # the device's part

    def run(self, layer: int, rows: RoutedRows, guessed_TK: torch.Tensor | None) -> torch.Tensor:
        """``TieredExperts.forward`` of a layer, launched without a word of the host's."""
        from mixtralkit.ops.desk.triton import add_answers, ask_host, wait_for_host

        tiers, (count, top_k) = self.tiers, rows.slots_RK.shape
        x_RD, weights_N1 = rows.x_RD.contiguous(), rows.weights_RK.reshape(-1, 1)
        ask_host(
            rows.slots_RK.reshape(-1), weights_N1, x_RD, None if guessed_TK is None else guessed_TK.reshape(-1),
            tiers.shown_LS, self._here_N1, self._places_S, self._waits_2, self._asked_LN, self._guesses_N,
            self._weights_N, self._x_TD, self._told_L, self._fence, layer, self.always,
        )  # fmt: skip
        x_ND = x_RD.unsqueeze(1).expand(count, top_k, x_RD.shape[1]).reshape(count * top_k, -1)
        here_ND = tiers.product(layer, x_ND, self._here_N1, weights_N1, self._places_S[: tiers.slots[layer]])
        wait_for_host(
            self._waits_2, self._heard_L, self._late_N, self._late_places_P, self._late_N1, self._places_P,
            self._fence, layer,
        )  # fmt: skip
        late_ND = tiers.product(layer, x_ND, self._late_N1, weights_N1, self._places_P)
        out_RD = torch.empty_like(x_RD) if rows.out_RD is None else rows.out_RD
        residual_RD = None if rows.residual_RD is None else rows.residual_RD.contiguous()
        return add_answers(here_ND, late_ND, self._cpu_on_gpu_ND, self._waits_2, residual_RD, out_RD)

    # the host's

    def open(self) -> None:
        """Before a step is launched."""
        if self._failed:
            if self.tiers.context.device.type == "cuda":
                torch.cuda.synchronize(self.tiers.context.device)
            self._heard_L.zero_()
            self.told_L[:], self._failed = 0, False
        self.tiers.warm_up()
        self.tiers.take_in()
        self.tiers.show()
        self.tiers.wait_for_table()

    def serve(self) -> None:
        """Answers for every layer of a step that has been launched.

        Raises:
            RuntimeError: a copy or the device has failed; the step ends with other numbers.
        """
        if self._launched is not None:
            self._launched.record()
        try:
            for layer in self.tiers.layers:
                self._serve(layer)
        except BaseException:
            self._failed = True
            with contextlib.nullcontext() if self._aside is None else torch.cuda.stream(self._aside):
                self._heard_L.copy_(self._go_on, non_blocking=True)
            raise

    def _serve(self, layer: int) -> None:
        tiers = self.tiers
        waits = self._listen(layer)
        slots = self.asked_LN[layer].tolist()
        tiers.begin(layer)
        rows_S = np.bincount([slot for slot in slots if slot >= 0], minlength=tiers.slots[layer])
        answer = tiers.ask(layer, rows_S)
        if not waits:
            assert not answer.late, "the step has run on without"
            assert not answer.cpu
            return
        if answer.cpu:
            on_cpu_N = np.array([slot if slot in answer.cpu else -1 for slot in slots])
            given = (self._x_ND.reshape(len(slots), -1), on_cpu_N, self._weights_N.view(-1, 1), answer.first)
            tiers.product_on_cpu(layer, *given, self._cpu_ND)
        tiers.balance(answer)
        if self.always:
            tiers.look_ahead(layer, rows_S, self.guesses_N)
        here_S, places_S = tiers.shown[layer].tolist(), tiers.places_of(layer).tolist()
        late = [*answer.late, *(slot for slot in answer.here if here_S[slot] < 0)]  # or come since the line was read
        self.late_places_P[: len(late)] = [places_S[slot] for slot in late]
        self.late_N[:] = [late.index(slot) if slot in late else -1 for slot in slots]
        tiers.show()
        self._answer(layer, bool(answer.cpu))
        if not self.always:
            tiers.look_ahead(layer, rows_S)

    def _answer(self, layer: int, by_cpu: bool) -> None:
        """The word that lets the step go on, behind all that it needs."""
        self.answers_L[layer] = 1 + by_cpu
        size = self._sent.nbytes if by_cpu else self._sent.nbytes - self._cpu_ND.nbytes
        word = (memory.data_ptr() + 4 * layer for memory in (self._heard_L, self._answers_L))
        self.tiers.send([Move(self._brought.data_ptr(), self._sent.data_ptr(), size), Move(*word, 4)])

    def _listen(self, layer: int) -> bool:
        """Until the step has told of a layer; whether it waits."""
        polls = 0
        while not self.told_L[layer]:
            self.tiers.pump()
            polls += 1
            if polls % POLLS == 0 and self._launched is not None and self._launched.query() and not self.told_L[layer]:
                raise RuntimeError(f"the step ended before its layer {layer} told the host what it needs")
        waits = self.told_L[layer] == 2
        self.told_L[layer] = 0
        return waits
