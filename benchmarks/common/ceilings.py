"""What the machine can do at most, measured in the run that a result is compared with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median

import torch

from lab.timing import times_ms
from mixtralkit.distributed import RankContext
from mixtralkit.ops.runtime import runs_triton

STEADY_MS = 1000.0  # of products, after which the clock is what the power limit leaves


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s of reading memory and of copying it (read plus written), and FLOP/s of a square product.

    The slowest rank's, all ranks at once. ``matmul`` is that of a few products, ``matmul_steady`` that of a second of
    them, after which a GPU runs at the clock that its power limit leaves.
    """

    read: float
    copy: float
    matmul: float
    matmul_steady: float

    @classmethod
    def measure(cls, context: RankContext, dtype: torch.dtype) -> Ceilings:
        """Takes 4 GiB of a GPU's memory for a moment, 128 MiB of a CPU's."""
        device = context.device
        context.barrier()
        found = (*_memory_rates(device), *_matmul_rates(device, dtype))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return cls(*(min(values) for values in zip(*context.all_gather_objects(found), strict=True)))

    def bound_s(self, bytes_read: float, operations: float) -> tuple[float, str]:
        """Seconds below which work cannot fall, and which of "bytes" and "operations" says so."""
        return max((bytes_read / self.read, "bytes"), (operations / self.matmul, "operations"))

    def rounded(self) -> dict[str, float]:
        """For JSON: TB/s and TFLOP/s."""
        return {
            f"{name}_{'tflops' if name.startswith('matmul') else 'tb_s'}": round(rate / 1e12, 4)
            for name, rate in asdict(self).items()
        }


def _memory_rates(device: torch.device) -> tuple[float, float]:
    size = 2**31 if device.type == "cuda" else 2**26
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    reads = [source.sum]
    if runs_triton(source):
        from benchmarks.common.read_triton import programs, read

        words = source.view(torch.int32)
        sums = words.new_empty(programs(words))
        reads.append(lambda: read(words, sums))
    # A copy in a graph goes to the copy engine, which may be slower than a kernel.
    copies = [lambda: target.copy_(source), lambda: torch.neg(source, out=target)]
    read_ms, copy_ms = (min(median(times_ms([call], device, 5)) for call in calls) for calls in (reads, copies))
    return 1e3 * size / read_ms, 2e3 * size / copy_ms


def _matmul_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    side = 8192 if device.type == "cuda" else 512
    a, b, out = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(3))
    calls = [lambda: torch.mm(a, b, out=out)]
    burst_ms = median(times_ms(calls, device, 5))
    steady_ms = median(times_ms(calls, device, max(5, round(STEADY_MS / burst_ms)))[-5:])
    return 2e3 * side**3 / burst_ms, 2e3 * side**3 / steady_ms
