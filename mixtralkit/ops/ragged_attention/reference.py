"""Attention of several tokens a sequence in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mixtralkit.ops.attention.reference import causal_window, in_order


def ragged_attention_reference(
    q_THC: torch.Tensor,
    keys_NJPC: torch.Tensor,
    values_NJPC: torch.Tensor,
    tables_SM: torch.Tensor,
    spans: Sequence[tuple[int, int, int]],
    window: int | None = None,
) -> torch.Tensor:
    """The reference of ``ragged_attention``: each sequence by itself."""
    parts = q_THC.split([queries for _, _, queries in spans])
    attended = []
    for (slot, position, queries), q_SHC in zip(spans, parts, strict=True):
        table_1M, end = tables_SM[slot : slot + 1], position + queries
        k_1JSC, v_1JSC = (in_order(memory, table_1M, end) for memory in (keys_NJPC, values_NJPC))
        attended.append(_attend_span(q_SHC, k_1JSC, v_1JSC, position, window))
    return torch.cat(attended)


def _attend_span(q_THC: torch.Tensor, k_1JSC, v_1JSC, position: int, window: int | None) -> torch.Tensor:
    end = k_1JSC.shape[2]
    causal = position == 0 and (window is None or end <= window)
    mask_TS = None
    if not causal:
        positions_S = torch.arange(end, device=q_THC.device)
        mask_TS = causal_window(positions_S[position:, None], positions_S, window)
    out_HTC = F.scaled_dot_product_attention(
        q_THC.transpose(0, 1)[None], k_1JSC, v_1JSC, attn_mask=mask_TS, is_causal=causal, enable_gqa=True
    )
    return out_HTC[0].transpose(0, 1)
