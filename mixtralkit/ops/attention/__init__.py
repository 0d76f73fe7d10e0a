"""Attention of new tokens to a KV cache, which it extends: one token a sequence, and the first half of prefill.

Both take the fused projection ``qkv_TQ``, Q = (H + 2J)·C: the query heads, then the key heads, then the value heads.
Keys are turned by their position (``model/rope.py``) before they are stored.

A cache is pages of P positions, and position p of the sequence in slot s is row p % P of page ``tables_SM[s, p // P]``.
Sequences may share pages that none of them writes. A page is read by others from the step behind the one that wrote it.
"""

from __future__ import annotations

import torch

from mixtralkit.ops.attention.reference import (
    causal_window,
    decode_attention_reference,
    places,
    rotate,
    rotate_and_store_reference,
    split_heads,
)
from mixtralkit.ops.runtime import runs_cpu, runs_triton

__all__ = ["causal_window", "decode_attention", "places", "rotate", "rotate_and_store", "split_heads"]


def decode_attention(
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
    """Softmax attention of one new token a sequence, stored first: [B, H·C] in the dtype of ``qkv_BQ``.

    Nothing waits for the host and every shape is known beforehand, so a CUDA graph can hold the call. One call must
    have run before a graph is captured, and calls on one device must follow one another: they share counters.

    Args:
        keys_NJPC, values_NJPC: one layer's cache, written at each row's slot and position. P is a power of two, at
            least 16. What rows hold that no sequence has written, be it NaN, does not matter.
        tables_SM: int32 pages of each slot. Entries behind a sequence's last position are not read.
        slots_B: int64 place of each sequence in the cache, no two alike, or -1 for a row that only fills the shape:
            it writes nothing and its output is zero.
        positions_B: int64 position of the token, below S. Earlier ones are in the cache.
        rope_SC: float32 [S, C/2, 2] of (cos, sin), ``model.rope.rope_table``.
        window: how many keys, its own included, a token sees; None for all.
        out: where the result goes; None takes new memory.
    """
    if runs_triton(qkv_BQ):
        from mixtralkit.ops.attention.triton import launch_decode_attention as attend
    elif runs_cpu(qkv_BQ, keys_NJPC):
        from mixtralkit.ops.cpu.attention import decode_attention_cpu as attend
    else:
        attend = decode_attention_reference
    return attend(qkv_BQ, keys_NJPC, values_NJPC, tables_SM, slots_B, positions_B, rope_SC, heads, window, out)


def rotate_and_store(
    qkv_TQ: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    slots_T: torch.Tensor,
    positions_T: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Turns queries and keys and writes keys and values to the cache, in one pass; the turned queries, [T, H, C].

    Arguments as ``decode_attention``'s, for any number of tokens a sequence. What comes back of rows that only fill the
    shape means nothing.
    """
    if runs_triton(qkv_TQ):
        from mixtralkit.ops.attention.triton import launch_rotate_and_store as store
    elif runs_cpu(qkv_TQ, keys_NJPC):
        from mixtralkit.ops.cpu.attention import rotate_and_store_cpu as store
    else:
        store = rotate_and_store_reference
    return store(qkv_TQ, keys_NJPC, values_NJPC, tables_SM, slots_T, positions_T, rope_SC, heads)
