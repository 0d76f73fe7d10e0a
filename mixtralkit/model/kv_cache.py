"""Keys and values of the sequences that run, in pages: memory taken once, and tables of which page is whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.config import CacheOptions
from mixtralkit.layout import RankLayout
from mixtralkit.model.rope import rope_table


@dataclass(frozen=True)
class KVCache:
    """Pages of P positions, which sequences take as they grow.

    Addresses never change, so CUDA graphs stay valid whatever pages a sequence takes.

    Attributes:
        keys, values: [layers, pages, J, P, C], this rank's key-value heads J of width C; keys are stored turned by
            their positions.
        tables_SM: int32 [slots, M], the page of each P positions of the sequence in a slot.
        rope_SC: the angles of every position (``rope.rope_table``).
    """

    keys: torch.Tensor
    values: torch.Tensor
    tables_SM: torch.Tensor
    rope_SC: torch.Tensor

    @classmethod
    def allocate(
        cls,
        layout: RankLayout,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = CacheOptions.page_size,
        pages: int | None = None,
    ) -> KVCache:
        """Takes the memory for ``slots`` sequences of up to ``max_seq_len`` tokens.

        Args:
            page_size: positions of a page, a power of two of at least 16.
            pages: how many; ``place`` then says whose they are. None takes as many as all slots can need, and each
                slot has its own for good.
        """
        config, kv_heads = layout.config, layout.kv_heads[1] - layout.kv_heads[0]
        most = -(-max_seq_len // page_size)
        shape = (config.n_layers, slots * most if pages is None else pages, kv_heads, page_size, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        tables_SM = torch.zeros(slots, most, dtype=torch.int32, device=device)
        if pages is None:
            tables_SM.copy_(own_pages(slots, most))
        return cls(keys, values, tables_SM, rope_table(max_seq_len, config.head_dim, config.rope_theta, device))

    @property
    def slots(self) -> int:
        return self.tables_SM.shape[0]

    @property
    def max_seq_len(self) -> int:
        return self.rope_SC.shape[0]

    @property
    def pages(self) -> int:
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        return self.keys.shape[3]

    def place(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Says where sequences are: (slot, which P positions of its sequence, page), no slot and positions twice.

        One upload that does not wait: steps launched before read the tables as they were, those launched after it as
        they are now.
        """
        if entries:
            device = self.tables_SM.device
            entries_N3 = torch.from_numpy(np.array(entries, np.int64))
            uploaded = entries_N3.pin_memory() if device.type == "cuda" else entries_N3
            slots_N, indices_N, pages_N = uploaded.to(device, non_blocking=True).unbind(1)
            self.tables_SM[slots_N, indices_N] = pages_N.int()


def own_pages(slots: int, pages: int) -> torch.Tensor:
    """Tables [slots, pages] by which every slot has pages of its own, one after the other."""
    return torch.arange(slots * pages, dtype=torch.int32).view(slots, pages)
