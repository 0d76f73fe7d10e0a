"""The picture of ``bench_quality.py``: accuracy, bits per byte and dropped rows over the cold capacity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Colours of Okabe and Ito, which do not depend on telling red from green; lines differ in style too.
LINES = {
    ("hot/cold", "drop", "weight"): ("#0072B2", "o-", "drop the lightest"),
    ("hot/cold", "drop", "arrival"): ("#56B4E9", "o--", "drop the last to arrive"),
    ("hot/cold", "reroute", "weight"): ("#D55E00", "s-", "reroute the lightest"),
    ("hot/cold", "reroute", "arrival"): ("#E69F00", "s--", "reroute the last to arrive"),
    ("contiguous", "drop", "weight"): ("#666666", "^:", "drop the lightest, no hot copies"),
}


def draw(summary: dict[str, Any], path: Path) -> None:
    """Writes the picture to ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    exact = summary["results"][0]["scores"]["all"]
    _draw_lines(left, summary, lambda row: 100 * row["scores"]["all"]["accuracy"]["value"])
    left.axhline(100 * exact["accuracy"]["value"], color="black", linewidth=1, label="no capacity (exact)")
    left.axhline(100 * summary["unigram"]["all"]["accuracy"]["value"], color="black", linewidth=1, linestyle="-.")
    left.axhline(100 * summary["chance"], color="black", linewidth=1, linestyle=":")
    left.set(title="Right continuations of four", ylabel="%", ylim=(0, 100))
    left.text(0.98, 100 * summary["chance"] + 1.5, "unigram (dash-dot), chance (dots)", ha="left", va="bottom")
    _draw_lines(middle, summary, lambda row: row["scores"]["all"]["bits_per_byte"]["value"])
    middle.axhline(exact["bits_per_byte"]["value"], color="black", linewidth=1)
    middle.set(title="Texts (lower is better)", ylabel="bits per byte")
    _draw_lines(right, summary, lambda row: 100 * row["dropped"])
    right.set(title="Dropped choices", ylabel="% of all", ylim=(0, None))
    for axes in (left, middle, right):
        axes.invert_xaxis()
        axes.set(xlabel="cold capacity, multiples of the even share")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _draw_lines(axes, summary: dict[str, Any], value: Callable[[dict[str, Any]], float]) -> None:
    with_capacity = [row for row in summary["results"] if row["factor"] is not None]
    for key, (colour, style, label) in LINES.items():
        rows = [row for row in with_capacity if (row["placement"], row["overflow"], row["order"]) == key]
        axes.plot([row["factor"] for row in rows], [value(row) for row in rows], style, color=colour, label=label)
    axes.set_xticks(sorted({row["factor"] for row in with_capacity}))
