"""The smart schedule: exchange and compute cut in chunks that overlap both ways (FasterMoE, §4.2).

::

    exchange   S0 │ S1 │ R0 │ S2 │ R1 │ R2      S: rows out and in    R: sums back
    experts       │ C0 │    C1   │  C2          C: experts

Chunk g is computed while chunk g+1 arrives and the sums of chunk g-1 leave: it waits for its own rows only, not for
what was queued for the exchange after them. The chunks are of rows, so that it also
helps where all ranks fit in one of FastMoE's groups. On a GPU the two lines are two streams; on a CPU the same calls
run one after the other, with the same result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch.base import Dispatcher, RoutedRows
from mixtralkit.moe.table import LayerTable
from mixtralkit.ops.hidden import Hidden, Norm, join


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
    dispatcher: Dispatcher,
    experts: Callable[[RoutedRows], torch.Tensor],
    hidden: Hidden,
    cut: CutRouting,
    table: LayerTable,
    chunks: int,
    following: Norm | None = None,
) -> tuple[Hidden, list[Any]]:
    """``combine(experts(dispatch(hidden)))`` in ``chunks`` parts of the rows; the rows, and each chunk's handle.

    Every rank cuts its own rows in the same number of parts, some perhaps empty, so that collectives match.
    """
    lines = Lines.for_device(cut.experts_TK.device)
    bounds = torch.arange(len(hidden)).tensor_split(chunks)
    parts = [slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0) for rows in bounds]

    def send(part: slice) -> tuple[RoutedRows, Any, torch.cuda.Event | None]:
        with _on(lines.exchange):
            rows, handle = dispatcher.dispatch(hidden.take(part), cut.take(part), table)
            return rows, handle, _mark(lines.exchange)

    _wait_for(lines.exchange, _mark(lines.experts))
    sent, found, handles = send(parts[0]), [], []
    for number in range(chunks):
        rows, handle, arrived = sent
        _wait_for(lines.experts, arrived)
        with _on(lines.experts):
            y_RD = experts(_handed_over(rows, lines.experts))
        computed = _mark(lines.experts)
        if number + 1 < chunks:
            sent = send(parts[number + 1])
        _wait_for(lines.exchange, computed)
        with _on(lines.exchange):
            found.append(dispatcher.combine(_keep(y_RD, lines.exchange), handle, following))
        handles.append(handle)
    _wait_for(lines.experts, _mark(lines.exchange))
    for part in found:
        for tensor in (part.x_TD, part.normed_TD):
            if tensor is not None:
                _keep(tensor, lines.experts)
    return join(found), handles


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    """Work inside goes to ``stream``."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def _mark(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """A mark after what is queued on ``stream`` so far."""
    return None if stream is None else stream.record_event()


def _wait_for(stream: torch.cuda.Stream | None, mark: torch.cuda.Event | None) -> None:
    """What is queued on ``stream`` from now on starts after ``mark``."""
    if stream is not None:
        stream.wait_event(mark)


def _keep(x: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """Tells the allocator that ``stream`` still reads ``x``."""
    if stream is not None:
        x.record_stream(stream)
    return x


def _handed_over(rows: RoutedRows, stream: torch.cuda.Stream | None) -> RoutedRows:
    for tensor in (rows.x_RD, rows.slots_RK, rows.weights_RK):
        _keep(tensor, stream)
    return rows
