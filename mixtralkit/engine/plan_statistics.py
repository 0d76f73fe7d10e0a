"""What a plan manager did, how long steps waited for it, and how they ran."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

PAUSE_BOUNDS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Pauses:
    """Times between two steps, on this rank.

    Attributes:
        count, total_s, longest_s: of them.
        histogram: how many were shorter than each of ``PAUSE_BOUNDS_MS`` and not than the bound before; last, the rest.
    """

    count: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0
    histogram: tuple[int, ...] = (0,) * (len(PAUSE_BOUNDS_MS) + 1)

    def with_one(self, seconds: float) -> Pauses:
        """These and one more."""
        at = sum(1e3 * seconds >= bound for bound in PAUSE_BOUNDS_MS)
        histogram = tuple(count + (i == at) for i, count in enumerate(self.histogram))
        return Pauses(self.count + 1, self.total_s + seconds, max(self.longest_s, seconds), histogram)

    @property
    def mean_s(self) -> float:
        return self.total_s / self.count if self.count else 0.0


@dataclass(frozen=True)
class PlanStatistics:
    """What a manager did so far; the same on every rank, but for times, which do not count in comparisons.

    Attributes:
        considered: plans made, one a window.
        adopted: those of which at least one layer was moved.
        layers_kept: layers whose new slots were those they had, or did not pay.
        layers_moved, experts_moved, bytes_moved: layers that moved, and what crossed from rank to rank.
        layers_relocated: those of ``layers_moved`` whose slots got other addresses, so that graphs were forgotten.
        plain_steps: steps with prompts, launched kernel by kernel.
        launched_steps: decode steps run kernel by kernel.
        graph_steps: decode steps that were replays of a graph.
        recaptures, recapture_s: graphs captured again after they were forgotten, and seconds that steps waited for it.
        pauses: between two steps: planning, agreeing, moving. What rank 0 plans while the device is at a step is none.
        longest_move_s: of the pauses, the longest time in which a layer moved, without planning.
    """

    considered: int = 0
    adopted: int = 0
    layers_kept: int = 0
    layers_moved: int = 0
    experts_moved: int = 0
    bytes_moved: int = 0
    layers_relocated: int = 0
    plain_steps: int = 0
    launched_steps: int = 0
    graph_steps: int = 0
    recaptures: int = 0
    recapture_s: float = field(default=0.0, compare=False)
    pauses: Pauses = field(default_factory=Pauses, compare=False)
    longest_move_s: float = field(default=0.0, compare=False)

    def plus(self, **more: float) -> PlanStatistics:
        """These and more of what is counted."""
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})

    def __str__(self) -> str:
        pauses = self.pauses
        return (
            f"plans: {self.considered} considered, {self.adopted} adopted; layers: {self.layers_moved} moved, "
            f"{self.layers_kept} kept; {self.experts_moved} experts, {self.bytes_moved / 1e6:,.3f} MB; "
            f"longest pause {pauses.longest_s * 1e3:.1f} ms, mean {pauses.mean_s * 1e3:.1f} of {pauses.count}; "
            f"steps: {self.plain_steps} plain, {self.launched_steps} launched, {self.graph_steps} graphs; "
            f"{self.recaptures} recaptures, {self.recapture_s:.2f} s"
        )
