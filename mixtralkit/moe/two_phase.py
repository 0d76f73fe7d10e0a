"""Lina's two phases while the model runs: weights for the next layer move while this one computes (ATC'23, §5).

::

    gate of i ── counts, paths ─── experts of i ─┬─ attention ─ gate of i+1 ── counts ──► phase two: keep, or correct
                     └───────► estimate of i+1 ──┴─► phase one: copies move ────────────►

The estimate travels in the all-gather that brings the counts of layer i, so that every rank decides alike and none has
to be told. Phase one chooses when the device has the experts of layer i to do, so that it waits for no choice. Copies
of hot experts on every rank (``moe/shadow.py``) are the means. See docs/two-phase.md.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist

from mixtralkit.config import ModelConfig, MoEOptions
from mixtralkit.moe.shadow import Shadows
from mixtralkit.ops.counting import count_keys
from mixtralkit.planning.policies.two_phase import check_estimate
from mixtralkit.planning.popularity import PathPopularity, extend_paths

TABLES_GB = 1.0  # most memory for the chances of all paths, in 10⁹ bytes
Moment = float | torch.cuda.Event


@dataclass(frozen=True)
class Timing:
    """When weights moved and when this rank waited for them; each rank has its own.

    Attributes:
        started, arrived: of phase one's copies.
        needed, there: before and after waiting for these.
        corrected: after phase two's own copies.
    """

    started: Moment
    arrived: Moment
    needed: Moment
    there: Moment
    corrected: Moment

    @property
    def hidden_s(self) -> float:
        """Seconds that weights moved while the rank did other work; on a GPU it waits for the device."""
        return max(0.0, _seconds(self.started, self.arrived) - _seconds(self.needed, self.there))

    @property
    def waited_s(self) -> float:
        """Seconds that the rank could not go on because weights moved; on a GPU it waits for the device."""
        return _seconds(self.needed, self.corrected)


@dataclass(frozen=True)
class PhaseReport:
    """How a layer's estimate fared; the same on every rank, but for the timing.

    Attributes:
        right: whether the estimated 2K most popular experts were the real ones.
        distance: total-variation distance [0, 1] of the estimated and the real shares.
        corrected: whether phase two chose again, with the real counts.
        bytes_ahead: weights that phase one moved, out of ``ShadowReport.bytes_broadcast``.
        timing: None where nothing moved.
    """

    right: bool
    distance: float
    corrected: bool
    bytes_ahead: int
    timing: Timing | None = field(default=None, compare=False)


class Move:
    """Weights on their way to every rank, beside what the device computes meanwhile.

    They have a group of their own, and on a GPU a stream of their own, so that no row queues behind them.
    """

    def __init__(self, group: dist.ProcessGroup, stream: torch.cuda.Stream | None) -> None:
        self._group, self._stream, self._moved = group, stream, False
        self._works: list[dist.Work] = []
        self._arrivals: list[float] = []
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))  # whoever reads a place we write is before us
        self._started = _now(stream)

    def carry(self, weights: torch.Tensor, owner: int, theirs: torch.Tensor | None) -> None:
        """Has weights on their way; a ``store.Carry``."""
        self._moved = True
        on_stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with on_stream:
            if theirs is not None:
                if dist.get_rank(self._group) != owner:
                    weights.copy_(theirs, non_blocking=True)
                return
            work = dist.broadcast(weights, group_src=owner, group=self._group, async_op=True)
            if self._stream is not None:
                work.wait()  # holds up the stream, not the host
            else:
                work.get_future().add_done_callback(lambda _: self._arrivals.append(time.perf_counter()))
        self._works.append(work)

    def __bool__(self) -> bool:
        return self._moved

    def finish(self) -> tuple[Moment, Moment, Moment, Moment]:
        """Work from here on sees the weights; the first four moments of a ``Timing``, all the same if none moved."""
        if not self._moved:
            return (_now(self._stream and torch.cuda.current_stream(self._stream.device)),) * 4
        if self._stream is None:
            needed = _now(None)
            for work in self._works:
                work.wait()
            there = _now(None)
            is_known = len(self._arrivals) == len(self._works)  # the last call-back may be on its way
            return self._started, max(self._arrivals) if is_known else there, needed, there
        current = torch.cuda.current_stream(self._stream.device)
        arrived, needed = _now(self._stream), _now(current)
        current.wait_event(arrived)
        return self._started, arrived, needed, _now(current)


@dataclass(frozen=True)
class _Ahead:
    """What phase one did for a layer: by which estimate, what moves, and how."""

    estimate_E: np.ndarray
    experts: list[int]
    move: Move


class Flight:
    """One step's way through the layers: the paths of its rows, and what is under way for the next layer.

    A layer calls ``at`` with its choices and ``ahead`` when the device has its experts to do.
    """

    def __init__(self, phases: TwoPhase) -> None:
        self._phases = phases
        self._paths_T: torch.Tensor | int = 0
        self._counts: tuple[np.ndarray, np.ndarray | None] | None = None
        self._ahead: _Ahead | None = None

    def at(self, layer: int, experts_TK: torch.Tensor) -> PhaseReport | None:
        """Brings what these rows want of the layer and is not there. Collective.

        Layers are visited in order. The first has no estimate: it chooses by its real counts alone.

        Args:
            experts_TK: int64 choices of this rank's rows, before any capacity.
        """
        self._counts = self._gather(layer, experts_TK)
        return self._second_phase(layer, self._counts[0], experts_TK.shape[1])

    def ahead(self, layer: int) -> None:
        """Has the next layer's copies on their way, by the estimate of ``at``. Collective."""
        shadows, (real_E, estimate_E) = self._phases.shadows, self._counts
        shadows.refresh(layer, real_E / shadows.replicas_E(layer))
        self._ahead = None
        if estimate_E is None:
            return
        hidden_s = shadows.inference.s_per_row * real_E.sum() / shadows.context.world_size
        move, loads_E = self._phases.move(), estimate_E / shadows.replicas_E(layer + 1)
        # What an even share of this layer's rows takes costs nothing.
        experts = shadows.bring(layer + 1, loads_E, hidden_s, move.carry, in_use=layer)
        if experts:
            shadows.store.publish(layer + 1)  # whose rows come after ``finish``
        self._ahead = _Ahead(estimate_E, experts, move)

    def _gather(self, layer: int, experts_TK: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Counts of this layer and the estimate for the next, of all ranks, in one message."""
        popularity, following = self._phases.popularity, layer + 1
        message = [count_keys(experts_TK, popularity.num_experts).double()]
        if following < popularity.num_layers:
            self._paths_T = extend_paths(
                self._paths_T, experts_TK[:, 0], popularity.path_length, popularity.num_experts
            )
            message.append(self._phases.estimate(following, self._paths_T))
        gathered = self._phases.context.all_gather(torch.stack(message)).cpu().numpy().sum(0)  # host sync
        return gathered[0], gathered[1] if len(gathered) > 1 else None

    def _second_phase(self, layer: int, real_E: np.ndarray, top_k: int) -> PhaseReport | None:
        """Keeps phase one's choice, or chooses again by the real counts and waits for what is missing."""
        phases, ahead = self._phases, self._ahead
        shadows, loads_E = phases.shadows, real_E / phases.shadows.replicas_E(layer)
        if ahead is None:
            if shadows.bring(layer, loads_E):
                shadows.store.publish(layer)
            return None
        moments = ahead.move.finish()
        check = check_estimate(ahead.estimate_E, real_E, top_k, phases.threshold)
        late = shadows.bring(layer, loads_E) if check.corrected else []
        if late:
            shadows.store.publish(layer)
        timing = Timing(*moments, phases.now()) if ahead.move or late else None
        size = len(ahead.experts) * shadows.store.expert_bytes
        return PhaseReport(check.right, check.distance, check.corrected, size, timing)


class TwoPhase:
    """What the steps of a model share: the chances of every path, the rule for corrections, the means to move."""

    def __init__(self, shadows: Shadows, popularity: PathPopularity, threshold: float | None = None) -> None:
        """``threshold`` is ``MoEOptions.finetune_threshold``."""
        self.shadows, self.popularity, self.threshold = shadows, popularity, threshold
        self.context = shadows.context
        self._tables = self._dense_tables()

    @classmethod
    def for_model(cls, shadows: Shadows | None, config: ModelConfig, options: MoEOptions) -> TwoPhase | None:
        """As the options say; None where they do not, or where no rows travel.

        Raises:
            ValueError: the profile cannot be read, or is of another model.
        """
        if options.dynamic != "two_phase":
            return None
        popularity = PathPopularity.load(options.popularity)
        for name, wanted in (
            ("num_layers", config.n_layers),
            ("num_experts", config.num_experts),
            ("top_k", config.num_experts_per_tok),
        ):
            if getattr(popularity, name) != wanted:
                raise ValueError(
                    f"{options.popularity}: {name} ({getattr(popularity, name)}) must be the model's {wanted}"
                )
        return None if shadows is None else cls(shadows, popularity, options.finetune_threshold)

    def begin(self) -> Flight | None:
        """A step's state, for every layer in turn; None in training, where copies last for one layer."""
        return None if torch.is_grad_enabled() else Flight(self)

    def estimate(self, layer: int, paths_T: torch.Tensor) -> torch.Tensor:
        """float64 [E], ``PathPopularity.estimate`` on the device, for rows with these paths up to the layer before."""
        return self._tables[layer][paths_T].double().sum(0)

    def move(self) -> Move:
        """A new move of weights, beside the rest."""
        return Move(self._group, self._stream)

    def now(self) -> Moment:
        """This moment in the work of this rank."""
        return _now(None if self._stream is None else torch.cuda.current_stream(self.context.device))

    @cached_property
    def _group(self) -> dist.ProcessGroup:
        group = dist.new_group(backend=dist.get_backend(self.context.group))  # collective: made in the first step
        dist.all_reduce(torch.zeros(1, device=self.context.device), group=group)  # connects, which is no move's time
        return group

    @cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.context.device) if self.context.device.type == "cuda" else None

    def _dense_tables(self) -> list[torch.Tensor]:
        """K · P_path(e) of every layer, float32 [paths, E]: a look-up needs no host."""
        popularity, experts = self.popularity, self.popularity.num_experts
        paths = [experts ** min(popularity.path_length, layer) for layer in range(popularity.num_layers)]
        size_gb = sum(paths) * experts * 4 / 1e9
        if size_gb > TABLES_GB:
            raise ValueError(
                f"popularity: paths of path_length ({popularity.path_length}) layers over {experts} experts take "
                f"{size_gb:.3g} GB, at most {TABLES_GB:g} is possible; profile shorter paths"
            )
        chances = (popularity.predict(layer, np.arange(count)) for layer, count in enumerate(paths))
        return [torch.from_numpy(popularity.top_k * table).to(self.context.device) for table in chances]


def _now(stream: torch.cuda.Stream | None) -> Moment:
    if stream is None:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _seconds(start: Moment, end: Moment) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
