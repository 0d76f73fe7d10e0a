"""Attention and its caches in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def decode_attention_reference(
    qkv_BQ: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    slots_B: torch.Tensor,
    positions_B: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference of ``decode_attention``; the host reads the slots and positions."""
    head_dim = keys_NJPC.shape[3]
    if out is None:
        out = qkv_BQ.new_empty(qkv_BQ.shape[0], heads * head_dim)
    rows_R = (slots_B >= 0).nonzero().flatten()
    out.zero_()
    if len(rows_R) == 0:
        return out
    slots_R, positions_R = slots_B[rows_R], positions_B[rows_R]
    cache = (keys_NJPC, values_NJPC, tables_SM)
    q_RHC = rotate_and_store_reference(qkv_BQ[rows_R], *cache, slots_R, positions_R, rope_SC, heads)
    longest = int(positions_R.max()) + 1
    visible_RS = causal_window(positions_R[:, None], torch.arange(longest, device=out.device), window)
    hidden_R1S1 = ~visible_RS[:, None, :, None]  # NaN may be there: a product with 0 does not take it away
    k_RJSC, v_RJSC = (in_order(memory, tables_SM[slots_R], longest).masked_fill(hidden_R1S1, 0) for memory in cache[:2])
    out_RH1C = F.scaled_dot_product_attention(
        q_RHC.unsqueeze(2), k_RJSC, v_RJSC, attn_mask=visible_RS[:, None, None], enable_gqa=True
    )
    out[rows_R] = out_RH1C.flatten(1)
    return out


def in_order(memory_NJPC: torch.Tensor, tables_BM: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` positions of some sequences, one after the other: [B, J, length, C], a copy."""
    pages = -(-length // memory_NJPC.shape[2])
    return memory_NJPC[tables_BM[:, :pages]].transpose(1, 2).flatten(2, 3)[:, :, :length]


def places(memory_NJPC: torch.Tensor, tables_SM: torch.Tensor, slots_T: torch.Tensor, positions_T: torch.Tensor):
    """An index of ``memory_NJPC`` that has the rows [T, J, C] at some positions of some slots."""
    page_size = memory_NJPC.shape[2]
    pages_T = tables_SM[slots_T, positions_T // page_size].long()
    return pages_T, slice(None), positions_T % page_size


def rotate_and_store_reference(
    qkv_TQ: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    slots_T: torch.Tensor,
    positions_T: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """The reference of ``rotate_and_store``."""
    q_THC, k_TJC, v_TJC = split_heads(qkv_TQ, heads, keys_NJPC.shape[1])
    cos_T1P, sin_T1P = rope_SC[positions_T].unsqueeze(1).unbind(-1)
    k_TJC, real_T = rotate(k_TJC, cos_T1P, sin_T1P), slots_T >= 0
    if not real_T.all():
        k_TJC, v_TJC, slots_T, positions_T = k_TJC[real_T], v_TJC[real_T], slots_T[real_T], positions_T[real_T]
    there = places(keys_NJPC, tables_SM, slots_T, positions_T)
    keys_NJPC[there], values_NJPC[there] = k_TJC, v_TJC
    return rotate(q_THC, cos_T1P, sin_T1P)


def split_heads(qkv_TQ: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views (q_THC, k_TJC, v_TJC) of the fused projection."""
    return qkv_TQ.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=1)


def rotate(x_THC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns features (2i, 2i+1) of every head by angle i: float32 inside, the dtype of ``x_THC`` outside.

    ``cos`` and ``sin`` are float32 [T, 1, C/2].
    """
    even, odd = x_THC.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x_THC)


def causal_window(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """True where a query position sees a key position: not after it, and among the last ``window`` up to itself."""
    visible = key <= query
    return visible if window is None else visible & (key > query - window)
