"""Pictures of the routing report: loads of experts and ranks as heat maps, transitions between layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtralkit.whole_file import save_figure

WHOLE = ""  # name of the whole trace among those of its domains
MOST_PANELS = 12  # heat maps of a picture
_MOST_NUMBERS, _MOST_ROWS = 16, 40  # columns and rows of a heat map whose cells still hold a number
# Okabe and Ito's colours, which everybody can tell apart; black is that of the whole.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "osD^vP"


def require_matplotlib() -> None:
    """ValueError, one sentence, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a routing report needs matplotlib: pip install 'mixtralkit[plot]'") from None


def draw_load(shares: Mapping[str, np.ndarray], tokens: Mapping[str, int], path: Path) -> None:
    """Heat maps, layers by experts, of the share of a layer's choices that each expert takes, on one colour scale.

    Args:
        shares: [L, E] of each part, the whole first; each layer sums to 1. Of more than ``MOST_PANELS`` parts those
            with the most tokens are drawn.
        tokens: of each part.
    """
    names = list(shares)
    if len(names) > MOST_PANELS:
        largest = sorted(names[1:], key=lambda name: -tokens[name])[: MOST_PANELS - 1]
        names = [names[0], *(name for name in names[1:] if name in largest)]
    layers, experts = shares[names[0]].shape
    width, height = _panel(layers, experts)
    rows, columns = _grid(len(names), width, height)
    figure = _figure(max(columns * width + 1.1, 6.5), rows * (height + 0.3) + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    most = max(100 * float(np.max([shares[name] for name in names])), 200 / experts)
    for axes, name in zip(panels.flat, names, strict=False):
        title = f"{_short(name, 22) or 'all'}: {tokens[name]:,} tokens"
        image = _heat_map(axes, 100 * shares[name], title, "expert", "layer", 0, most, "viridis", ".0f")
        axes.label_outer()
    _keep(panels, len(names), "expert")
    even = 100 / experts
    bar = figure.colorbar(image, ax=list(panels.flat[: len(names)]), label="share of the layer's choices, %")
    bar.ax.axhline(even, color="white", linewidth=2)
    left_out = len(shares) - len(names)
    more = f"; {left_out} smaller domains are in report.json" if left_out else ""
    figure.suptitle(f"Load of the experts, % of each layer's choices (even: {even:.3g}, white line{more})", fontsize=11)
    save_figure(figure, path, dpi=130)


def draw_affinity(
    transitions_LEE: np.ndarray, strengths: Mapping[str, np.ndarray], layers: Sequence[int], path: Path
) -> None:
    """P(expert b in layer l+1 | expert a in layer l) for some l, and how strong the tie is for every l.

    Args:
        transitions_LEE: [L-1, E, E] tokens that go from a to b.
        strengths: [L-1] of each part, the whole first.
        layers: the l that are drawn.
    """
    pairs, experts, _ = transitions_LEE.shape
    width, height = _panel(experts + 1, experts)
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = _figure(max(columns * width + 1.1, 8), rows * (height + 0.3) + 3.6)
    above, below = figure.subfigures(2, 1, height_ratios=(rows * (height + 0.3), 3.2))
    panels = above.subplots(rows, columns, squeeze=False)
    given = [_conditional(transitions_LEE[layer]) for layer in layers]
    most = 100 * max(float(np.nanmax(shares)) for shares in given)
    for axes, layer, shares in zip(panels.flat, layers, given, strict=False):
        after, before = f"expert in layer {layer + 1}", f"expert in layer {layer}"
        image = _heat_map(axes, 100 * shares, f"layer {layer} to {layer + 1}", after, before, 0, most, "viridis", ".0f")
        ticks = _ticks(experts, 16)
        axes.set_yticks([*ticks, experts], [*map(str, ticks), "any"])
        axes.axhline(experts - 0.5, color="white", linewidth=3)
    _keep(panels, len(layers))
    above.colorbar(image, ax=list(panels.flat[: len(layers)]), label="% of the row's tokens")
    above.suptitle("Where tokens go next, by first choice (“any”: as every row would be without affinity)", fontsize=11)
    axes = below.subplots()
    _lines(axes, {name: 100 * strength_J for name, strength_J in strengths.items()})
    title = "How much of a layer's first choice the layer before it tells"
    axes.set(title=title, xlabel="layers", ylabel="% of its entropy")
    ticks = _ticks(pairs, 12)
    axes.set_xticks(ticks, [f"{layer}→{layer + 1}" for layer in ticks])
    axes.set_ylim(bottom=0)
    _legend(axes, 1.01)
    save_figure(figure, path, dpi=130)


def draw_ranks(over_mean: Mapping[str, np.ndarray], plain_LW: np.ndarray | None, policy: str, path: Path) -> None:
    """Load of every rank, and the busiest rank's of every layer, as max/mean and as mean/max.

    Args:
        over_mean: [L, W] load over the layer's mean, of each part, the whole first.
        plain_LW: the same of the whole under the contiguous placement, to compare with; None leaves it out.
        policy: name of the plan's policy.
    """
    loads_LW = next(iter(over_mean.values()))
    layers, ranks = loads_LW.shape
    width, height = _panel(layers, ranks)
    figure = _figure(width + 10, max(height + 0.8, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(width + 1, 7))
    spread = max(float(np.abs(loads_LW - 1).max()), 0.05)
    title = "Load of the ranks, all tokens"
    image = _heat_map(left, loads_LW, title, "rank", "layer", 1 - spread, 1 + spread, "RdBu_r", ".2f")
    figure.colorbar(image, ax=left, label="load / mean; 1 is even")
    _lines(right, {name: part_LW.max(1) for name, part_LW in over_mean.items()})
    if plain_LW is not None:
        right.plot(plain_LW.max(1), color="grey", linestyle="dashed", label="all, contiguous")
    right.set(title="Busiest rank of each layer", xlabel="layer", ylabel="max / mean load")
    right.set_xticks(_ticks(layers, 16))
    top = max(1.2, 1.05 * right.dataLim.ymax)
    right.set_ylim(1 - 0.04 * (top - 1), top)
    inverse = right.secondary_yaxis("right", functions=(_inverse, _inverse))
    inverse.set_ylabel("mean / max load")
    steps = 20 if top < 1.5 else 10
    inverse.set_yticks([step / steps for step in range(1, steps + 1) if step / steps >= 1 / top])
    _legend(right, 1.12)
    figure.suptitle(f"Plan in use: {policy}, {ranks} ranks (rows before any cut to a capacity)")
    save_figure(figure, path, dpi=130)


def _figure(width: float, height: float) -> Any:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, min(height, 60)), layout="constrained")


