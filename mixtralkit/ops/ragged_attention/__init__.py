"""Causal attention of several new tokens a sequence to a KV cache that holds them already: prefill, whole or in pieces.

One call for sequences of any lengths at any positions, flattened without padding. Keys and values are read where they
lie, so a prompt that continues an earlier piece needs no gathering.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixtralkit.ops.ragged_attention.reference import ragged_attention_reference
from mixtralkit.ops.runtime import runs_cpu, runs_triton


def ragged_attention(
    q_THC: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    spans: Sequence[tuple[int, int, int]],
    spans_B4: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of turned queries to the cached keys up to their own: [T, H, C] in the dtype of ``q_THC``.

    Args:
        q_THC: the sequences' queries, one sequence after the other.
        keys_NJPC, values_NJPC, tables_SM: one layer's cache as in ``ops.attention``, the queries' own keys and values
            stored.
        spans: (slot, position of the first query, queries) of each sequence; where ``only_the_device`` may know them,
            one with as many queries as any can have.
        spans_B4: ``span_table(spans)`` on the device; sequences without queries change nothing.
        window: how many keys, its own included, a query sees; None for all.
    """
    if runs_cpu(q_THC, keys_NJPC):
        from mixtralkit.ops.cpu.attention import ragged_attention_cpu

        return ragged_attention_cpu(q_THC, keys_NJPC, values_NJPC, tables_SM, spans, window)
    if not (runs_triton(q_THC) and only_the_device(q_THC.dtype, q_THC.shape[2])):
        return ragged_attention_reference(q_THC, keys_NJPC, values_NJPC, tables_SM, spans, window)
    from mixtralkit.ops.ragged_attention.triton import launch_ragged_attention

    longest = max(queries for _, _, queries in spans)
    return launch_ragged_attention(q_THC, keys_NJPC, values_NJPC, tables_SM, spans_B4, longest, window)


def only_the_device(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a GPU needs no more than ``spans_B4`` of the spans.

    The copy engine wants rows of whole 16 bytes; in float32 the tiles, multiplied exactly, outgrow the registers.
    """
    return dtype.itemsize == 2 and head_dim % 8 == 0


def span_table(spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Slot, position, queries and first row among the queries of each sequence: int32 [B, 4] on the CPU."""
    rows, start = [], 0
    for slot, position, queries in spans:
        rows.append((slot, position, queries, start))
        start += queries
    return torch.tensor(rows, dtype=torch.int32)
