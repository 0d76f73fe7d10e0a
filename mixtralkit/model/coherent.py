"""A step with context-coherent routing: rows stay on the rank of their experts from layer to layer (ExFlow, §4.1).

Every rank keeps the keys and values of every sequence, so a row may be attended wherever it is. In decode a row starts
on some rank, moves once a layer, and what its layers added to the caches is told to all ranks at the step's end, with
the last rows. Prompts' rows attend to rows of the same step, so they stay with their sequence's rank for the step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mixtralkit.distributed import RankContext
from mixtralkit.model.batch import ForwardBatch, Span
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.moe.layer import MoEReport
from mixtralkit.moe.router import Routing
from mixtralkit.ops.hidden import Hidden

if TYPE_CHECKING:
    from mixtralkit.model.transformer import Transformer


def run_coherent(model: Transformer, batch: ForwardBatch) -> tuple[Hidden, list[MoEReport]]:
    """``Transformer.hidden`` where all ranks have the same batch and share its rows among them. Collective.

    The rows wanted come back on every rank, normalised; the reports too, in the batch's order, if it is observed.
    """
    own_N, where_L = _first_rows(model, batch), []
    if batch.rows.decode:
        view = batch
    else:
        view = _own_spans(model, batch, own_N)
    first = model.layers[0].attention_norm.of
    hidden = Hidden(model.tok_embeddings(batch.tokens_T[own_N]), None, first, own_N if batch.rows.decode else None)

    def seen(hidden: Hidden) -> None:
        where_L.append(own_N if hidden.ids_T is None else hidden.ids_T)

    hidden, reports = model.through_blocks(hidden, view, early=False, seen=seen)
    _share_cache(model.context, batch.attend.cache, batch, where_L)
    last_N = own_N if hidden.ids_T is None else hidden.ids_T
    normed_TD = _of_all(hidden.normalised(), last_N, len(batch), model.context)
    if batch.wanted_N is not None:
        normed_TD = normed_TD[batch.wanted_N]
    if batch.observed:
        reports = [_whole(r, n, len(batch), model.context) for r, n in zip(reports, where_L, strict=True)]
    return Hidden(None, normed_TD), reports


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


def _share_cache(context: RankContext, cache: KVCache, batch: ForwardBatch, where_L: list[torch.Tensor]) -> None:
    """Tells all ranks the keys and values that each layer's rows added where they were: one sum of all layers."""
    rows_T = (batch.slots_T >= 0).nonzero().squeeze(1)  # host sync
    slots_T, positions_T = batch.slots_T[rows_T], batch.positions_T[rows_T]
    shape = (len(where_L), 2, len(rows_T), *cache.keys.shape[2::2])
    added_L2TJC = cache.keys.new_zeros(shape)
    for layer, own_N in enumerate(where_L):
        mine_T = torch.zeros(len(batch), dtype=torch.bool, device=context.device).index_fill_(0, own_N, True)[rows_T]
        for number, memory in enumerate((cache.keys[layer], cache.values[layer])):
            added_L2TJC[layer, number, mine_T] = memory[slots_T[mine_T], :, positions_T[mine_T]]
    context.all_reduce(added_L2TJC)
    for layer in range(len(where_L)):
        for number, memory in enumerate((cache.keys[layer], cache.values[layer])):
            memory[slots_T, :, positions_T] = added_L2TJC[layer, number]


def _of_all(values_N: torch.Tensor, rows_N: torch.Tensor, size: int, context: RankContext) -> torch.Tensor:
    """Every rank's rows of a batch put together: each row is on one rank, so a sum does it, to the bit."""
    whole = values_N.new_zeros(size, *values_N.shape[1:])
    return context.all_reduce(whole.index_copy_(0, rows_N, values_N))


def _whole(report: MoEReport, rows_N: torch.Tensor, size: int, context: RankContext) -> MoEReport:
    routing = report.routing
    columns = (routing.experts_TK, routing.weights_TK, routing.logits_TE)
    whole = Routing(*(_of_all(column, rows_N, size, context) for column in columns))
    counts = torch.stack([report.dropped, report.rerouted])
    dropped, rerouted = context.all_reduce(counts)
    return replace(report, routing=whole, dropped=dropped, rerouted=rerouted)
