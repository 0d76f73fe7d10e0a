"""Pictures of ``bench_two_phase.py``: how often estimates are right, what corrections cost, and what a step takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRACES = {"shipped": "tab:blue", "synthetic": "tab:orange"}


def draw(summary: dict[str, Any], folder: Path) -> None:
    """Writes ``two-phase-estimates.png`` and ``two-phase-moves.png`` to ``folder``."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    results = summary["results"]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_right(left, results)
    _draw_corrected(right, results)
    figure.savefig(folder / "two-phase-estimates.png", dpi=90)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, trace in zip(figure.subplots(1, 2), TRACES, strict=True):
        _draw_moves(axes, results, trace)
    figure.savefig(folder / "two-phase-moves.png", dpi=90)


def _of(results: list[dict[str, Any]], trace: str, **wanted: Any) -> list[dict[str, Any]]:
    runs = [run for run in results if run["trace"] == trace and run["kind"] == "two_phase" and "timed" not in run]
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def _draw_right(axes, results: list[dict[str, Any]]) -> None:
    for trace, colour in TRACES.items():
        runs = _of(results, trace, threshold=None)
        axes.plot([r["path_length"] for r in runs], [100 * r["right"] for r in runs], "o-", color=colour, label=trace)
    axes.set(
        xlabel="layers of a path, l", ylabel="%", title="Estimated top 2K experts are the real ones", ylim=(0, 100)
    )
    axes.legend()


def _draw_corrected(axes, results: list[dict[str, Any]]) -> None:
    for trace, colour in TRACES.items():
        for length, style in ((0, ":"), (1, "--"), (3, "-")):
            runs = [run for run in _of(results, trace, path_length=length) if run["threshold"] is not None]
            x, y = [r["threshold"] for r in runs], [100 * r["corrected"] for r in runs]
            axes.plot(x, y, style, color=colour, label=f"{trace}, l = {length}")
    axes.set(xlabel="--finetune_threshold", ylabel="% of layers and steps", title="Corrections", ylim=(0, 100))
    axes.legend()


def _draw_moves(axes, results: list[dict[str, Any]], trace: str) -> None:
    """Bytes a step: ahead, and late by a correction, for Lina's rule and each threshold at l = 3."""
    runs = _of(results, trace, path_length=3)
    names = ["top 2K" if run["threshold"] is None else f"{run['threshold']:g}" for run in runs]
    ahead = [run["bytes_ahead"] / 1e6 for run in runs]
    # Layer 0 has no estimate, so what it moves is late as well.
    late = [run["bytes"] / 1e6 - part for run, part in zip(runs, ahead, strict=True)]
    shadow = next(run for run in results if run["trace"] == trace and run["kind"] == "shadow")
    names, ahead, late = ["shadow", *names], [0.0, *ahead], [shadow["bytes"] / 1e6, *late]
    axes.bar(names, ahead, color="tab:green", label="ahead (phase one)")
    axes.bar(names, late, bottom=ahead, color="tab:red", label="after the gate")
    axes.set(xlabel="rule of phase two", title=f"{trace}: weights moved, l = 3")
    axes.set(ylabel="MB a step", ylim=(0, 1.3 * max(map(sum, zip(ahead, late, strict=True)))))
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(loc="upper left", ncols=2)
