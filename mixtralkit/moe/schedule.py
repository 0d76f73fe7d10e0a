"""The smart schedule: exchange and compute cut in chunks that overlap both ways (FasterMoE, §4.2).

::

    exchange   S0 │ S1 │ R0 │ S2 │ R1 │ R2      S: rows out and in    R: sums back
    experts       │ C0 │    C1   │  C2          C: experts

Chunk g is computed while chunk g+1 arrives and the sums of chunk g-1 leave. The chunks are of rows, so that it also
helps where all ranks fit in one of FastMoE's groups. On a GPU the two lines are two streams; on a CPU the same calls
run one after the other, with the same result.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from mixtralkit.moe.assignment import Assigner
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch import Dispatch
from mixtralkit.moe.experts import Experts, RoutedRows


def num_chunks(world_size: int, group_size: int) -> int:
    """Chunks of a step: as many as FastMoE has groups of ``group_size`` ranks, at least two."""
    return max(2, -(-world_size // group_size))


@dataclass(frozen=True)
class Lines:
    """The streams of exchange and experts; both None on a CPU."""

    exchange: torch.cuda.Stream | None = None
    experts: torch.cuda.Stream | None = None

    @classmethod
    def for_device(cls, device: torch.device) -> Lines:
        """The current stream computes, one of its own exchanges."""
        if device.type != "cuda":
            return cls()
        return cls(torch.cuda.Stream(device), torch.cuda.current_stream(device))


def run_in_chunks(
    way: Dispatch,
    experts: Experts,
    x_TD: torch.Tensor,
    cut: CutRouting,
    assigner: Assigner,
    chunks: int,
) -> tuple[torch.Tensor, list[Any]]:
    """``combine(experts(dispatch(x)))`` in ``chunks`` parts of the rows; the rows, and each chunk's handle.

    Every rank cuts its own rows in the same number of parts, some perhaps empty, so that collectives match.
    """
    lines = Lines.for_device(x_TD.device)
    parts = _split(x_TD, cut, chunks)

    def send(part: tuple[torch.Tensor, CutRouting]) -> tuple[RoutedRows, Any]:
        with _on(lines.exchange, after=lines.experts if part is parts[0] else None):
            return way.dispatch(*part, assigner)

    sent, sums, handles = send(parts[0]), [], []
    for number in range(chunks):
        rows, handle = sent
        with _on(lines.experts, after=lines.exchange):
            y_RD = experts(_handed_over(rows, lines.experts))
        if number + 1 < chunks:
            sent = send(parts[number + 1])
        with _on(lines.exchange, after=lines.experts):
            sums.append(way.combine(_keep(y_RD, lines.exchange), handle))
        handles.append(handle)
    with _on(lines.experts, after=lines.exchange):
        return torch.cat([_keep(part, lines.experts) for part in sums]), handles


def _split(x_TD: torch.Tensor, cut: CutRouting, chunks: int) -> list[tuple[torch.Tensor, CutRouting]]:
    columns = zip(
        x_TD.tensor_split(chunks), cut.experts_TK.tensor_split(chunks), cut.weights_TK.tensor_split(chunks), strict=True
    )
    return [(x, CutRouting(experts, weights, cut.dropped, cut.rerouted)) for x, experts, weights in columns]


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None, after: torch.cuda.Stream | None):
    """Work inside goes to ``stream``, once what is queued on ``after`` is done."""
    if stream is None:
        yield
        return
    if after is not None:
        stream.wait_stream(after)
    with torch.cuda.stream(stream):
        yield


def _keep(x: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """Tells the allocator that ``stream`` still reads ``x``."""
    if stream is not None:
        x.record_stream(stream)
    return x


def _handed_over(rows: RoutedRows, stream: torch.cuda.Stream | None) -> RoutedRows:
    for tensor in (rows.x_RD, rows.slots_RK, rows.weights_RK):
        _keep(tensor, stream)
    return rows
