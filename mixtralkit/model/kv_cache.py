"""Keys and values of the sequences that run: one slot a sequence, memory taken once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.layout import RankLayout
from mixtralkit.model.rope import rope_table


@dataclass(frozen=True)
class KVCache:
    """``keys`` and ``values``: [layers, slots, J, max_seq_len, C], this rank's key-value heads J of width C.

    Keys are stored turned by their positions; ``rope_SC`` has the angles of every position (``rope.rope_table``).
    """

    keys: torch.Tensor
    values: torch.Tensor
    rope_SC: torch.Tensor

    @classmethod
    def allocate(
        cls, layout: RankLayout, slots: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Takes the memory for ``slots`` sequences of up to ``max_seq_len`` tokens."""
        config, kv_heads = layout.config, layout.kv_heads[1] - layout.kv_heads[0]
        shape = (config.n_layers, slots, kv_heads, max_seq_len, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, rope_table(max_seq_len, config.head_dim, config.rope_theta, device))

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    @property
    def max_seq_len(self) -> int:
        return self.keys.shape[3]
