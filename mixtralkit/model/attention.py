"""Grouped-query attention: projections of this rank's heads, and the two ways to attend (cached, fresh)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.rope import rotate
from mixtralkit.model.step import Span, StepBatch
from mixtralkit.ops.attention import (
    attend_rows,
    causal_window,
    decode_attention,
    rotate_and_store,
    split_heads,
)
from mixtralkit.ops.ragged_attention import ragged_attention, ragged_attention_reference, span_table
from mixtralkit.ops.runtime import runs_triton

Rope = tuple[torch.Tensor, torch.Tensor]  # cosine and sine of ``rope.rotations``, float32 [T, 1, C/2] each
Attend = Callable[[int, torch.Tensor, Rope, tuple[int, int]], torch.Tensor]
"""(layer, qkv_TP, rope, (H, J)) -> [T, H·C]; qkv_TP holds query, key and value heads, none of them turned."""


class Attention(nn.Module):
    """Projects, attends, projects back; under ``tp`` the part that this rank's heads add to the sum over the ranks."""

    def __init__(self, layer: int, layout: RankLayout, context: RankContext, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = layout.shapes()
        self.layer = layer
        self.heads = layout.heads[1] - layout.heads[0]
        self.kv_heads = layout.kv_heads[1] - layout.kv_heads[0]
        self.head_dim = layout.config.head_dim
        options = {"bias": False, "dtype": dtype, "device": context.device}
        self.wqkv = nn.Linear(*reversed(shapes[f"layers.{layer}.attention.wqkv.weight"]), **options)
        self.wo = nn.Linear(*reversed(shapes[f"layers.{layer}.attention.wo.weight"]), **options)
        self.requires_grad_(False)

    def forward(
        self, x_TD: torch.Tensor, rope: Rope, attend: Attend, wanted_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``wanted_N`` are the rows whose result is wanted; None for all."""
        out_TP = attend(self.layer, self.wqkv(x_TD), rope, (self.heads, self.kv_heads))
        return self.wo(out_TP if wanted_N is None else out_TP[wanted_N])


class CachedAttention:
    """Attends to a KV cache, which it extends by the step's tokens first.

    With kernels, sequences with one token and sequences with several each take one call, whatever their lengths and
    positions. Otherwise a decode step is one batched product, and else each sequence is attended by itself.
    """

    def __init__(self, batch: StepBatch, cache: KVCache, window: int | None) -> None:
        self.batch, self.cache, self.window = batch, cache, window
        self.longest = max((_end(span) for span in batch.spans), default=0)
        assert self.longest <= cache.max_seq_len
        self._parts: list[_Singles | _Ragged] | None = None  # made by the first layer that runs on kernels

    def __call__(self, layer: int, qkv_TP: torch.Tensor, rope: Rope, heads: tuple[int, int]) -> torch.Tensor:
        batch, (q_heads, kv_heads) = self.batch, heads
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if not batch.spans:
            return qkv_TP[:, : q_heads * keys.shape[-1]]
        if runs_triton(qkv_TP):
            return self._by_kernels(qkv_TP, keys, values, q_heads)
        q_THC, k_TJC, v_TJC = split_heads(qkv_TP, q_heads, kv_heads)
        q_THC = rotate(q_THC, *rope)
        self.cache.write(layer, batch.slots_T, batch.positions_T, rotate(k_TJC, *rope), v_TJC)
        if batch.is_decode:
            slots = [span.slot for span in batch.spans]
            positions_B = batch.positions_T
            out = attend_rows(q_THC, keys, values, batch.slots_T, slots, positions_B, self.longest, self.window)
        else:
            out = ragged_attention_reference(q_THC, keys, values, _cuts(batch.spans), self.window)
        return out.flatten(1)

    def _by_kernels(self, qkv_TP: torch.Tensor, keys, values, heads: int) -> torch.Tensor:
        if self._parts is None:
            singles = [span for span in self.batch.spans if span.stop - span.start == 1]
            longer = [span for span in self.batch.spans if span.stop - span.start > 1]
            self._parts = [_Singles.of(self.batch, singles)] if singles else []
            self._parts += [_Ragged.of(self.batch, longer)] if longer else []
        attended = [part.attend(qkv_TP, keys, values, self.cache.rope_SC, heads, self.window) for part in self._parts]
        if len(attended) == 1:
            return attended[0]
        out_TP = qkv_TP.new_empty(qkv_TP.shape[0], attended[0].shape[1])
        for part, rows in zip(self._parts, attended, strict=True):
            out_TP[part.rows] = rows
        return out_TP


@dataclass(frozen=True)
class _Singles:
    """The rows of a step whose sequences have one token each."""

    rows: slice | torch.Tensor
    slots_B: torch.Tensor
    positions_B: torch.Tensor

    @classmethod
    def of(cls, batch: StepBatch, spans: Sequence[Span]) -> _Singles:
        rows = _rows(spans, batch.tokens_T.device)
        return cls(rows, batch.slots_T[rows], batch.positions_T[rows])

    def attend(self, qkv_TP, keys, values, rope_SC, heads: int, window: int | None) -> torch.Tensor:
        rows_BP = qkv_TP[self.rows]
        return decode_attention(rows_BP, keys, values, self.slots_B, self.positions_B, rope_SC, heads, window)


@dataclass(frozen=True)
class _Ragged:
    """The rows of a step whose sequences have several tokens, one sequence after the other."""

    rows: slice | torch.Tensor
    slots_T: torch.Tensor
    positions_T: torch.Tensor
    spans: list[tuple[int, int, int]]
    spans_B4: torch.Tensor

    @classmethod
    def of(cls, batch: StepBatch, spans: Sequence[Span]) -> _Ragged:
        device = batch.tokens_T.device
        rows, cuts = _rows(spans, device), _cuts(spans)
        on_device = span_table(cuts).to(device, non_blocking=True)
        return cls(rows, batch.slots_T[rows], batch.positions_T[rows], cuts, on_device)

    def attend(self, qkv_TP, keys, values, rope_SC, heads: int, window: int | None) -> torch.Tensor:
        place = (self.slots_T, self.positions_T, rope_SC)
        q_THC = rotate_and_store(qkv_TP[self.rows], keys, values, *place, heads)
        return ragged_attention(q_THC, keys, values, self.spans, self.spans_B4, window).flatten(1)


def _cuts(spans: Sequence[Span]) -> list[tuple[int, int, int]]:
    """(slot, position, tokens) of each."""
    return [(span.slot, span.position, span.stop - span.start) for span in spans]


def _end(span: Span) -> int:
    """How many tokens the sequence has after the step."""
    return span.position + span.stop - span.start


def _rows(spans: Sequence[Span], device: torch.device) -> slice | torch.Tensor:
    """The rows of ``spans``: a slice, which copies nothing, where they follow one another."""
    if all(one.stop == other.start for one, other in itertools.pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    rows = [row for span in spans for row in range(span.start, span.stop)]
    return torch.tensor(rows).to(device, non_blocking=True)


class FreshAttention:
    """Causal attention inside ``batch_size`` sequences of equal length, no cache, with gradients: for training."""

    def __init__(self, batch_size: int, window: int | None) -> None:
        self.batch_size, self.window = batch_size, window

    def __call__(self, layer: int, qkv_TP: torch.Tensor, rope: Rope, heads: tuple[int, int]) -> torch.Tensor:
        q_THC, k_TJC, v_TJC = split_heads(qkv_TP, *heads)
        turned = (rotate(q_THC, *rope), rotate(k_TJC, *rope), v_TJC)
        q, k, v = (x.unflatten(0, (self.batch_size, -1)).transpose(1, 2) for x in turned)
        length = q.shape[2]
        mask = None
        if self.window is not None and self.window < length:
            positions = torch.arange(length, device=q.device)
            mask = causal_window(positions[:, None], positions, self.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
