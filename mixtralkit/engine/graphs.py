"""CUDA graphs of work with static shapes and addresses, captured when it is first wanted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

T = TypeVar("T")


class Graphs:
    """Runs functions as CUDA graphs, one a key, whose intermediate memory is one pool.

    A replay repeats the kernels of the first run on the addresses of the first run: what changes must lie in tensors
    that the function reads and writes in place. The pool is safe to share because replays follow each other on one
    stream. Where a function talks to other ranks, all of them must run the same keys in the same order.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        """``enabled`` False, and any device but a CUDA one, calls the functions as they are."""
        self._is_on = enabled and device.type == "cuda"
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        if self._is_on:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def run(self, key: Hashable, function: Callable[[], T], rehearse: Callable[[], object]) -> T:
        """``function()``, on the current stream; what it returns lies where the next run of ``key`` overwrites it.

        Args:
            rehearse: called before a capture, so that kernels are compiled and communicators there: the same work of
                the same shapes on other memory, since a run leaves traces.
        """
        if not self._is_on:
            return function()
        if key not in self._captured:
            self._captured[key] = self._capture(function, rehearse)
        graph, result = self._captured[key]
        graph.replay()
        return result

    def _capture(self, function: Callable[[], T], rehearse: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, T]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        collects = gc.isenabled()
        with torch.cuda.stream(self._stream):
            rehearse()
            torch.cuda.synchronize(self._stream.device)
            gc.disable()  # freeing an older graph would spoil the capture
            try:
                # Other threads, such as NCCL's watchdog, go on with calls that a capture does not allow.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = function()
                finally:
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        current.wait_stream(self._stream)
        return graph, result
