"""One decode step as a straight line of kernels: static shapes, nothing that waits for the host.

The same sums as ``Transformer.step`` for one token a sequence, written out so that a CUDA graph can hold the whole
step. Where rows are on every rank (attention ``tp``) sums cross the ranks; where each rank has its own (attention
``dp`` with experts ``ep``) rows do, through each other's memory. On a CPU every call below is its plain twin, which is
how the tests compare this with ``Transformer.step``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.layout import RankLayout
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.transformer import Block, Transformer
from mixtralkit.moe.gate import Routing
from mixtralkit.ops.attention import decode_attention
from mixtralkit.ops.experts import expert_sum
from mixtralkit.ops.gate import gate
from mixtralkit.ops.linear import linear
from mixtralkit.ops.norm import rms_norm
from mixtralkit.ops.symmetric_exchange import MOST_RANKS, ExpertPlaces
from mixtralkit.planning.replicas import is_small, one_holder


@dataclass(frozen=True)
class Decoded:
    """What a decode step gives: float32 logits [B, V of this rank] and every layer's routing."""

    logits_BV: torch.Tensor
    routings: list[Routing]


class Decoder:
    """A model's decode step for any set of sequences at any positions, one token each.

    Collective over several ranks: under ``tp`` all run the same rows, under ``dp`` each its own, in the same number.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache, self.layout = model, cache, model.layout
        self._relocations = model.relocations
        # where each layer's experts are: slots_TE of this rank if rows are on every rank, places_EC if they travel;
        # for steps of many rows and of few (planning.replicas.is_small)
        layers = range(model.params.n_layers)
        self.tables = {few: [self._table(layer, few) for layer in layers] for few in (False, True)}

    @classmethod
    def for_model(cls, model: Transformer, cache: KVCache) -> Decoder | None:
        """None where a step cannot be written so, see ``serves``. Collective."""
        return cls(model, cache) if cls.serves(model, cache) else None

    @staticmethod
    def serves(model: Transformer, cache: KVCache) -> bool:
        """False where the model's options need ``Transformer.step``: exact exchanges, capacities, copies in flight.

        Collective.
        """
        layout, alone = model.layout, model.context.world_size == 1
        plain = (
            (layout.parallel.attention == "dp" and not alone and not _rows_can_travel(model, cache))
            or (layout.plan.cold_capacity_factor is not None and layout.parallel.experts == "ep" and not alone)
            or model.options.backend != "mixtralkit"
            or model.shadow_cache is not None
            or model.two_phase is not None
            or any(p.requires_grad for p in model.parameters())
        )
        return not plain

    def follow(self) -> bool:
        """Goes over to the model's plan as it is now, between two steps.

        True where everything that a step reads is still at its address and of its shape, so that a CUDA graph of a
        step may be replayed; the same on every rank.
        """
        model = self.model
        before_LWE, now_LWE = self.layout.plan.slot_of_LWE, model.layout.plan.slot_of_LWE
        stays = self._relocations == model.relocations
        changed = np.flatnonzero((before_LWE != now_LWE).any((1, 2))).tolist()
        for layer, few in itertools.product(changed, self.tables):
            old, new = self.tables[few][layer], self._table(layer, few)
            if old is not None and new is not None and old.shape == new.shape:
                old.copy_(new)
            else:
                self.tables[few][layer], stays = new, False
        self.layout, self._relocations = model.layout, model.relocations
        return stays

    def _table(self, layer: int, few: bool) -> torch.Tensor | None:
        layout, context = self.model.layout, self.model.context
        if self.model.peers is None:
            return _slots_in_turn(layout, layer, self.cache.slots, context.device, few)
        slots_WE = layout.plan.slot_of_LWE[layer]
        places = ExpertPlaces.of(one_holder(slots_WE) if few else slots_WE, context.rank, context.device)
        if context.world_size > MOST_RANKS:  # a CPU's: no graph is there to need it, and the table would be large
            return places.places_EC
        # turns of up to W - 1 replicas elsewhere, so that every plan's table has the same shape
        turns = math.lcm(*range(1, context.world_size))
        return places.places_EC.repeat(1, turns // places.places_EC.shape[1])

    @torch.no_grad()
    def __call__(self, tokens_B: torch.Tensor, positions_B: torch.Tensor, slots_B: torch.Tensor) -> Decoded:
        """Extends the cache by one token a sequence; logits of what follows it.

        Args:
            tokens_B, positions_B: int64, each sequence's token and its position.
            slots_B: int64 place of each sequence in the cache, -1 for a row that only fills the shape.
        """
        model = self.model
        eps, routings, x_BD = model.params.norm_eps, [], model.tok_embeddings(tokens_B)
        if model.context.world_size == 1:
            for layer, block in enumerate(model.layers):
                x_BD, routing = self._whole_block(layer, block, x_BD, positions_B, slots_B)
                routings.append(routing)
            norm = (model.norm.weight, eps)
            return Decoded(linear(x_BD, model.output.weight, norm=norm, out_dtype=torch.float32), routings)
        run_block = self._split_block if model.peers is None else self._travelling_block
        norms = [*(block.attention_norm.weight for block in model.layers), model.norm.weight]
        normed_BD = rms_norm(x_BD, norms[0], eps)
        for layer, block in enumerate(model.layers):
            x_BD, normed_BD, routing = run_block(layer, block, x_BD, normed_BD, positions_B, slots_B, norms[layer + 1])
            routings.append(routing)
        return Decoded(linear(normed_BD, model.output.weight, out_dtype=torch.float32), routings)

    def _whole_block(self, layer: int, block: Block, x_BD, positions_B, slots_B) -> tuple[torch.Tensor, Routing]:
        """A block whose weights are all here: norms inside the products that follow, residuals inside those before."""
        attention, experts, eps = block.attention, block.feed_forward.experts, self.model.params.norm_eps
        qkv_BP = linear(x_BD, attention.wqkv.weight, norm=(block.attention_norm.weight, eps))
        out_BP = self._attend(layer, block, qkv_BP, positions_B, slots_B)
        x_BD = linear(out_BP, attention.wo.weight, residual_TO=x_BD, out=x_BD)
        normed_BD, routing = self._route(block, x_BD, (block.ffn_norm.weight, eps))
        slots_BK = self._slots(layer, routing.experts_TK)
        return expert_sum(normed_BD, slots_BK, routing.weights_TK, experts.w13, experts.w2, x_BD), routing

    def _split_block(
        self, layer: int, block: Block, x_BD, normed_BD, positions_B, slots_B, following_D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """A block of which every rank has a part: each half ends in a sum over the ranks, fused with what follows."""
        attention, experts, eps = block.attention, block.feed_forward.experts, self.model.params.norm_eps
        sums = self.model.sums
        qkv_BP = linear(normed_BD, attention.wqkv.weight)
        out_BP = self._attend(layer, block, qkv_BP, positions_B, slots_B)
        part_BD = linear(out_BP, attention.wo.weight)
        x_BD, normed_BD = sums.add_norm(part_BD, x_BD, block.ffn_norm.weight, eps)
        normed_BD, routing = self._route(block, normed_BD, None)
        slots_BK = self._slots(layer, routing.experts_TK)
        part_BD = expert_sum(normed_BD, slots_BK, routing.weights_TK, experts.w13, experts.w2)
        return *sums.add_norm(part_BD, x_BD, following_D, eps), routing

    def _travelling_block(
        self, layer: int, block: Block, x_BD, normed_BD, positions_B, slots_B, following_D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """A block with whole attention and some of the experts: rows go to theirs, of whichever rank, and back."""
        attention, experts, eps = block.attention, block.feed_forward.experts, self.model.params.norm_eps
        peers, rows = self.model.peers, len(x_BD)
        qkv_BP = linear(normed_BD, attention.wqkv.weight)
        out_BP = self._attend(layer, block, qkv_BP, positions_B, slots_B)
        x_BD = linear(out_BP, attention.wo.weight, residual_TO=x_BD, out=x_BD)
        normed_BD, routing = self._route(block, x_BD, (block.ffn_norm.weight, eps))
        # rows that only fill the shape, with slot -1, go nowhere: no expert is read for them
        places, kept_B = ExpertPlaces(self._tables_for(rows * peers.context.world_size)[layer]), slots_B
        arrived = peers.dispatch(normed_BD, routing.experts_TK, routing.weights_TK, places, rows, kept_B)
        y_RD = expert_sum(
            arrived.x_RD, arrived.slots_RK, arrived.weights_RK, experts.w13, experts.w2,
            out_RD=peers.sum_buffer(rows), likely_rows=rows,
        )  # fmt: skip
        return *peers.combine(y_RD, arrived.members_T, x_BD, (following_D, eps)), routing

    def _attend(self, layer: int, block: Block, qkv_BP, positions_B, slots_B) -> torch.Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        heads, window = block.attention.heads, self.model.params.sliding_window
        return decode_attention(qkv_BP, keys, values, slots_B, positions_B, self.cache.rope_SC, heads, window)

    def _route(self, block: Block, x_BD, norm: tuple[torch.Tensor, float] | None) -> tuple[torch.Tensor, Routing]:
        choice = block.feed_forward.gate
        gated = gate(x_BD, choice.weight, choice.top_k, norm)
        return gated.normed_TD, Routing(gated.experts_TK, gated.weights_TK, gated.logits_TE)

    def _tables_for(self, rows: int) -> list[torch.Tensor | None]:
        """Of every layer, for a step of so many rows of all ranks."""
        params = self.model.params
        return self.tables[is_small(rows, params.num_experts_per_tok, params.num_experts)]

    def _slots(self, layer: int, experts_BK: torch.Tensor) -> torch.Tensor:
        slots_TE = self._tables_for(len(experts_BK))[layer]
        return experts_BK if slots_TE is None else slots_TE[: experts_BK.shape[0]].gather(1, experts_BK)


def _rows_can_travel(model: Transformer, cache: KVCache) -> bool:
    """Whether a step of all the cache's sequences has room in the exchange, and on GPUs memory that they all reach.

    The twin takes every row and sum to every rank, which plain steps' collectives do not.
    """
    peers = model.peers
    if peers is None or peers.max_rows < cache.slots:
        return False
    return peers.memory is not None or model.context.device.type == "cpu"


def _slots_in_turn(
    layout: RankLayout, layer: int, rows: int, device: torch.device, few: bool = False
) -> torch.Tensor | None:
    """This rank's slot for each expert by row, -1 where the row's turn is another replica's: int64 [T, E].

    None where slots are the experts themselves. Replicas of an expert take turns by row; for ``few`` rows one of them
    takes all.
    """
    if layout.parallel.experts == "tp":
        return None
    slots_WE = layout.plan.slot_of_LWE[layer]
    slots_WE = one_holder(slots_WE) if few else slots_WE
    holds_WE = slots_WE >= 0
    if layout.world_size == 1 and (slots_WE[0] == np.arange(slots_WE.shape[1])).all():
        return None
    earlier_E, copies_E = holds_WE[: layout.rank].sum(0), holds_WE.sum(0)
    turn_TE = np.arange(rows)[:, None] % copies_E
    mine_TE = holds_WE[layout.rank] & (turn_TE == earlier_E)
    return torch.tensor(np.where(mine_TE, slots_WE[layout.rank], -1), dtype=torch.int64, device=device)
