"""Buffers that blocks pass through on the way from a file to a parameter."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from mixtralkit.checkpoint.quantising import RoundedBlock
from mixtralkit.checkpoint.reader import BLOCK_BYTES, Block
from mixtralkit.checkpoint.weight_hash import WeightHash


@dataclass(frozen=True)
class Stage:
    """A buffer for one block at a time; for a GPU pinned, and emptied by copies on a stream of its own."""

    buffer: torch.Tensor
    stream: torch.cuda.Stream | None = None

    @classmethod
    def allocate(cls, device: torch.device) -> Stage:
        """One for parameters on ``device``; what its current stream does to them so far comes first."""
        if device.type != "cuda":
            return cls(torch.empty(BLOCK_BYTES, dtype=torch.uint8))
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return cls(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True), stream)

    def read(self, block: Block | RoundedBlock, weight_hash: WeightHash | None = None) -> None:
        """Reads ``block``; on a GPU its copy may still be under way after that, until ``wait``."""
        self.wait()  # host waits for the device: the buffer is read from until then
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            block.read(self.buffer, weight_hash)

    def wait(self) -> None:
        """Returns when the copies out of the buffer are done."""
        if self.stream is not None:
            self.stream.synchronize()