def _panel(rows: int, columns: int) -> tuple[float, float]:
    """Inches of a heat map of so many cells."""
    return float(np.clip(0.42 * columns, 2.6, 9)), float(np.clip(0.3 * rows, 1.8, 10))


def _heat_map(
    axes: Any, values: np.ndarray, title: str, x: str, y: str, least: float, most: float, colours: str, number: str
) -> Any:
    """Cells with their numbers where they have room."""
    rows, columns = values.shape
    image = axes.imshow(values, cmap=colours, vmin=least, vmax=most, aspect="auto")
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize="medium")
    axes.set_xticks(_ticks(columns, 16))
    axes.set_yticks(_ticks(rows, _MOST_ROWS))
    if columns <= _MOST_NUMBERS and rows <= _MOST_ROWS:
        for row, column in np.ndindex(rows, columns):
            value = values[row, column]
            red, green, blue, _ = image.cmap(image.norm(value))
            is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            colour = "black" if is_light else "white"
            axes.text(
                column, row, f"{value:{number}}", ha="center", va="center", fontsize=8, color=colour, in_layout=False
            )
    return image


def _grid(count: int, width: float, height: float) -> tuple[int, int]:
    """(rows, columns) for so many panels: about 1.7 times as wide as high, with few places left empty."""

    def cost(columns: int) -> float:
        rows = -(-count // columns)
        return abs(np.log(columns * width / (rows * (height + 0.3)) / 1.7)) + 0.1 * (rows * columns - count)

    columns = min(range(1, count + 1), key=cost)
    return -(-count // columns), columns


def _keep(panels: np.ndarray, count: int, lowest_label: str | None = None) -> None:
    """Takes away the panels after the first ``count``; those that are lowest then get the label of their x axis."""
    for axes in panels.flat[count:]:
        axes.remove()
    if lowest_label is not None:
        for axes in panels.flat[max(0, count - panels.shape[1]) : count]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(lowest_label)


def _conditional(transitions_EE: np.ndarray) -> np.ndarray:
    """[E+1, E], where the tokens of each expert go, and in the last row where all go; NaN for experts without any."""
    counts = np.vstack([transitions_EE, transitions_EE.sum(0)])
    totals = counts.sum(1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def _ticks(count: int, most: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // most))))


def _lines(axes: Any, values: Mapping[str, np.ndarray]) -> None:
    """The whole in black, then the domains: a line each while they can be told apart, else the range of all."""
    (_, first), *domains = values.items()
    if len(domains) > len(_COLOURS):
        stacked = np.stack([of_domain for _, of_domain in domains])
        label = f"{len(domains)} domains: least to most"
        axes.fill_between(range(len(first)), stacked.min(0), stacked.max(0), color=_COLOURS[4], alpha=0.5, label=label)
        axes.plot(np.median(stacked, 0), color=_COLOURS[0], marker="s", markersize=4, label="median domain")
        domains = []
    for (name, of_domain), colour, marker in zip(domains, _COLOURS, _MARKERS, strict=False):
        axes.plot(of_domain, color=colour, marker=marker, markersize=5, linewidth=1.2, label=_short(name, 28))
    axes.plot(first, color="black", linewidth=2.5, marker=".", markersize=9, label="all")


def _legend(axes: Any, left: float) -> None:
    """Right of the axes, where there is more than one thing to tell apart."""
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(left, 1), fontsize="small", frameon=False)


def _short(name: str, most: int) -> str:
    """A name for a title: one line, its middle left out if it is long, nothing of it read as a formula."""
    line = " ".join(name.split())
    if len(line) > most:
        line = f"{line[: most // 2]}…{line[len(line) - (most - 1 - most // 2) :]}"
    return line.replace("$", r"\$")


def _inverse(x: Any) -> Any:
    return 1 / np.maximum(x, 1e-9)
