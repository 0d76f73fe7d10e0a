"""Caches in pages for tests of attention, from caches where every sequence is in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def paged(
    keys_SJTC: torch.Tensor,
    values_SJTC: torch.Tensor,
    page_size: int,
    seed: int = 0,
    shared: Sequence[tuple[int, int, int]] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values in pages, and the tables [slots, M]: pages in random order, NaN wherever the caches have nothing.

    ``shared``: (slot, another slot, n): the first n pages of the first are the other's, which hold the same.
    """
    slots, kv_heads, length, width = keys_SJTC.shape
    each = -(-length // page_size)
    order = torch.randperm(slots * each + 2, generator=torch.Generator().manual_seed(seed))
    tables_SM = order[: slots * each].view(slots, each).clone()
    for slot, other, pages in shared:
        tables_SM[slot, :pages] = tables_SM[other, :pages]
    memories = []
    for cache in (keys_SJTC, values_SJTC):
        memory_NJPC = cache.new_full((slots * each + 2, kv_heads, page_size, width), float("nan"))
        whole = F.pad(cache, (0, 0, 0, each * page_size - length), value=float("nan"))
        memory_NJPC[tables_SM] = whole.unflatten(2, (each, page_size)).transpose(1, 2)
        memories.append(memory_NJPC)
    return *memories, tables_SM.int()


def in_one_piece(memory_NJPC: torch.Tensor, tables_SM: torch.Tensor, length: int) -> torch.Tensor:
    """The sequences' first ``length`` positions: [slots, J, length, C]."""
    return torch.stack(
        [torch.cat([memory_NJPC[page] for page in pages], 1)[:, :length] for pages in tables_SM.tolist()]
    )
