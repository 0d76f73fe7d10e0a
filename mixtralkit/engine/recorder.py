"""Records what the gates choose into a routing trace, while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mixtralkit.model.batch import ForwardBatch, Span
from mixtralkit.model.transformer import Observe, Transformer
from mixtralkit.moe.layer import MoEReport
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.planning.trace_parts import PartWriter, check_unused, part_of, parts_of


class RoutingRecorder:
    """An ``Observe`` that writes every token's experts and weights to ``path``, a routing trace (``docs/traces.md``).

    Each rank with sequences of its own appends to its part, ``path.rankN.part``, step by step; ``finish`` makes one
    file of them, which needs a folder that all ranks see. A run that is killed leaves the parts, and
    ``RoutingTrace.load(path)`` reads these: nothing is lost but, on a GPU, the step that was running. A step is
    copied to the host while the next one runs, so nothing waits for the device.

    As a context manager it finishes at the end. After an error it does so on a single rank; several leave their parts.

    Args:
        meta: JSON values to keep in the trace, such as the model and the prompts.
    """

    def __init__(self, model: Transformer, path: str | Path, meta: Mapping[str, Any] | None = None) -> None:
        self.context, self.path = model.context, Path(path)
        config = model.params
        self._part: PartWriter | None = None
        self._pending: _Step | None = None
        with self.context.agreed():
            if self.context.is_first:
                check_unused(self.path)
        with self.context.agreed():
            if model.layout.parallel.attention == "dp" or self.context.is_first:
                part = part_of(self.path, self.context.rank)
                self._part = PartWriter(part, config.num_experts, config.n_layers, config.num_experts_per_tok, meta)

    def __call__(self, batch: ForwardBatch, reports: list[MoEReport]) -> None:
        if self._part is None:
            return
        self._flush()
        if batch.spans:
            self._pending = _Step(batch.spans, reports)
            if self.context.device.type == "cpu":
                self._flush()

    def __enter__(self) -> RoutingRecorder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
            return
        with contextlib.suppress(Exception):  # the first error is the one to report; the parts are there
            if self.context.world_size == 1:
                self.finish()
            else:
                self._close()

    def finish(self) -> None:
        """Writes the trace from the parts of all ranks and removes these. Collective."""
        with self.context.agreed():
            self._close()
        with self.context.agreed():
            if self.context.is_first:
                parts = parts_of(self.path)
                RoutingTrace.from_parts(self.path).save(self.path)
                for part in parts:
                    part.unlink()

    def _close(self) -> None:
        if self._part is not None:
            self._flush()
            self._part.close()

    def _flush(self) -> None:
        step, self._pending = self._pending, None
        if step is not None:
            step.write(self._part)


class _Step:
    """One step's routing on its way to the host."""

    def __init__(self, spans: tuple[Span, ...], reports: list[MoEReport]) -> None:
        self._spans = spans
        self._experts_LTK = _to_host(torch.stack([r.routing.experts_TK for r in reports]).to(torch.int16))
        self._weights_LTK = _to_host(torch.stack([r.routing.weights_TK for r in reports]).to(torch.float16))
        self._copied = None
        if reports[0].routing.experts_TK.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def write(self, part: PartWriter) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # a step later it is there: the engine has read what was sampled since
        spans = [number for s in self._spans for number in (s.sequence, s.position, s.stop - s.start)]
        part.add(spans, self._experts_LTK.numpy(), self._weights_LTK.numpy())


def _to_host(x: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def together(*observers: Observe | None) -> Observe | None:
    """One observer that calls those which are not None in turn; None for none."""
    wanted = [observer for observer in observers if observer is not None]
    if len(wanted) < 2:
        return wanted[0] if wanted else None

    def observe(batch: ForwardBatch, reports: list[MoEReport]) -> None:
        for observer in wanted:
            observer(batch, reports)

    return observe
