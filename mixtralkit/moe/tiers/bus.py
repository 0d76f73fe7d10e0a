"""Copies from host memory to the GPU's places, beside what the GPU computes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Protocol

import torch

from mixtralkit.moe.tiers.memory import Clearing, Move

PIECE = 2 << 20  # bytes of a copy of what may be wanted: so long one that is wanted now waits at most


class Ticket(Protocol):
    """Copies that were begun."""

    def query(self) -> bool:
        """Whether they are done."""


class _Done:
    """Of copies that end before they are told of."""

    def query(self) -> bool:
        return True


class PlainBus:
    """Copies by the CPU, at once: for machines and tests without a GPU."""

    def copy(self, moves: Iterable[Move], urgent: bool = True) -> Ticket:
        """Begins the copies, in order.

        Args:
            urgent: in front of all that are not.

        Raises:
            RuntimeError: the device does not take them.
        """
        for move in moves:
            for row in range(move.height):
                target, source = move.target + row * move.target_pitch, move.source + row * move.source_pitch
                ctypes.memmove(target, source, move.width)
        return _Done()

    def clear(self, places: Iterable[Clearing]) -> None:
        """Makes bytes zero, in front of the urgent copies that are begun from now on."""
        for one in places:
            for row in range(one.height):
                ctypes.memset(one.target + row * one.target_pitch, 0, one.width)

    def wait(self, ticket: Ticket) -> None:
        """What the GPU does from now on comes after the copies."""

    def follow(self, ticket: Ticket) -> None:
        """Copies that are begun from now on come after these: nothing else orders urgent ones and others."""

    def answer(self, tickets: Iterable[Ticket], moves: Iterable[Move], flag: int, value: int) -> None:
        """Behind copies that were begun and some more, writes a word of 32 bits: address and value."""
        for ticket in tickets:
            while not ticket.query():
                pass
        self.copy(moves)
        ctypes.c_int32.from_address(flag).value = value


# The driver's ``CUDA_MEMCPY2D`` in words of 64 bits: how many, and which are not 0; width and height follow the last.
_WORDS, _SOURCE_KIND, _SOURCE, _SOURCE_PITCH, _TARGET_KIND, _TARGET, _TARGET_PITCH = 16, 2, 3, 6, 9, 11, 13
_HOST, _DEVICE = 1, 2  # kinds of memory


class CudaBus:
    """Copies by the GPU's copy engines, on a stream for what is wanted now and one for what may be.

    By the driver's calls: torch copies a rectangle of pinned memory by way of another copy in memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._urgent, self._ahead = (torch.cuda.Stream(device, priority=priority) for priority in (-1, 0))
        self._handles = {stream: stream.cuda_stream for stream in (self._urgent, self._ahead)}
        self._rectangle = (ctypes.c_uint64 * _WORDS)()  # one for all calls: the driver has read it when it returns
        self._rectangle[_SOURCE_KIND], self._rectangle[_TARGET_KIND] = _HOST, _DEVICE
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.cuMemcpyHtoDAsync_v2.argtypes = (
            ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
        )  # fmt: skip
        self._driver.cuMemcpy2DAsync_v2.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._driver.cuMemsetD2D8Async.argtypes = (
            ctypes.c_uint64, ctypes.c_size_t, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p
        )  # fmt: skip
        self._driver.cuStreamWriteValue32_v2.argtypes = (
            ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
        )  # fmt: skip
        held = torch.empty(2, 512, dtype=torch.uint8, device=device)  # its kernel is loaded before any other waits
        torch.cuda.synchronize(device)
        self.clear([Clearing(held.data_ptr(), 256, 2, 512)])
        self.answer((), (), held.data_ptr(), 0)
        torch.cuda.synchronize(device)

    def copy(self, moves: Iterable[Move], urgent: bool = True) -> torch.cuda.Event:
        """See ``PlainBus.copy``."""
        stream = self._urgent if urgent else self._ahead
        self._begin(moves, stream)
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def _begin(self, moves: Iterable[Move], stream: torch.cuda.Stream) -> None:
        of, driver = self._rectangle, self._driver
        handle = self._handles[stream]
        for target, source, width, height, target_pitch, source_pitch in moves:
            if height == 1:
                failed = driver.cuMemcpyHtoDAsync_v2(target, source, width, handle)
            else:
                of[_SOURCE], of[_SOURCE_PITCH], of[_TARGET] = source, source_pitch, target
                of[_TARGET_PITCH : _TARGET_PITCH + 3] = target_pitch, width, height
                failed = driver.cuMemcpy2DAsync_v2(of, handle)
            if failed:
                raise RuntimeError(f"an expert could not be copied from host memory to the GPU (CUDA error {failed})")

    def clear(self, places: Iterable[Clearing]) -> None:
        """See ``PlainBus.clear``."""
        handle = self._handles[self._urgent]
        for one in places:
            given = (one.target, one.target_pitch, 0, one.width, one.height, handle)
            if failed := self._driver.cuMemsetD2D8Async(*given):
                raise RuntimeError(f"a place for an expert could not be cleared (CUDA error {failed})")

    def wait(self, ticket: torch.cuda.Event) -> None:
        """See ``PlainBus.wait``."""
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def follow(self, ticket: torch.cuda.Event) -> None:
        """See ``PlainBus.follow``."""
        for stream in self._handles:
            stream.wait_event(ticket)

    def answer(self, tickets: Iterable[torch.cuda.Event], moves: Iterable[Move], flag: int, value: int) -> None:
        """See ``PlainBus.answer``. The driver makes all that came before visible to running kernels before the word."""
        for ticket in tickets:
            self._urgent.wait_event(ticket)
        self._begin(moves, self._urgent)
        if failed := self._driver.cuStreamWriteValue32_v2(self._handles[self._urgent], flag, value, 0):
            raise RuntimeError(f"an answer could not be written to the GPU's memory (CUDA error {failed})")
