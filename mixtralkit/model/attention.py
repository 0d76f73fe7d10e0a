"""Grouped-query attention: projections of this rank's heads, and the two ways to attend (cached, fresh)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.rope import rotate
from mixtralkit.model.step import Span, StepBatch

# (layer, q_THC, k_TJC, v_TJC) -> out_THC
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Attention(nn.Module):
    """Projects, rotates, attends, projects back; under ``tp`` sums the ranks' heads."""

    def __init__(self, layer: int, layout: RankLayout, context: RankContext, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = layout.shapes()
        self.layer = layer
        self.heads = layout.heads[1] - layout.heads[0]
        self.kv_heads = layout.kv_heads[1] - layout.kv_heads[0]
        self.head_dim = layout.config.head_dim
        self.context = context
        self.split_over_ranks = layout.parallel.attention == "tp"
        options = {"bias": False, "dtype": dtype, "device": context.device}
        self.wqkv = nn.Linear(*reversed(shapes[f"layers.{layer}.attention.wqkv.weight"]), **options)
        self.wo = nn.Linear(*reversed(shapes[f"layers.{layer}.attention.wo.weight"]), **options)
        self.requires_grad_(False)

    def forward(self, x_TD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q_THC, k_TJC, v_TJC = self.wqkv(x_TD).unflatten(-1, (-1, self.head_dim)).split(heads, dim=1)
        out_THC = attend(self.layer, rotate(q_THC, *rope), rotate(k_TJC, *rope), v_TJC)
        out_TD = self.wo(out_THC.flatten(1))
        return self.context.all_reduce(out_TD) if self.split_over_ranks else out_TD


class CachedAttention:
    """Attends to a KV cache, which it extends by the step's tokens first.

    A decode step is one batched product; otherwise each sequence is attended by itself, without padding.
    """

    def __init__(self, batch: StepBatch, cache: KVCache, window: int | None) -> None:
        self.batch, self.cache, self.window = batch, cache, window
        self.longest = max((span.position + span.stop - span.start for span in batch.spans), default=0)
        assert self.longest <= cache.max_seq_len

    def __call__(self, layer: int, q_THC: torch.Tensor, k_TJC: torch.Tensor, v_TJC: torch.Tensor) -> torch.Tensor:
        batch = self.batch
        if not batch.spans:
            return q_THC
        self.cache.write(layer, batch.slots_T, batch.positions_T, k_TJC, v_TJC)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if batch.is_decode:
            return self._decode(q_THC, keys, values)
        return torch.cat([self._attend_span(span, q_THC, keys, values) for span in batch.spans])

    def _decode(self, q_BHC: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        slots = [span.slot for span in self.batch.spans]
        in_order = slots == list(range(slots[0], slots[0] + len(slots)))
        chosen = slice(slots[0], slots[-1] + 1) if in_order else self.batch.slots_T  # a slice copies nothing
        k_BJSC, v_BJSC = keys[chosen, :, : self.longest], values[chosen, :, : self.longest]
        visible_BS = self._visible(self.batch.positions_T, self.longest)
        out = F.scaled_dot_product_attention(
            q_BHC.unsqueeze(2), k_BJSC, v_BJSC, attn_mask=visible_BS[:, None, None], enable_gqa=True
        )
        return out.squeeze(2)

    def _attend_span(self, span: Span, q_THC: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        end = span.position + span.stop - span.start
        q_HTC = q_THC[span.start : span.stop].transpose(0, 1)
        k_JSC, v_JSC = keys[span.slot, :, :end], values[span.slot, :, :end]
        causal = span.position == 0 and (self.window is None or end <= self.window)
        mask_TS = None if causal else self._visible(self.batch.positions_T[span.start : span.stop], end)
        out_HTC = F.scaled_dot_product_attention(
            q_HTC[None], k_JSC[None], v_JSC[None], attn_mask=mask_TS, is_causal=causal, enable_gqa=True
        )
        return out_HTC[0].transpose(0, 1)

    def _visible(self, positions_T: torch.Tensor, length: int) -> torch.Tensor:
        """True where the query at ``positions_T`` may see key 0 … length-1: bool [T, length]."""
        return causal_window(positions_T[:, None], torch.arange(length, device=positions_T.device), self.window)


class FreshAttention:
    """Causal attention inside ``batch_size`` sequences of equal length, no cache, with gradients: for training."""

    def __init__(self, batch_size: int, window: int | None) -> None:
        self.batch_size, self.window = batch_size, window

    def __call__(self, layer: int, q_THC: torch.Tensor, k_TJC: torch.Tensor, v_TJC: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (self.batch_size, -1)).transpose(1, 2) for x in (q_THC, k_TJC, v_TJC))
        length = q.shape[2]
        mask = None
        if self.window is not None and self.window < length:
            positions = torch.arange(length, device=q.device)
            mask = causal_window(positions[:, None], positions, self.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def causal_window(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """True where a query position sees a key position: not after it, and among the last ``window`` up to itself."""
    visible = key <= query
    return visible if window is None else visible & (key > query - window)
