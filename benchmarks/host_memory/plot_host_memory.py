"""The picture and the tables of docs/host-memory.md: what ``bench_host_memory`` measured, beside the bound.

    python -m benchmarks.host_memory.plot_host_memory host-memory.json docs/images/host-memory.png \\
        --page docs/host-memory.md --keep benchmarks/results/host-memory-h200.json --commit COMMIT
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtralkit.cli.run import command, run_tool

Line = Mapping[str, Any]
COLOURS = {"even": "#0072B2", "trace": "#D55E00"}  # of Okabe and Ito, which do not depend on telling red from green
NAMES = {"even": "choices drawn evenly", "trace": "choices of a real trace"}
FORMATS = {"none": "bf16"}  # by their names in the options, those that have another
BEGIN, END = "<!-- measured: made by plot_host_memory -->\n", "<!-- end of what was measured -->"
BOUND = ("step, ms", "bound, ms", "of bound")
RATES = ("experts", "MB each", "pinned copies, GB/s", "CPU, one row, GB/s", "both at once, GB/s", "commit")
STEPS = ("GB, experts, choices", "on the GPU", "tokens/s", *BOUND, "hits", "misses a step", "commit")
BATCHES = (
    "GB, experts, sequences",
    "on the GPU",
    "tokens/s",
    *BOUND,
    "hits",
    "misses a step",
    "fetched whole",
    "commit",
)
PROMPTS = ("GB, experts, tokens", "on the GPU", "ms", "all on the GPU, ms", "on the bus, ms", "of the larger", "commit")


@command
def plot_host_memory(
    results: Path, picture: Path, page: Path | None = None, keep: Path | None = None, commit: tuple[str, ...] = ()
) -> None:
    """Draws RESULTS to PICTURE and prints the tables in Markdown.

    Args:
        results: JSON with the lines of bench_host_memory as its runs, or the file of lines that it wrote, or several of
            these one behind the other.
        picture: .png
        page: takes the tables in place of those it has.
        keep: takes the lines as JSON of the project's results.
        commit: what was measured, for each of these, where the machine did not know it.
    """
    lines = read_lines(results)
    for machine, of in zip((line for line in lines if line["measured"] == "machine"), commit, strict=False):
        machine["commit"] = of
    draw([line for line in lines if line["measured"] == "decode" and line["batch"] == 1], picture)
    tables = render(lines)
    print(tables)
    if page is not None:
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        page.write_text(before + BEGIN + tables + END + rest.split(END)[1], encoding="utf-8")
    if keep is not None:
        runs = ",\n".join(f"  {json.dumps(line)}" for line in lines)
        keep.write_text(f'{{\n "benchmark": "host_memory",\n "runs": [\n{runs}\n ]\n}}\n', encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Measurements of a file, as committed or as the benchmark writes it."""
    text = path.read_text(encoding="utf-8")
    try:
        lines = json.loads(text)["runs"]
    except ValueError:
        lines = [json.loads(line) for line in text.splitlines()]
    return lines


def render(lines: Sequence[Line]) -> str:
    """All that the page says of them."""
    of, commit = {kind: [] for kind in ("machine", "rates", "decode", "prompt")}, None
    for line in lines:
        commit = (line["commit"] or "") if line["measured"] == "machine" else commit
        of.get(line["measured"], []).append({**line, "commit": commit})
    formats = list(dict.fromkeys(line["quantize"] for line in of["decode"]))
    of["decode"].sort(key=lambda line: (formats.index(line["quantize"]), -line["budget_gb"]))
    single, batches = ([line for line in of["decode"] if (line["batch"] > 1) == many] for many in (False, True))
    said = "; ".join(
        f"experts in {', '.join(map(name_of, each['quantize']))}: "
        f"{each['gpu']}, {each['cores']} cores, {each['date']}, commit {each['commit']}" for each in of["machine"]
    )  # fmt: skip
    tables = (
        (RATES, map(rate_cells, of["rates"])), (STEPS, map(cells, single)), (BATCHES, map(cells, batches)),
        (PROMPTS, map(prompt_cells, of["prompt"])),
    )  # fmt: skip
    return "\n".join([f"{said[0].upper()}{said[1:]}.\n", *(_table(heads, rows) for heads, rows in tables)])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows))


def name_of(name: str) -> str:
    """A format of experts, as the page calls it."""
    return FORMATS.get(name, name)


def rate_cells(line: Line) -> list[str]:
    cpu, both = line["cpu_gb_s"].get("1"), line.get("both_gb_s")
    together = "" if both is None else f"{both[0]:.1f} + {both[1]:.1f}"
    return [
        name_of(line["quantize"]), f"{line['expert_mb']:.1f}", f"{line['bus_gb_s']:.1f}",
        "" if cpu is None else f"{cpu:.1f}", together, line["commit"],
    ]  # fmt: skip


def cells(line: Line) -> list[str]:
    """A row of the table of steps, of one sequence or of several."""
    last = line["routing"] if line["batch"] == 1 else f"{line['batch']} behind {line['context']:,} tokens"
    more = [] if line["batch"] == 1 else [f"{line['fetches']:.1f}"]
    return [
        f"{line['budget_gb']:g}, {name_of(line['quantize'])}, {last}", str(line["places"]),
        f"{1e3 * line['batch'] / line['step_ms']:.1f}", f"{line['step_ms']:.1f}", f"{line['bound_ms']:.1f}",
        f"{line['of_bound']:.2f}", f"{line['hit_rate']:.1%}", f"{line['misses']:.1f}", *more,
        line["commit"],
    ]  # fmt: skip


def prompt_cells(line: Line) -> list[str]:
    forms = (("places", ""), ("ms", ".0f"), ("resident_ms", ".0f"), ("bus_ms", ".0f"), ("of_bound", ".2f"))
    first = f"{line['budget_gb']:g}, {name_of(line['quantize'])}, {line['tokens']:,}"
    return [first, *(f"{line[key]:{form}}" if key in line else "" for key, form in forms), line["commit"]]


def draw(lines: Sequence[Line], path: Path) -> None:
    """Tokens a second against the budget, one sequence; a panel for each format."""
    from matplotlib.figure import Figure

    formats = list(dict.fromkeys(line["quantize"] for line in lines))
    figure = Figure(figsize=(1.2 + 4.8 * len(formats), 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(formats), squeeze=False)[0], formats, strict=True):
        own = [line for line in lines if line["quantize"] == kind]
        for routing, colour in COLOURS.items():
            drawn = sorted((line for line in own if line["routing"] == routing), key=lambda line: line["budget_gb"])
            budgets = [line["budget_gb"] for line in drawn]
            measured, bound = ([1e3 / line[key] for line in drawn] for key in ("step_ms", "bound_ms"))
            marker = "o" if routing == "even" else "s"
            axes.plot(budgets, measured, color=colour, marker=marker, label=f"{NAMES[routing]}, measured")
            axes.plot(budgets, bound, color=colour, marker=marker, linestyle=":", fillstyle="none", label="… bound")
        axes.set(
            title=f"experts in {name_of(kind)}", xlabel="memory of the GPU for everything, GB",
            ylabel="tokens/s, one sequence", ylim=(0, None), xticks=sorted({line["budget_gb"] for line in own}),
        )  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_tool(plot_host_memory)
