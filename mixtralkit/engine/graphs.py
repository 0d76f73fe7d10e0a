"""CUDA graphs of work with static shapes and addresses, captured when it is first wanted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Run(Generic[T]):
    """What a function gave, and how it ran.

    Attributes:
        replayed: as a graph; otherwise it was called.
        recapture_s: seconds of a capture, rehearsal included, that an earlier ``forget`` had made necessary; else 0.
    """

    value: T
    replayed: bool = False
    recapture_s: float = 0.0


class Graphs:
    """Runs functions as CUDA graphs, one a key, whose intermediate memory is one pool; ``is_on`` says whether it does.

    A replay repeats the kernels of the first run on the addresses of the first run: what changes must lie in tensors
    that the function reads and writes in place. The pool is safe to share because replays follow each other on one
    stream. Where a function talks to other ranks, all of them must run the same keys in the same order.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        """``enabled`` False, and any device but a CUDA one, calls the functions as they are: ``is_on`` is False."""
        self.is_on = enabled and device.type == "cuda"
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._forgotten: set[Hashable] = set()
        if self.is_on:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def run(
        self, key: Hashable, function: Callable[[], T], rehearse: Callable[[], object], may_capture: bool = True
    ) -> Run[T]:
        """``function()``, on the current stream; what it returns lies where the next run of ``key`` may overwrite it.

        Args:
            rehearse: called before a capture, so that kernels are compiled and communicators there: the same work of
                the same shapes on other memory, since a run leaves traces.
            may_capture: False calls the function where no graph is there yet.
        """
        if not self.replays(key, may_capture):
            return Run(function())
        recapture_s = 0.0
        if key not in self._captured:
            started = time.perf_counter()
            self._captured[key] = self._capture(function, rehearse)
            recapture_s = time.perf_counter() - started if key in self._forgotten else 0.0
        graph, result = self._captured[key]
        graph.replay()
        return Run(result, True, recapture_s)

    def replays(self, key: Hashable, may_capture: bool = True) -> bool:
        """Whether ``run`` would replay a graph, be it made for that."""
        return self.is_on and (may_capture or key in self._captured)

    def forget(self) -> None:
        """Drops all graphs, since what they read has other addresses now. No graph may be running."""
        self._forgotten |= self._captured.keys()
        self._captured.clear()
        if self.is_on:
            self._pool = torch.cuda.graph_pool_handle()  # the old one is at its end with its last graph

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
