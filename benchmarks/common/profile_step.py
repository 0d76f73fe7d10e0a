"""Where the time of a step goes, kernel by kernel, from torch's profiler.

Kernels may overlap: with programmatic dependent launch the next one starts while the one before ends, and waits. So a
kernel's own time is by how much it moves the end of all work so far, and the own times and the gaps add up to the
whole.
"""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What kernels belong to, by their names; the first that fits counts.
PARTS = (
    ("gate", r"gate"),
    ("sums", r"nccl|all_?reduce|one_shot|two_shot|_shot|add_norm"),
    ("sampling", r"_piece_kernel|_merge_kernel|best|sampl|argmax|softmax|radix|Sort"),
    ("attention", r"attention|attend|flash|fmha|merge_parts|rotate"),
    ("experts", r"expert|_few|_product|_spread|_weighted_sum|^_place|^_count|grouped|_up_|_down_"),
    ("linear", r"_vector_kernel|_matrix_kernel|_block_kernel|^_sum_kernel|gemm|gemv|nvjet|cutlass|splitK"),
    ("norm", r"norm"),
)


@dataclass(frozen=True)
class KernelTime:
    """Of one step: launches, own time, and time from start to end (waiting included), in µs."""

    name: str
    part: str
    calls: float
    own_us: float
    span_us: float


@dataclass(frozen=True)
class StepTime:
    """Kernels by falling own time, and the µs of a step in which the device did nothing."""

    kernels: list[KernelTime]
    idle_us: float

    @property
    def whole_us(self) -> float:
        return self.idle_us + sum(kernel.own_us for kernel in self.kernels)

    def table(self, bytes_by_part: Mapping[str, float], read_rate: float) -> str:
        """Lines for a person: every kernel, then every part with the time that reading its bytes takes at least."""
        lines = [f"{'kernel':<56} {'part':<10} {'calls':>6} {'µs':>9} {'share':>6} {'span µs':>9}"]
        for k in self.kernels:
            share = k.own_us / self.whole_us
            lines.append(
                f"{k.name[:56]:<56} {k.part:<10} {k.calls:>6.1f} {k.own_us:>9.1f} {share:>6.1%} {k.span_us:>9.1f}"
            )
        lines.append(f"{'nothing runs':<56} {'':<10} {'':>6} {self.idle_us:>9.1f} {self.idle_us / self.whole_us:>6.1%}")
        lines.append(f"{'whole step':<56} {'':<10} {'':>6} {self.whole_us:>9.1f}")
        lines.append(f"{'part':<10} {'µs':>9} {'MB':>9} {'bound µs':>9} {'of bound':>8}")
        for part, own_us in sorted(self.parts().items(), key=lambda item: -item[1]):
            size = bytes_by_part.get(part)
            bound = "" if size is None else f"{size / 1e6:>9.1f} {1e6 * size / read_rate:>9.1f}"
            reached = "" if size is None else f"{1e6 * size / read_rate / own_us:>8.1%}"
            lines.append(f"{part:<10} {own_us:>9.1f} {bound} {reached}".rstrip())
        return "\n".join(lines)

    def parts(self) -> dict[str, float]:
        """Own µs by part."""
        found: dict[str, float] = {}
        for kernel in self.kernels:
            found[kernel.part] = found.get(kernel.part, 0.0) + kernel.own_us
        return found


def profiled(run: Callable[[], int], device: torch.device, trace: Path | None = None) -> StepTime | None:
    """Profiles ``run``, which returns how many steps it ran; None without a GPU, where it just runs.

    ``trace``, if given, takes the trace that Chrome and Perfetto show, compressed.
    """
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        steps = run()
        torch.cuda.synchronize(device)
    if trace is not None:
        _save(found, trace)
    events = [e for e in found.events() if e.device_type == DeviceType.CUDA]
    return summed([(e.name, e.time_range.start, e.time_range.end) for e in events], steps)


def summed(events: list[tuple[str, float, float]], steps: int) -> StepTime:
    """Times of a step from the kernels' (name, start, end), µs, of ``steps`` steps."""
    rows: dict[str, list[float]] = {}
    events = sorted(events, key=lambda event: event[1])
    done, idle = (events[0][1] if events else 0.0), 0.0
    for name, start, end in events:
        idle += max(0.0, start - done)
        row = rows.setdefault(_short(name), [0, 0.0, 0.0])
        row[0] += 1
        row[1] += max(0.0, end - max(start, done))
        row[2] += end - start
        done = max(done, end)
    kernels = [KernelTime(name, part_of(name), *(value / steps for value in row)) for name, row in rows.items()]
    return StepTime(sorted(kernels, key=lambda kernel: -kernel.own_us), idle / steps)


def part_of(name: str) -> str:
    """The part of the model that a kernel works for."""
    return next((part for part, pattern in PARTS if re.search(pattern, name)), "other")


def _short(name: str) -> str:
    """A kernel's name without return type, namespaces and arguments."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|at_cuda_detail::", "", name)
    return name.partition("(")[0] if "<" not in name.partition("(")[0] else name


def _save(found: profile, trace: Path) -> None:
    trace.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        found.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(trace, "wb") as target:
            shutil.copyfileobj(source, target)
