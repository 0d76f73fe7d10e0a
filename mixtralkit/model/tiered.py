"""A decode step of a model with experts in host memory, on one rank: pieces that are captured, the host between them.

::

    GPU    router 0 │ experts here ──────────│ late ones, sum │ router 1 │ experts here │ …
    host            └► ask, copies, product ─┘                └► ask …

The host learns a layer's choices while the GPU computes those of its experts that are there. A piece reads what the
host says from memory that stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixtralkit.model.batch import ForwardBatch
from mixtralkit.moe.layer import MoEReport
from mixtralkit.moe.router import Routing
from mixtralkit.moe.tiers.parts import add_parts, only
from mixtralkit.ops.hidden import Hidden

if TYPE_CHECKING:
    from mixtralkit.model.transformer import Transformer


class Desk:
    """What GPU and host hand each other in steps of so many rows: T rows of width D, N = T · K choices.

    Attributes:
        slots_N, weights_N1, x_TD: of a layer's rows, on the host once the router has run.
        guessed_N: experts that the next layer is expected to choose, -1 where nobody guesses.
        cpu_ND: what the CPU has computed; ``cpu_on_gpu_ND`` takes it.
        late_N, places_S: choices of experts that were brought for this layer, -1 for others; and where these are.
    """

    def __init__(self, rows: int, top_k: int, width: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        choices, cuda = rows * top_k, device.type == "cuda"
        sizes = (8 * choices, 8 * choices, 4 * choices, rows * width * dtype.itemsize)
        self.asked = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=cuda)
        slots_N, guessed_N, weights_N, x_TD = self.asked.split(sizes)
        self.slots_N, self.guessed_N = (ids_N.view(torch.int64).numpy() for ids_N in (slots_N, guessed_N))
        self.weights_N1, self.x_TD = weights_N.view(torch.float32).view(-1, 1), x_TD.view(dtype).view(rows, width)
        self.x_ND = self.x_TD.unsqueeze(1).expand(rows, top_k, width)
        self.cpu_ND = torch.zeros(choices, width, pin_memory=cuda)
        self.cpu_on_gpu_ND = torch.zeros(choices, width, device=device)
        self._late = torch.full((choices + slots,), -1, dtype=torch.int64, pin_memory=cuda)
        self.late_on_gpu = torch.zeros(choices + slots, dtype=torch.int64, device=device)
        self.late_N, self.places_S = self._late[:choices].numpy(), self._late[choices:].numpy()
        self._unguessed = torch.full((choices,), -1, dtype=torch.int64, device=device)
        self.done = torch.cuda.Event() if cuda else None

    def publish(
        self, slots_TK: torch.Tensor, guessed_TK: torch.Tensor | None, weights_TK: torch.Tensor, x_TD: torch.Tensor
    ) -> None:
        """From the device to the host, in stream order."""
        guessed_TK = self._unguessed if guessed_TK is None else guessed_TK
        parts = [values.reshape(-1).view(torch.uint8) for values in (slots_TK, guessed_TK, weights_TK, x_TD)]
        self.asked.copy_(torch.cat(parts), non_blocking=True)

    def take_late(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``late_N`` [N, 1] and ``places_S`` on the device, as they are when this runs."""
        self.late_on_gpu.copy_(self._late, non_blocking=True)
        choices = len(self.late_N)
        return self.late_on_gpu[:choices].view(-1, 1), self.late_on_gpu[choices:]

    def take_cpu(self) -> torch.Tensor:
        """``cpu_ND`` on the device, as it is when this runs."""
        return self.cpu_on_gpu_ND.copy_(self.cpu_ND, non_blocking=True)


Capture = Callable[[tuple, Callable[[], object]], object]


def run_tiered(model: Transformer, batch: ForwardBatch, desk: Desk, capture: Capture) -> tuple[Hidden, list[MoEReport]]:
    """``Transformer.hidden`` of a decode step.

    Args:
        capture: runs a piece, by a key that is one for each that differs; what it returns stays where it is.
    """
    tiers, reports, norms = model.store.tiers, [], [block.attention_norm for block in model.layers]
    hidden = Hidden(None)
    for layer, block in enumerate(model.layers):
        moe, following = block.feed_forward, [*norms, model.norm][layer + 1].of
        tiers.begin(layer)
        tiers.tell(layer)

        def route(block=block, moe=moe, before=hidden, layer=layer) -> tuple[Routing, torch.Tensor, Hidden]:
            if layer == 0:
                before = Hidden(model.tok_embeddings(batch.tokens_T), None, norms[0].of)
            routing, routed = moe.gate(block.attention(before, batch, None, block.ffn_norm.of, None))
            slots_TK = routing.experts_TK if moe.table.is_identity else moe.table.own_slots(routing.experts_TK, True)
            slots_TK = slots_TK.masked_fill((batch.slots_T < 0)[:, None], -1)
            tiers.guess(layer, routed)
            desk.publish(slots_TK, tiers.take_guess(), routing.weights_TK, routed.normed_TD)
            return routing, slots_TK, routed

        routing, slots_TK, routed = capture((layer, "route"), route)
        if desk.done is not None:
            desk.done.record()
        x_TD, weights_N1 = routed.x_TD, routing.weights_TK.view(-1, 1)

        def compute(layer=layer, slots_TK=slots_TK, routed=routed, weights_N1=weights_N1):
            slots_N1 = slots_TK.reshape(-1, 1)
            here_N1 = tiers.here_LS[layer][slots_N1.clamp(min=0)]
            x_ND = routed.normed_TD.repeat_interleave(slots_TK.shape[1], 0)
            return x_ND, tiers.product(layer, x_ND, slots_N1.masked_fill(~here_N1, -1), weights_N1)

        x_ND, here_ND = capture((layer, "here"), compute)
        if desk.done is not None:
            tiers.wait_for(desk.done)
        slots_N = desk.slots_N
        rows_S = np.bincount(slots_N[slots_N >= 0], minlength=tiers.slots[layer])
        answer = tiers.ask(layer, rows_S)
        on_cpu_N1 = only(slots_N, answer.cpu) if answer.cpu else None
        if answer.cpu:
            given = (desk.x_ND.reshape(len(slots_N), -1), on_cpu_N1, desk.weights_N1, answer.first, desk.cpu_ND)
            tiers.product_on_cpu(layer, *given)
        if answer.late:
            late_N1 = on_cpu_N1 if answer.late == answer.cpu else only(slots_N, answer.late)
            desk.late_N[:] = late_N1[:, 0]
            desk.places_S[: tiers.slots[layer]] = tiers.places_of(layer)
            tiers.wait(answer)

        def add(
            answer=answer, layer=layer, x_TD=x_TD, x_ND=x_ND, here_ND=here_ND, weights_N1=weights_N1
        ) -> torch.Tensor:
            parts, top_k = [here_ND], len(x_ND) // len(x_TD)
            if answer.cpu:
                parts.append(desk.take_cpu())
            if answer.late:
                late_N1, places_S = desk.take_late()
                parts.append(tiers.product(layer, x_ND, late_N1, weights_N1, places_S[: tiers.slots[layer]]))
            return add_parts(parts, top_k, x_TD, x_TD.dtype, x_TD)

        capture((layer, "sum", bool(answer.cpu), bool(answer.late)), add)
        hidden = Hidden(x_TD, None, following)
        tiers.look_ahead(layer, rows_S, desk.guessed_N)
        none = moe.nothing
        reports.append(MoEReport(routing, none, none, (None,)))
    return hidden, reports
