"""Grouped-query attention: projections of this rank's heads, and what they attend to (a cache, or themselves)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.batch import ForwardBatch, Span
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.projection import Projection
from mixtralkit.model.rope import rotate, rotations
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.attention import causal_window, decode_attention, rotate_and_store, split_heads
from mixtralkit.ops.hidden import Hidden, Norm
from mixtralkit.ops.linear import linear
from mixtralkit.ops.ragged_attention import ragged_attention, span_table

Attend = Callable[[int, torch.Tensor, ForwardBatch, tuple[int, int]], torch.Tensor]
"""(layer, qkv_TQ, batch, (H, J)) -> [T, H·C]; qkv_TQ holds query, key and value heads, none of them turned."""


class Attention(nn.Module):
    """Projects, attends, projects back to the residual stream."""

    def __init__(self, layer: int, layout: RankLayout, context: RankContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.is_split = layer, layout.parallel.attention == "tp" and context.world_size > 1
        self.heads = layout.heads[1] - layout.heads[0]
        self.kv_heads = layout.kv_heads[1] - layout.kv_heads[0]
        how = layout.attention_weights, dtype, context.device
        self.wqkv, self.wo = (Projection(*layout.projections[matrix], *how) for matrix in ("wqkv", "wo"))
        self.requires_grad_(False)

    def forward(
        self,
        hidden: Hidden,
        batch: ForwardBatch,
        sums: RowReducer | None,
        following: Norm,
        wanted_N: torch.Tensor | None,
    ) -> Hidden:
        """The stream behind attention. Of all rows keys and values are kept; only ``wanted_N`` go on, None for all.

        ``sums`` adds the ranks' parts, where each has some of the heads.
        """
        out_TO = batch.attend(self.layer, hidden.project(self.wqkv.matrix), batch, (self.heads, self.kv_heads))
        x_TD, more = hidden.x_TD, (hidden.ids_T, hidden.valid_T)
        if wanted_N is not None:
            out_TO, x_TD = out_TO[wanted_N], x_TD[wanted_N]
        if self.is_split:
            return Hidden(*sums.add_norm(linear(out_TO, self.wo.matrix), x_TD, *following), following, *more)
        out = None if torch.is_grad_enabled() else x_TD  # nobody needs the stream as it was
        x_TD = linear(out_TO, self.wo.matrix, residual_TO=x_TD, out=out)
        return Hidden(x_TD, None, following, *more)


class CachedAttention:
    """Attends to a KV cache, which it extends by the step's tokens first.

    Sequences with one token and sequences with several each take one call, whatever their lengths and positions.
    """

    is_cached = True

    def __init__(self, cache: KVCache, window: int | None, spans: Sequence[Span] = (), device=None) -> None:
        """``spans`` of the batch; none where every row is a sequence's one token."""
        assert max((span.end for span in spans), default=0) <= cache.max_seq_len
        self.cache, self.window = cache, window
        singles = [span for span in spans if span.stop - span.start == 1]
        longer = [span for span in spans if span.stop - span.start > 1]
        self._singles = _rows(singles, device) if longer else slice(None)
        self._ragged = _Ragged.of(longer, device) if longer else None
        self._has_singles = bool(singles) or not longer

    @classmethod
    def of_shape(
        cls, cache: KVCache, window: int | None, rows: int, tokens: int, spans_B4: torch.Tensor
    ) -> CachedAttention:
        """For so many rows with one token of a sequence each, and then tokens of others that only the device knows."""
        self = cls(cache, window)
        self._singles, self._has_singles = slice(rows), rows > 0
        self._ragged = _Ragged(slice(rows, rows + tokens), [(-1, 0, tokens)], spans_B4)
        return self

    def __call__(self, layer: int, qkv_TQ: torch.Tensor, batch: ForwardBatch, heads: tuple[int, int]) -> torch.Tensor:
        cache, window = self.cache, self.window
        memory = (cache.keys[layer], cache.values[layer], cache.tables_SM)
        if self._ragged is None:
            return self._decode(qkv_TQ, batch, memory, heads[0], slice(None))
        rows, spans, spans_B4 = self._ragged.rows, self._ragged.spans, self._ragged.spans_B4
        place = (batch.slots_T[rows], batch.positions_T[rows], cache.rope_SC)
        q_THC = rotate_and_store(qkv_TQ[rows], *memory, *place, heads[0])
        attended_TO = ragged_attention(q_THC, *memory, spans, spans_B4, window).flatten(1)
        if not self._has_singles:
            return attended_TO
        out_TO = qkv_TQ.new_empty(qkv_TQ.shape[0], attended_TO.shape[1])
        out_TO[rows] = attended_TO
        out_TO[self._singles] = self._decode(qkv_TQ, batch, memory, heads[0], self._singles)
        return out_TO

    def _decode(self, qkv_TQ, batch: ForwardBatch, memory, heads: int, rows: slice | torch.Tensor) -> torch.Tensor:
        slots_B, positions_B = batch.slots_T[rows], batch.positions_T[rows]
        return decode_attention(qkv_TQ[rows], *memory, slots_B, positions_B, self.cache.rope_SC, heads, self.window)


@dataclass(frozen=True)
class _Ragged:
    """The rows of a step whose sequences have several tokens, one sequence after the other.

    ``spans`` are (slot, position, tokens) of each, ``spans_B4`` the same on the device.
    """

    rows: slice | torch.Tensor
    spans: list[tuple[int, int, int]]
    spans_B4: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> _Ragged:
        cuts = [(span.slot, span.position, span.stop - span.start) for span in spans]
        return cls(_rows(spans, device), cuts, span_table(cuts).to(device, non_blocking=True))


def _rows(spans: Sequence[Span], device: torch.device) -> slice | torch.Tensor:
    """The rows of ``spans``: a slice, which copies nothing, where they follow one another."""
    if not spans:
        return slice(0, 0)
    if all(one.stop == other.start for one, other in itertools.pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    rows = [row for span in spans for row in range(span.start, span.stop)]
    return torch.tensor(rows).to(device, non_blocking=True)


class FreshAttention:
    """Causal attention inside ``batch_size`` sequences of equal length, no cache, with gradients: for training."""

    is_cached = False

    def __init__(self, batch_size: int, window: int | None, theta: float) -> None:
        self.batch_size, self.window, self.theta = batch_size, window, theta

    def __call__(self, layer: int, qkv_TQ: torch.Tensor, batch: ForwardBatch, heads: tuple[int, int]) -> torch.Tensor:
        q_THC, k_TJC, v_TJC = split_heads(qkv_TQ, *heads)
        rope = rotations(batch.positions_T, q_THC.shape[-1], self.theta)
        turned = (rotate(q_THC, *rope), rotate(k_TJC, *rope), v_TJC)
        q, k, v = (x.unflatten(0, (self.batch_size, -1)).transpose(1, 2) for x in turned)
        length = q.shape[2]
        mask = None
        if self.window is not None and self.window < length:
            positions = torch.arange(length, device=q.device)
            mask = causal_window(positions[:, None], positions, self.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
