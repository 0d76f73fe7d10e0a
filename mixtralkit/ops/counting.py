"""Counting without waiting for the host (``torch.bincount`` on CUDA copies its largest key there)."""

from __future__ import annotations

import torch


def count_keys(keys_N: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of 0 … size-1 stands in ``keys_N`` (int64, of any shape, all in range): int64 [size]."""
    flat_N = keys_N.flatten()
    return torch.zeros(size, dtype=torch.int64, device=keys_N.device).scatter_add_(0, flat_N, torch.ones_like(flat_N))
