"""Attention of any queries to a KV cache, by the compiled kernels of ``kernels.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixtralkit.ops.cpu.build import kernels
from mixtralkit.ops.cpu.products import TYPES, rows_of


def attention_cpu(
    q_THC: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    slots_T: torch.Tensor,
    positions_T: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of each turned query to its slot's keys up to its position, summed in float32: [T, H, C].

    ``window`` is how many keys, its own included, a query sees; None for all. Rows of slot -1 come back zero.
    """
    rows, heads, head_dim = q_THC.shape
    out_THC, q_TP = torch.empty_like(q_THC, memory_format=torch.contiguous_format), q_THC.reshape(rows, -1)
    assert keys_NJPC.stride() == values_NJPC.stride()
    assert keys_NJPC.stride(3) == 1
    slots_T, positions_T = slots_T.contiguous(), positions_T.contiguous()
    assert slots_T.dtype == positions_T.dtype == torch.int64
    assert tables_SM.dtype == torch.int32
    assert tables_SM.is_contiguous()
    kernels().mk_attention(
        torch.get_num_threads(), rows, heads, keys_NJPC.shape[1], head_dim, rows_of(q_TP), TYPES[keys_NJPC.dtype],
        keys_NJPC.data_ptr(), values_NJPC.data_ptr(), *keys_NJPC.stride()[:3], keys_NJPC.shape[2],
        tables_SM.data_ptr(), tables_SM.shape[1], slots_T.data_ptr(), positions_T.data_ptr(), window or 0,
        rows_of(out_THC.view(rows, -1)),
    )  # fmt: skip
    return out_THC


def rotate_and_store_cpu(
    qkv_TQ: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    slots_T: torch.Tensor,
    positions_T: torch.Tensor,
    rope_SC: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """``ops.attention.rotate_and_store``."""
    rows, (_, kv_heads, page_size, head_dim) = len(qkv_TQ), keys_NJPC.shape
    q_THC = qkv_TQ.new_empty(rows, heads, head_dim)
    slots_T, positions_T = slots_T.contiguous(), positions_T.contiguous()
    assert keys_NJPC.stride() == values_NJPC.stride()
    assert keys_NJPC.dtype == values_NJPC.dtype == qkv_TQ.dtype
    assert slots_T.dtype == positions_T.dtype == torch.int64
    assert tables_SM.dtype == torch.int32
    assert rope_SC.dtype == torch.float32
    assert tables_SM.is_contiguous()
    assert rope_SC.is_contiguous()
    kernels().mk_rotate_and_store(
        torch.get_num_threads(), rows, heads, kv_heads, head_dim, rows_of(qkv_TQ), rope_SC.data_ptr(),
        keys_NJPC.data_ptr(), values_NJPC.data_ptr(), *keys_NJPC.stride()[:3], page_size, tables_SM.data_ptr(),
        tables_SM.shape[1], slots_T.data_ptr(), positions_T.data_ptr(), rows_of(q_THC.view(rows, -1)),
    )  # fmt: skip
    return q_THC


def decode_attention_cpu(
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
    """``ops.attention.decode_attention``."""
    cache = (keys_NJPC, values_NJPC, tables_SM)
    q_BHC = rotate_and_store_cpu(qkv_BQ, *cache, slots_B, positions_B, rope_SC, heads)
    found = attention_cpu(q_BHC, *cache, slots_B, positions_B, window).flatten(1)
    return found if out is None else out.copy_(found)


def ragged_attention_cpu(
    q_THC: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    spans: Sequence[tuple[int, int, int]],
    window: int | None = None,
) -> torch.Tensor:
    """``ops.ragged_attention.ragged_attention``."""
    slots_B, firsts_B, counts_B = torch.tensor(spans).unbind(1)
    starts_B = firsts_B - (counts_B.cumsum(0) - counts_B)
    positions_T = torch.arange(q_THC.shape[0]) + starts_B.repeat_interleave(counts_B)
    cache = (keys_NJPC, values_NJPC, tables_SM)
    return attention_cpu(q_THC, *cache, slots_B.repeat_interleave(counts_B), positions_T, window)
