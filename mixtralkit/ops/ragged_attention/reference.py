"""Attention of several tokens a sequence in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mixtralkit.ops.attention.reference import causal_window


def ragged_attention_reference(
    q_THC: torch.Tensor,
    keys_NJSC: torch.Tensor,
    values_NJSC: torch.Tensor,
    spans: Sequence[tuple[int, int, int]],
    window: int | None = None,
) -> torch.Tensor:
    """The reference of ``ragged_attention``: each sequence by itself."""
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
