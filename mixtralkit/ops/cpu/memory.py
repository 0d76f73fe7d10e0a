"""Large pages beneath weights, so that a step that reads them all does not wait for the tables of small ones."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import torch

PAGE = 2**21


def ask_for_large_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Asks Linux for pages of 2 MB where tensors on a CPU lie; others, small ones and other systems stay as they are.

    Best before anything is written there: what is written already keeps its pages until the system finds time.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        memory = tensor.untyped_storage()
        first, last = -(-memory.data_ptr() // PAGE) * PAGE, (memory.data_ptr() + memory.nbytes()) // PAGE * PAGE
        if last > first:
            madvise(first, last - first, mmap.MADV_HUGEPAGE)  # a kernel that does not know them says no, which is fine
