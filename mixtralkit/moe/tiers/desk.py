"""A decode step that runs as one graph while the host answers for the experts that are not on the GPU.

::

    GPU    router 0 │ experts 0 │ router 1 ┄ waits ┄ experts 1 │ router 2 …
    host                        └► copies, product on the CPU, answer │ notes

Each layer looks its choices up in a table in the GPU's memory. Where all are there it runs on, and leaves its choices
in memory of the host, which reads them later. Where one is missing it tells the host and waits until that says where
the experts are; what the CPU computed is added to the residual. Either way one product follows. The last layer tells
in any case, so that the host knows of the step's end before it.

**What the host may change, and when.** The table changes before a step is launched and, with an answer, while one
waits: then all layers before are done, and the one that waits takes its places from the answer. In between, what the
table shows is there: behind an answer the host lets go only experts of the layer that it has answered, and they are not
in use. That layer's line is read again in the next step, in front of which the table is shown. Where a layer has less
than its share of places, experts of others make way in front of the answer. Where every layer waits (``always``),
answers alone say what is where, and what makes way is of any layer.

**No step waits for ever.** While one waits the host launches nothing that would come behind it, takes no memory and
waits for nothing. Whatever fails there, the step is let go on before anybody is told.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.tiers.answers import BusAnswer
from mixtralkit.moe.tiers.setup import Answer
from mixtralkit.ops.experts import expert_sum

if TYPE_CHECKING:
    from mixtralkit.moe.tiers.tiers import Tiers

POLLS = 1 << 14  # between two looks at whether the device still runs


class Desk:
    """What GPU and host hand each other in steps of so many rows."""

    def __init__(self, tiers: Tiers, rows: int) -> None:
        from mixtralkit.ops.desk.triton import DeskMemory

        config, device = tiers.layout.config, tiers.context.device
        (layers, slots), (top_k, width) = tiers.tables.table_LS.shape, (config.num_experts_per_tok, config.dim)
        cuda = device.type == "cuda"
        self.tiers = tiers
        # what comes ahead takes places of layers that have run, so the host must know how far the step is
        self.always = (tiers.guesses and bool(tiers.routers)) or tiers.is_sure(rows)

        def on_host(*shape: int, dtype: torch.dtype = torch.int64, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, pin_memory=cuda)

        def on_device(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.answer = answer = BusAnswer(tiers, rows)
        self.memory = of = DeskMemory(
            on_host(layers, rows, top_k), on_host(rows, width, dtype=tiers.dtype),
            on_host(rows, top_k, dtype=torch.float32), on_host(rows, top_k, fill=-1), on_host(1, dtype=torch.int32),
            answer.said_LS, answer.cpu_TD, answer.answers_L, tiers.tables.table_LS, on_device(rows, top_k),
            on_device(slots), on_device(rows, width, dtype=torch.float32), on_device(3, dtype=torch.int32),
        )  # fmt: skip
        self._asked_LN, self._guesses_N = of.asked_LTK.flatten(1).numpy(), of.guesses_TK.flatten().numpy()
        self.told_1, self._on_cpu_TK = of.told_1.numpy(), torch.full((rows, top_k), -1)
        self._on_cpu_N = self._on_cpu_TK.flatten().numpy()
        self._products: dict[int, Callable[[int | None], None] | None] = {}  # by layer
        self._launched, self._fence = torch.cuda.Event() if cuda else None, on_device(1)

    # the device's part

    def run(self, layer: int, rows: RoutedRows, guessed_TK: torch.Tensor | None) -> torch.Tensor:
        """``TieredExperts.forward`` of a layer, launched without a word of the host's."""
        from mixtralkit.ops.desk.triton import ask_host

        tiers, of = self.tiers, self.memory
        layers, x_TD, residual_TD = tiers.layers, rows.x_RD.contiguous(), rows.residual_RD
        if residual_TD is not None:
            residual_TD = residual_TD.contiguous()
        weights_TK = rows.weights_RK.contiguous()
        ask_host(
            rows.slots_RK.contiguous(), weights_TK, x_TD, residual_TD, guessed_TK, of, layer,
            layers[layers.index(layer) - 1], layer == layers[-1], self.always,
        )  # fmt: skip
        # A launch that the product's kernels do not overlap with: where they start, L1 holds nothing of the experts
        # that lay in the places before.
        self._fence.zero_()
        slots = tiers.slots[layer]
        return expert_sum(
            x_TD, of.slots_TK, weights_TK, *tiers.matrices, of.residual_TD, rows.out_RD, rows.likely_rows,
            of.places_S[:slots], slots,
        )  # fmt: skip

    # the host's

    def open(self) -> None:
        """Before a step is launched."""
        self.tiers.warm_up()
        self.tiers.take_in()
        self.tiers.tables.show()

    def serve(self) -> None:
        """Answers for every layer of a step that has been launched.

        Raises:
            RuntimeError: a copy or the device has failed; the step ends with other numbers.
        """
        if self._launched is not None:
            self._launched.record()
        layers, at = self.tiers.layers, 0
        self.tiers.next_step()
        try:
            while at < len(layers):
                layer, waits = self._listen()
                until = layers.index(layer)
                if waits:
                    self._serve(layer, layers[at:until])
                else:
                    self._note(layers[at : until + 1])
                at = until + 1
        except BaseException:
            self.answer.let_go()
            with contextlib.suppress(RuntimeError):  # of the device, where that is what has failed
                while self._launched is not None and not self._launched.query():
                    time.sleep(0)  # until the step has ended, which writes to this desk's memory
                self.answer.take_back()
            self.told_1[:] = 0
            self.tiers.tables.unshow()
            raise

    def _serve(self, layer: int, before: list[int]) -> None:
        """A layer waits: what it needs and nothing else, then the notes, also of those that ran on before it."""
        tiers, slots = self.tiers, self._asked_LN[layer].tolist()
        rows = {slot: slots.count(slot) for slot in slots if slot >= 0}
        answer = tiers.ask(layer, rows)
        if answer.cpu:
            self._on_cpu_N[:] = [slot if slot in answer.cpu else -1 for slot in slots]
            self._compute(layer, answer)
        takes_more = not self.always and tiers.cache.lacks(layer)
        if takes_more:
            tiers.look_ahead(layer, rows)
        tiers.tables.say(layer, answer)
        self.answer.give(layer, answer)
        self._note(before)
        if not takes_more:
            tiers.look_ahead(layer, rows, self._guesses_N)
        tiers.take_in()

    def _compute(self, layer: int, answer: Answer) -> None:
        """The CPU's part of a layer."""
        tiers, of = self.tiers, self.memory
        given = (of.x_TD, self._on_cpu_TK, of.weights_TK)
        if layer not in self._products:
            self._products[layer] = tiers.product_call(layer, *given, self.answer.computed_TD)
        if self._products[layer] is None:
            tiers.product_on_cpu(layer, *given, answer.first, self.answer.computed_TD)
        else:
            tiers.compute(layer, self._products[layer], answer)

    def _note(self, layers: list[int]) -> None:
        """Layers that have found all they need."""
        for layer in layers:
            self.tiers.found(layer, {*self._asked_LN[layer].tolist()} - {-1})

    def _listen(self) -> tuple[int, bool]:
        """Until a layer tells; which, and whether it waits."""
        polls, told_1, pump = 0, self.told_1, self.tiers.pump
        while not told_1[0]:
            pump()
            polls += 1
            if polls % POLLS == 0 and self._launched is not None and self._launched.query() and not told_1[0]:
                raise RuntimeError("the step ended before its last layer told the host what it needs")
        told = int(told_1[0])
        told_1[0] = 0
        return told // 2 - 1, told % 2 == 1
