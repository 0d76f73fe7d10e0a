"""Causal attention of several new tokens a sequence to a KV cache that holds them already: prefill, whole or in pieces.

One call for sequences of any lengths at any positions, flattened without padding. Keys and values are read where they
lie, so a prompt that continues an earlier piece needs no gathering.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mixtralkit.ops.attention import causal_window
from mixtralkit.ops.runtime import runs_triton


def ragged_attention(
    q_THC: torch.Tensor,
    keys_NJSC: torch.Tensor,
    values_NJSC: torch.Tensor,
    spans: Sequence[tuple[int, int, int]],
    spans_B4: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of turned queries to the cached keys up to their own: [T, H, C] in the dtype of ``q_THC``.

    Args:
        q_THC: the sequences' queries, one sequence after the other.
        keys_NJSC, values_NJSC: one layer's cache, the queries' own keys and values stored.
        spans: (slot, position of the first query, queries) of each sequence.
        spans_B4: ``span_table(spans)`` on the device.
        window: how many keys, its own included, a query sees; None for all.
    """
    # The copy engine wants rows of whole 16 bytes; in float32 the tiles, multiplied exactly, outgrow the registers.
    if not runs_triton(q_THC) or q_THC.element_size() != 2 or q_THC.shape[2] % 8:
        return ragged_attention_plain(q_THC, keys_NJSC, values_NJSC, spans, window)
    from mixtralkit.ops.ragged_attention_triton import launch_ragged_attention

    longest = max(queries for _, _, queries in spans)
    return launch_ragged_attention(q_THC, keys_NJSC, values_NJSC, spans_B4, longest, window)


def span_table(spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Slot, position, queries and first row among the queries of each sequence: int32 [B, 4] on the CPU."""
    rows, start = [], 0
    for slot, position, queries in spans:
        rows.append((slot, position, queries, start))
        start += queries
    return torch.tensor(rows, dtype=torch.int32)


def ragged_attention_plain(
    q_THC: torch.Tensor,
    keys_NJSC: torch.Tensor,
    values_NJSC: torch.Tensor,
    spans: Sequence[tuple[int, int, int]],
    window: int | None = None,
) -> torch.Tensor:
    """The twin of ``ragged_attention``: each sequence by itself."""
    parts = q_THC.split([queries for _, _, queries in spans])
    return torch.cat(
        [
            _attend_span(q_SHC, keys_NJSC[slot], values_NJSC[slot], position, window)
            for (slot, position, _), q_SHC in zip(spans, parts, strict=True)
        ]
    )


def _attend_span(q_THC: torch.Tensor, keys_JSC, values_JSC, position: int, window: int | None) -> torch.Tensor:
    end = position + q_THC.shape[0]
    k_JSC, v_JSC = keys_JSC[:, :end], values_JSC[:, :end]
    causal = position == 0 and (window is None or end <= window)
    mask_TS = None
    if not causal:
        positions_S = torch.arange(end, device=q_THC.device)
        mask_TS = causal_window(positions_S[position:, None], positions_S, window)
    out_HTC = F.scaled_dot_product_attention(
        q_THC.transpose(0, 1)[None], k_JSC[None], v_JSC[None], attn_mask=mask_TS, is_causal=causal, enable_gqa=True
    )
    return out_HTC[0].transpose(0, 1)
