"""Attention and its caches in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def decode_attention_reference(
    qkv_BP: torch.Tensor,
    keys_NJSC: torch.Tensor,
    values_NJSC: torch.Tensor,
    slots_B: torch.Tensor,
    positions_B: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference of ``decode_attention``; the host reads the slots and positions."""
    head_dim = keys_NJSC.shape[3]
    if out is None:
        out = qkv_BP.new_empty(qkv_BP.shape[0], heads * head_dim)
    rows_R = (slots_B >= 0).nonzero().flatten()
    out.zero_()
    if len(rows_R) == 0:
        return out
    slots_R, positions_R = slots_B[rows_R], positions_B[rows_R]
    q_RHC = rotate_and_store_reference(qkv_BP[rows_R], keys_NJSC, values_NJSC, slots_R, positions_R, rope_SC, heads)
    longest = int(positions_R.max()) + 1
    attended_RHC = attend_rows(q_RHC, keys_NJSC, values_NJSC, slots_R, slots_R.tolist(), positions_R, longest, window)
    out[rows_R] = attended_RHC.flatten(1)
    return out


def attend_rows(
    q_BHC: torch.Tensor,
    keys_NJSC: torch.Tensor,
    values_NJSC: torch.Tensor,
    slots_B: torch.Tensor,
    slots: list[int],
    positions_B: torch.Tensor,
    longest: int,
    window: int | None,
) -> torch.Tensor:
    """One turned query a sequence to its cached keys up to its position, as one batched product: [B, H, C].

    ``slots`` are ``slots_B`` on the host, ``longest`` the largest number of keys of any sequence.
    """
    in_order = slots == list(range(slots[0], slots[0] + len(slots)))
    chosen = slice(slots[0], slots[-1] + 1) if in_order else slots_B  # a slice copies nothing
    k_BJSC, v_BJSC = keys_NJSC[chosen, :, :longest], values_NJSC[chosen, :, :longest]
    visible_BS = causal_window(positions_B[:, None], torch.arange(longest, device=positions_B.device), window)
    out_BH1C = F.scaled_dot_product_attention(
        q_BHC.unsqueeze(2), k_BJSC, v_BJSC, attn_mask=visible_BS[:, None, None], enable_gqa=True
    )
    return out_BH1C.squeeze(2)


def rotate_and_store_reference(
    qkv_TP: torch.Tensor,
    keys_NJSC: torch.Tensor,
    values_NJSC: torch.Tensor,
    slots_T: torch.Tensor,
    positions_T: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """The reference of ``rotate_and_store``."""
    q_THC, k_TJC, v_TJC = split_heads(qkv_TP, heads, keys_NJSC.shape[1])
    cos_T1P, sin_T1P = rope_SC[positions_T].unsqueeze(1).unbind(-1)
    keys_NJSC[slots_T, :, positions_T] = rotate(k_TJC, cos_T1P, sin_T1P)
    values_NJSC[slots_T, :, positions_T] = v_TJC
    return rotate(q_THC, cos_T1P, sin_T1P)


def split_heads(qkv_TP: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views (q_THC, k_TJC, v_TJC) of the fused projection."""
    return qkv_TP.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=1)


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
