"""A picture of one call of the MoE layer: what every rank does when, for chosen variants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.layer.timing import Marks

COLOURS = {
    "gate": "#7f7f7f",
    "permute": "#bcbd22",
    "dispatch": "#1f77b4",
    "experts": "#2ca02c",
    "combine": "#ff7f0e",
    "several in one": "#9467bd",
}
LEAST_SHARE = 0.045  # of the picture's width, below which a bar has no room for its time


@dataclass(frozen=True)
class Timeline:
    """One variant's call: phases of every rank, and the median of whole calls (ms)."""

    name: str
    ranks: list[Marks]
    ms: float


def require_matplotlib() -> None:
    """ValueError without it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'mixtralkit[plot]'") from None


def draw(timelines: list[Timeline], title: str, path: Path) -> None:
    """One panel a variant, one row a rank, one bar a phase, on a common scale.

    A bar's length is the time to the end of the phase on that rank, so what a rank waits for others is in it.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = len(timelines[0].ranks)
    longest = max(marks[-1][2] for line in timelines for marks in line.ranks)
    kinds = {_kind(name) for line in timelines for marks in line.ranks for name, _, _ in marks}
    figure = Figure(figsize=(10, 1.1 + len(timelines) * (0.85 + 0.3 * ranks)), layout="constrained")
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axes, line in zip(panels, timelines, strict=True):
        for rank, marks in enumerate(line.ranks):
            for name, start, end in marks:
                axes.barh(rank, end - start, left=start, height=0.8, color=COLOURS[_kind(name)], edgecolor="white")
                if end - start > LEAST_SHARE * longest:
                    place = ((start + end) / 2, rank)
                    axes.annotate(f"{end - start:.3g}", place, ha="center", va="center", fontsize=8, color="white")
        fused = sorted({name for marks in line.ranks for name, _, _ in marks if "+" in name})
        note = f"; in one: {', '.join(fused)}" if fused else ""
        axes.set_title(f"{line.name}: one call; median of whole calls {line.ms:.3g} ms{note}", fontsize=10, loc="left")
        axes.set(yticks=range(ranks), yticklabels=[f"rank {rank}" for rank in range(ranks)], xlim=(0, 1.01 * longest))
        axes.invert_yaxis()
    panels[-1].set_xlabel("ms since the first rank began; waiting for other ranks is part of a phase")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in kinds]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None


def _kind(phase: str) -> str:
    return phase if phase in COLOURS else "several in one"
