"""A decode step that runs as one graph while the host answers for the experts that are not on the GPU.

::

    GPU    router 0 │ experts here │ router 1 │ experts here ┄ waits ┄ late ones, sum │ router 2 …
    host            └► notes       │          └► copies, product on the CPU ─┘

Each layer's choices go to memory of the host. Where all of them are on the GPU the step runs on, and the host only
counts. Where one is missing the step waits, behind the product of those that are there, until the host says that the
copies have ended and that what the CPU computed lies in memory which the GPU reads.

**What the host may change, and when.** A step reads at each layer the host's table of places. The host changes it, and
lets experts go, before a step is launched and while one waits: then no layer that has read its line is running but the
one that waits, whose experts stay. So what a line said still holds when its layer's products run.

**No step waits for ever.** While one waits the host launches nothing that would come behind it, takes no memory and
waits for nothing but copies. Whatever fails there, the step is let go on before anybody is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mixtralkit.moe.dispatch.base import RoutedRows

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
        self._cpu_ND = on_host(choices, width, dtype=torch.float32)
        self._late_N, self._late_places_P = on_host(choices), on_host(min(choices, slots))
        self._told_L, self._answers_L = (on_host(layers, dtype=torch.int32) for _ in range(2))
        self.asked_LN, self.guesses_N, self.late_N, self.late_places_P, self.told_L, self.answers_L = (
            t.numpy()
            for t in (
                self._asked_LN, self._guesses_N, self._late_N, self._late_places_P, self._told_L, self._answers_L
            )
        )  # fmt: skip
        self._x_ND = self._x_TD.unsqueeze(1).expand(rows, choices // rows, width)

        def on_device(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._here_N1, self._late_N1 = on_device(choices, 1), on_device(choices, 1)
        self._places_S, self._places_P = on_device(slots), on_device(len(self._late_places_P))
        self._waits_2, self._fence = on_device(2, dtype=torch.int32), on_device(1, dtype=torch.int32)
        self._launched = torch.cuda.Event() if cuda else None
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
            self._waits_2, self._answers_L, self._late_N, self._late_places_P, self._late_N1, self._places_P,
            self._fence, layer,
        )  # fmt: skip
        late_ND = tiers.product(layer, x_ND, self._late_N1, weights_N1, self._places_P)
        out_RD = torch.empty_like(x_RD) if rows.out_RD is None else rows.out_RD
        residual_RD = None if rows.residual_RD is None else rows.residual_RD.contiguous()
        return add_answers(here_ND, late_ND, self._cpu_ND, self._waits_2, residual_RD, out_RD)

    # the host's

    def open(self) -> None:
        """Before a step is launched."""
        if self._failed:
            if self.tiers.context.device.type == "cuda":
                torch.cuda.synchronize(self.tiers.context.device)
            self.told_L[:], self.answers_L[:], self._failed = 0, 0, False
        self.tiers.warm_up()
        self.tiers.take_in()
        self.tiers.show()

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
            self.late_N[:] = -1
            self.answers_L[:], self._failed = 1, True
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
        tiers.look_ahead(layer, rows_S, self.guesses_N)
        tiers.end(answer)
        here_S, places_S = tiers.shown[layer].tolist(), tiers.places_of(layer).tolist()
        late = [*answer.late, *(slot for slot in answer.here if here_S[slot] < 0)]  # or come since the line was read
        self.late_places_P[: len(late)] = [places_S[slot] for slot in late]
        self.late_N[:] = [late.index(slot) if slot in late else -1 for slot in slots]
        tiers.show()
        self.answers_L[layer] = 2 if answer.cpu else 1

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
