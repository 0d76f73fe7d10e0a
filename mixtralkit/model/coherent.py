"""A step with context-coherent routing: rows stay on the rank of their experts from layer to layer (ExFlow, §4.1).

Every rank keeps the keys and values of every sequence, so a row may be attended wherever it is. In decode a row starts
on some rank, moves once a layer, and what its layers added to the caches is told to all ranks at the step's end, with
the last rows. Prompts' rows attend to rows of the same step, so they stay with their sequence's rank for the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.model.batch import ForwardBatch, Span
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.moe.layer import MoEReport
from mixtralkit.moe.router import Routing
from mixtralkit.ops.attention import places
from mixtralkit.ops.hidden import Hidden

if TYPE_CHECKING:
    from mixtralkit.model.transformer import Transformer


def run_coherent(model: Transformer, batch: ForwardBatch) -> tuple[Hidden, list[MoEReport]]:
    """``Transformer.hidden`` where all ranks have the same batch and share its rows among them. Collective.

    The rows wanted come back on every rank, normalised; the reports too, in the batch's order, if it is observed.
    """
    context, first = model.context, model.layers[0].attention_norm.of
    own_N, seen = _first_rows(model, batch), []
    own = Hidden(model.tok_embeddings(batch.tokens_T[own_N]), None, first)
    if not batch.rows.decode:
        hidden, reports = model.through_blocks(own, _own_spans(model, batch, own_N), early=False, seen=seen.append)
    elif model.dispatchers.surroundings.symmetric:  # every rank has a place for each row
        mine_T = _mask(own_N, len(batch)) & (batch.slots_T >= 0)
        everywhere = Hidden(model.tok_embeddings(batch.tokens_T), None, first, valid_T=mine_T.long() - 1)
        hidden, reports = model.through_blocks(everywhere, batch, early=False, seen=seen.append)
    else:
        hidden, reports = model.through_blocks(replace(own, ids_T=own_N), batch, early=False, seen=seen.append)
    where_L = [_Where.of(rows, own_N, len(batch)) for rows in seen]
    _share_cache(context, batch.attend.cache, batch, where_L)
    normed_TD = _Where.of(hidden, own_N, len(batch)).of_all(hidden.normalised(), context)
    if batch.wanted_N is not None:
        normed_TD = normed_TD[batch.wanted_N]
    if batch.observed:
        reports = [_whole(report, where, context) for report, where in zip(reports, where_L, strict=True)]
    return Hidden(None, normed_TD), reports


@dataclass(frozen=True)
class _Where:
    """The rows of a batch that are on this rank: a mask, and their numbers where they stand by themselves."""

    mask_T: torch.Tensor
    rows_N: torch.Tensor | None

    @classmethod
    def of(cls, hidden: Hidden, own_N: torch.Tensor, size: int) -> _Where:
        """``own_N``: the numbers of rows that have not moved."""
        if hidden.valid_T is not None:
            return cls(hidden.valid_T >= 0, None)
        rows_N = own_N if hidden.ids_T is None else hidden.ids_T
        return cls(_mask(rows_N, size), rows_N)

    def of_all(self, values_N: torch.Tensor, context: RankContext) -> torch.Tensor:
        """Every rank's rows put together: each is on one rank, so a sum does it, to the bit."""
        if self.rows_N is None:
            there_T = self.mask_T.view(-1, *[1] * (values_N.dim() - 1))
            return context.all_reduce(values_N.masked_fill(~there_T, 0))
        whole = values_N.new_zeros(len(self.mask_T), *values_N.shape[1:])
        return context.all_reduce(whole.index_copy_(0, self.rows_N, values_N))


def _mask(rows_N: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool, device=rows_N.device).index_fill_(0, rows_N, True)


def _first_rows(model: Transformer, batch: ForwardBatch) -> torch.Tensor:
    """Where this rank's rows stand in the batch: an even share of a decode step's, else those of its own sequences."""
    context = model.context
    if batch.rows.decode:
        rows = torch.arange(len(batch), device=context.device)
        return rows.tensor_split(context.world_size)[context.rank]
    rows = [row for span in _deal(batch.spans, context)[context.rank] for row in range(span.start, span.stop)]
    return torch.tensor(rows, dtype=torch.int64).to(context.device)


def _deal(spans: tuple[Span, ...], context: RankContext) -> list[list[Span]]:
    """The sequences of a step by rank, each to the one with fewest tokens so far; the same on every rank."""
    dealt: list[list[Span]] = [[] for _ in range(context.world_size)]
    tokens = [0] * context.world_size
    for span in spans:
        rank = tokens.index(min(tokens))
        dealt[rank].append(span)
        tokens[rank] += span.stop - span.start
    return dealt


def _own_spans(model: Transformer, batch: ForwardBatch, own_N: torch.Tensor) -> ForwardBatch:
    """This rank's sequences of a step, as under attention ``dp``."""
    dealt = _deal(batch.spans, model.context)
    spans, start = [], 0
    for span in dealt[model.context.rank]:
        stop = start + span.stop - span.start
        spans.append(replace(span, start=start, stop=stop))
        start = stop
    most = max(sum(span.stop - span.start for span in of_rank) for of_rank in dealt)
    taken = replace(batch.take(own_N), spans=tuple(spans), wanted_N=None)
    taken = replace(taken, rows=replace(batch.rows, per_rank=most))
    return model.attend_to(taken, batch.attend.cache)


def _share_cache(context: RankContext, cache: KVCache, batch: ForwardBatch, where_L: list[_Where]) -> None:
    """Tells all ranks the keys and values that each layer's rows added where they were: one sum of all layers.

    A row that only fills the shape writes what the step's first sequence does, a step without any what was there.
    """
    if not len(batch):
        return
    is_row_T = batch.slots_T >= 0
    which_T = torch.where(is_row_T, torch.arange(len(batch), device=context.device), is_row_T.int().argmax())
    there = places(cache.keys[0], cache.tables_SM, batch.slots_T[which_T].clamp(min=0), batch.positions_T[which_T])
    memories = [memory for layer in range(len(where_L)) for memory in (cache.keys[layer], cache.values[layer])]
    found = [memory[there] for memory in memories]
    masks = [where.mask_T[which_T, None, None] for where in where_L for _ in range(2)]
    added = torch.stack([rows.masked_fill(~mask, 0) for rows, mask in zip(found, masks, strict=True)])
    context.all_reduce(added)
    for memory, rows, before in zip(memories, added, found, strict=True):
        memory[there] = torch.where(is_row_T.any(), rows, before)


def _whole(report: MoEReport, where: _Where, context: RankContext) -> MoEReport:
    routing = report.routing
    columns = (routing.experts_TK, routing.weights_TK, routing.logits_TE)
    whole = Routing(*(where.of_all(column, context) for column in columns))
    dropped, rerouted = context.all_reduce(torch.stack([report.dropped, report.rerouted]))
    return replace(report, routing=whole, dropped=dropped, rerouted=rerouted)
