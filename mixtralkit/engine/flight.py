"""A step that was launched, and its values once they are on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from mixtralkit.engine.requests import MOST_TOP_LOGPROBS, Top
from mixtralkit.engine.step_plan import StepPlan
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.moe.layer import MoEReport

SAMPLED_SIZE = 12  # bytes of a sampled token: its int64 id and its float32 log-probability
TOP_SIZE = 8 * MOST_TOP_LOGPROBS  # bytes of the likeliest tokens in a place: ids and log-probabilities in float32


def unpacked(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 tokens [B] and float32 log-probabilities [B] in bytes [12 B]."""
    end = len(packed) * 2 // 3
    return packed[:end].view(torch.int64), packed[end:].view(torch.float32)


@dataclass(frozen=True)
class Values:
    """What a step gave to an owner's sequences: of the sampled rows in their order, and of the scored ones; where
    asked for, int16 experts [T, L, K] of all rows."""

    tokens: list[int]
    logprobs: list[float]
    tops: list[Top]
    scores: list[float]
    score_tops: list[Top]
    experts_TLK: np.ndarray | None = None


@dataclass(frozen=True)
class Flight:
    """A step that was launched, and what it gives when it is done.

    ``kind`` says how it ran: ``"graph"``, ``"launched"`` kernel by kernel, or ``"mixed"``, with chunks. ``batch`` are
    this rank's rows where somebody looks at them. ``reports`` are those of its rows, the ones that only fill behind,
    and ``counts_LE`` (int64) the choices of each expert by the others, where they are counted; the next launch may
    overwrite both. ``packed`` [W, bytes] is on the host, with its values once ``done`` has passed: of ``room`` sampled
    and ``scored`` rows, and the experts of all rows, ``routed`` their shape. ``recapture_s`` is that of ``graphs.Run``.
    """

    plan: StepPlan
    kind: str
    batch: ForwardBatch | None
    reports: list[MoEReport]
    counts_LE: torch.Tensor | None
    packed: torch.Tensor
    room: int
    scored: int
    routed: tuple[int, int, int]
    done: torch.cuda.Event | None
    recapture_s: float

    @property
    def is_running(self) -> bool:
        """Whether the device is still at it; does not wait. On a CPU a launch ends with its step."""
        return self.done is not None and not self.done.query()

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()

    def values(self, owner: int) -> Values:
        """What an owner's sequences got. Waits for the step."""
        self.wait()
        packed = self.packed[owner].clone()  # it may start where no int64 may
        sampled = SAMPLED_SIZE * self.room
        scored = sampled + 4 * self.scored
        tokens_B, logprobs_B = unpacked(packed[:sampled])
        scores = packed[sampled:scored].view(torch.float32).tolist()
        tops = []
        if self.plan.tops:
            rows = self.room + self.scored
            tops_N2K = packed[scored : scored + TOP_SIZE * rows].view(torch.float32).view(rows, 2, -1).tolist()
            tops = [tuple(zip(map(int, ids), logprobs, strict=True)) for ids, logprobs in tops_N2K]
        experts_TLK = None
        if self.plan.routed:
            start = scored + (TOP_SIZE * (self.room + self.scored) if self.plan.tops else 0)
            end = start + 2 * math.prod(self.routed)
            experts_TLK = packed[start:end].clone().view(torch.int16).view(self.routed).numpy()
        tops, score_tops = tops[: self.room], tops[self.room :]
        return Values(tokens_B.tolist(), logprobs_B.tolist(), tops, scores, score_tops, experts_TLK)

    def loads_LE(self) -> np.ndarray:
        """int64 choices of each expert by the rows of all ranks, where they travel with the answers. Waits."""
        self.wait()
        counts_WN = self.packed[:, -8 * self.counts_LE.numel() :].clone(memory_format=torch.contiguous_format)
        return counts_WN.view(torch.int64).sum(0).view(self.counts_LE.shape).numpy()
