"""The picture and the table of docs/host-memory.md: what ``bench_host_memory`` measured, by budget, beside the bound.

python -m benchmarks.host_memory.plot_host_memory benchmarks/results/host-memory-h200.json docs/images/host-memory.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtralkit.cli.run import command, run_tool

Line = Mapping[str, Any]
COLOURS = {"even": "#0072B2", "trace": "#D55E00"}  # of Okabe and Ito, which do not depend on telling red from green
NAMES = {"even": "choices drawn evenly", "trace": "choices of a real trace"}
HEADS = ("GB, choices", "experts on the GPU", "tokens/s", "step, ms", "bound, ms", "of bound", "hits", "misses a step")


@command
def plot_host_memory(results: Path, picture: Path) -> None:
    """Draws RESULTS to PICTURE and prints the table in Markdown.

    Args:
        results: JSON with the lines of bench_host_memory as its runs, or the file of lines that it wrote.
        picture: .png
    """
    lines = [line for line in read_lines(results) if line["measured"] == "decode" and line["batch"] == 1]
    draw(lines, picture)
    rows = [HEADS, ["---"] * len(HEADS), *map(cells, lines)]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def read_lines(path: Path) -> list[Line]:
    """Measurements of a file, as committed or as the benchmark writes it."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)["runs"]
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]


def cells(line: Line) -> list[str]:
    """A row of the table."""
    return [
        f"{line['budget_gb']:g}, {line['routing']}", str(line["places"]), f"{1e3 / line['step_ms']:.1f}",
        f"{line['step_ms']:.1f}", f"{line['bound_ms']:.1f}", f"{line['of_bound']:.2f}", f"{line['hit_rate']:.1%}",
        f"{line['misses']:.1f}",
    ]  # fmt: skip


def draw(lines: Sequence[Line], path: Path) -> None:
    """Tokens a second against the budget, one sequence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for routing, colour in COLOURS.items():
        own = sorted((line for line in lines if line["routing"] == routing), key=lambda line: line["budget_gb"])
        budgets = [line["budget_gb"] for line in own]
        measured, bound = ([1e3 / line[key] for line in own] for key in ("step_ms", "bound_ms"))
        marker = "o" if routing == "even" else "s"
        axes.plot(budgets, measured, color=colour, marker=marker, label=f"{NAMES[routing]}, measured")
        axes.plot(budgets, bound, color=colour, marker=marker, linestyle=":", fillstyle="none", label="… bound")
    axes.set(
        xlabel="memory of the GPU for everything, GB", ylabel="tokens/s, one sequence", ylim=(0, None),
        xticks=sorted({line["budget_gb"] for line in lines}),
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_tool(plot_host_memory)
