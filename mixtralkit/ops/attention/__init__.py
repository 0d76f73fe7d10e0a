"""Attention of new tokens to a KV cache, which it extends: one token a sequence, and the first half of prefill.

Both take the fused projection ``qkv_TP``, P = (H + 2J)·C: the query heads, then the key heads, then the value heads.
Keys are turned by their position (``model/rope.py``) before they are stored.
"""

from __future__ import annotations

import torch

from mixtralkit.ops.attention.reference import (
    attend_rows,
    causal_window,
    decode_attention_reference,
    rotate,
    rotate_and_store_reference,
    split_heads,
)
from mixtralkit.ops.runtime import runs_cpu, runs_triton

__all__ = ["attend_rows", "causal_window", "decode_attention", "rotate", "rotate_and_store", "split_heads"]


def decode_attention(
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
    """Softmax attention of one new token a sequence, stored first: [B, H·C] in the dtype of ``qkv_BP``.

    Nothing waits for the host and every shape is known beforehand, so a CUDA graph can hold the call. One call must
    have run before a graph is captured, and calls on one device must follow one another: they share counters.

    Args:
        keys_NJSC, values_NJSC: one layer's cache, written at each row's slot and position.
        slots_B: int64 place of each sequence in the cache, no two alike, or -1 for a row that only fills the shape:
            it writes nothing and its output is zero.
        positions_B: int64 position of the token, below S. Earlier ones are in the cache.
        rope_SC: float32 [S, C/2, 2] of (cos, sin), ``model.rope.rope_table``.
        window: how many keys, its own included, a token sees; None for all.
        out: where the result goes; None takes new memory.
    """
    if runs_triton(qkv_BP):
        from mixtralkit.ops.attention.triton import launch_decode_attention as attend
    elif runs_cpu(qkv_BP, keys_NJSC):
        from mixtralkit.ops.cpu.attention import decode_attention_cpu as attend
    else:
        attend = decode_attention_reference
    return attend(qkv_BP, keys_NJSC, values_NJSC, slots_B, positions_B, rope_SC, heads, window, out)


def rotate_and_store(
    qkv_TP: torch.Tensor,
    keys_NJSC: torch.Tensor,
    values_NJSC: torch.Tensor,
    slots_T: torch.Tensor,
    positions_T: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Turns queries and keys and writes keys and values to the cache, in one pass; the turned queries, [T, H, C].

    Arguments as ``decode_attention``'s, for any number of tokens a sequence and no rows that fill the shape.
    """
    if runs_triton(qkv_TP):
        from mixtralkit.ops.attention.triton import launch_rotate_and_store as store
    else:
        store = rotate_and_store_reference
    return store(qkv_TP, keys_NJSC, values_NJSC, slots_T, positions_T, rope_SC, heads)
