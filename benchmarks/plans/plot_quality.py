"""The picture and the tables of ``bench_quality.py``: accuracy, bits per byte and cut choices by cold capacity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    left.set(title="Right continuations of four", ylabel="%", ylim=(20, 80))
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


def capacity_table(summary: dict[str, Any]) -> str:
    """A line for each rule, in Markdown; what differs from no capacity with p < 0.05 is bold."""
    heads = ("placement", "capacity", "overflow", "keeps", "dropped", "rerouted", "right of four", "bits per byte")
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in summary["results"]:
        rule = ("none", "", "")
        if row["factor"] is not None:
            keeps = {"weight": "heaviest", "arrival": "first to arrive"}[row["order"]]
            rule = (f"{row['factor']:g}", row["overflow"], keeps)
        cut = (f"{row['dropped']:.1%}", f"{row['rerouted']:.1%}")
        lines.append(_line([row["placement"], *rule, *cut, *_marked(row)]))
    return "\n".join(lines)


def _marked(row: dict[str, Any]) -> list[str]:
    cells = []
    for metric, form in (("accuracy", ".1%"), ("bits_per_byte", ".3f")):
        text = format(row["scores"]["all"][metric]["value"], form)
        against = row["against_exact"].get(metric)
        cells.append(f"**{text}**" if against and against["p"] < 0.05 else text)
    return cells


def domain_table(summary: dict[str, Any]) -> str:
    """The model without a capacity beside a unigram model, a line for each domain, in Markdown."""
    heads = (
        "domain", "right of four", "95% interval", "per token", "unigram", "unigram, per token", "bits per byte",
        "unigram, bits per byte",
    )  # fmt: skip
    lines = [_line(heads), _line(["---"] * len(heads))]
    scores, unigram = summary["results"][0]["scores"], summary["unigram"]
    for group, own in sorted(scores.items(), key=lambda item: item[0] == "all"):
        floor, right = unigram[group], own["accuracy"]
        shares = (own["accuracy_per_token"], floor["accuracy"], floor["accuracy_per_token"])
        bits = (found["bits_per_byte"]["value"] for found in (own, floor))
        lines.append(
            _line(
                [
                    group.removeprefix("domain="),
                    f"{right['value']:.0%}",
                    f"{right['low']:.0%} … {right['high']:.0%}",
                    *(f"{share['value']:.0%}" for share in shares),
                    *(f"{value:.3f}" for value in bits),
                ]
            )
        )
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
