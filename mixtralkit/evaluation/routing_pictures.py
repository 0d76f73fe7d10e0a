"""Pictures of the routing report: loads of experts and ranks as heat maps, transitions between layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MOST_PANELS = 12
_MOST_NUMBERS = 16  # columns of a heat map whose cells still hold a number
# Okabe and Ito's colours, which everybody can tell apart; black is that of the whole.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "osD^vPX*"


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
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    width, height = _panel(layers, experts)
    figure = _figure(columns * width + 1.1, rows * (height + 0.3) + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    most = max(100 * float(np.max([shares[name] for name in names])), 200 / experts)
    for axes, name in zip(panels.flat, names, strict=False):
        title = f"{_short(name)}: {tokens[name]:,} tokens"
        image = _heat_map(axes, 100 * shares[name], title, "expert", "layer", 0, most, "viridis", ".0f")
    for axes in panels.flat[len(names) :]:
        axes.remove()
    for axes in panels.flat[: len(names)]:
        axes.label_outer()
    _label_lowest(panels, len(names))
    even = 100 / experts
    bar = figure.colorbar(image, ax=panels.ravel().tolist(), label="share of the layer's choices, %")
    bar.ax.axhline(even, color="white", linewidth=2)
    left_out = len(shares) - len(names)
    more = f" ({left_out} smaller domains are in report.json)" if left_out else ""
    figure.suptitle(f"Load of the experts, % of each layer's choices; even is {even:.3g} (white line){more}")
    _save(figure, path)


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
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    width, height = _panel(experts + 1, experts)
    figure = _figure(max(columns * width + 1.1, 7), rows * (height + 0.3) + 3.6)
    above, below = figure.subfigures(2, 1, height_ratios=(rows * (height + 0.3), 3.2))
    panels = above.subplots(rows, columns, squeeze=False)
    given = [_conditional(transitions_LEE[layer]) for layer in layers]
    most = 100 * max(float(np.nanmax(shares)) for shares in given)
    for axes, layer, shares in zip(panels.flat, layers, given, strict=False):
        after, before = f"expert in layer {layer + 1}", f"expert in layer {layer}"
        image = _heat_map(axes, 100 * shares, f"layer {layer} to {layer + 1}", after, before, 0, most, "viridis", ".0f")
        axes.set_yticks([*_ticks(experts, 16), experts], [*map(str, _ticks(experts, 16)), "any"])
        axes.axhline(experts - 0.5, color="white", linewidth=3)
    for axes in panels.flat[len(layers) :]:
        axes.remove()
    above.colorbar(image, ax=panels.ravel().tolist(), label="% of the row's tokens")
    above.suptitle("Where tokens go next, by first choice; the row “any” is what rows would be without affinity")
    axes = below.subplots()
    for style, (name, strength_J) in zip(_styles(), strengths.items(), strict=False):
        axes.plot(range(pairs), 100 * strength_J, label=_short(name), **style)
    axes.set(title="How much of a layer's first choice the layer before it tells", xlabel="layers", ylabel="% of its entropy")
    ticks = _ticks(pairs, 16)
    axes.set_xticks(ticks, [f"{layer}→{layer + 1}" for layer in ticks])
    axes.set_ylim(bottom=0)
    _legend(axes, len(strengths))
    _save(figure, path)


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
    figure = _figure(width + 1.4 + 6.5, max(height + 0.8, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(width + 1, 6.2))
    spread = max(float(np.abs(loads_LW - 1).max()), 0.05)
    title = "Load of the ranks over the layer's mean"
    image = _heat_map(left, loads_LW, title, "rank", "layer", 1 - spread, 1 + spread, "RdBu_r", ".2f")
    figure.colorbar(image, ax=left, label="load / mean; 1 is even")
    for style, (name, part_LW) in zip(_styles(), over_mean.items(), strict=False):
        right.plot(part_LW.max(1), label=_short(name), **style)
    if plain_LW is not None:
        right.plot(plain_LW.max(1), color="grey", linestyle="dashed", label="all, contiguous")
    right.set(title="Busiest rank of each layer", xlabel="layer", ylabel="max / mean load")
    right.set_xticks(_ticks(layers, 16))
    top = max(1.2, 1.05 * right.dataLim.ymax)
    right.set_ylim(1 - 0.04 * (top - 1), top)
    inverse = right.secondary_yaxis("right", functions=(_inverse, _inverse))
    inverse.set_ylabel("mean / max load")
    inverse.set_yticks([share for share in np.arange(1, 20) / 20 if share >= 1 / top][:: 1 if top < 2 else 2] + [1.0])
    _legend(right, len(over_mean) + 1)
    figure.suptitle(f"Plan in use: {policy}, {ranks} ranks (rows before any cut to a capacity)")
    _save(figure, path)


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
    axes.set_yticks(_ticks(rows, 16))
    if columns <= _MOST_NUMBERS and rows <= 40:
        for row, column in np.ndindex(rows, columns):
            value = values[row, column]
            red, green, blue, _ = image.cmap(image.norm(value))
            is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            colour = "black" if is_light else "white"
            axes.text(column, row, f"{value:{number}}", ha="center", va="center", fontsize=8, color=colour)
    return image


def _label_lowest(panels: np.ndarray, count: int) -> None:
    """Expert numbers under the lowest panel of every column; the last row may be short."""
    rows, columns = panels.shape
    for index in range(max(0, count - columns), count):
        panels.flat[index].tick_params(labelbottom=True)
        panels.flat[index].set_xlabel("expert")


def _conditional(transitions_EE: np.ndarray) -> np.ndarray:
    """[E+1, E], where the tokens of each expert go, and in the last row where all go; NaN for experts without any."""
    counts = np.vstack([transitions_EE, transitions_EE.sum(0)])
    totals = counts.sum(1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def _ticks(count: int, most: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // most))))


def _styles() -> list[dict[str, Any]]:
    """The whole in black, then the domains, told apart by colour, marker and dash."""
    dashes = ("solid", "dashdot")
    lines = [{"color": "black", "linewidth": 2.5, "marker": "."}]
    for number in range(MOST_PANELS - 1):
        dash = dashes[number // len(_COLOURS) % len(dashes)]
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        lines.append({"color": colour, "linewidth": 1.2, "marker": marker, "markersize": 5, "linestyle": dash})
    return lines


def _legend(axes: Any, lines: int) -> None:
    if lines > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.14, 1), fontsize="small", frameon=False)


def _short(name: str) -> str:
    """A name for a title: one line of at most 28 characters, nothing of it read as a formula."""
    line = " ".join(name.split())
    return (line if len(line) <= 28 else f"{line[:27]}…").replace("$", r"\$")


def _inverse(x: Any) -> Any:
    return 1 / np.maximum(x, 1e-9)


def _save(figure: Any, path: Path) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        figure.savefig(unfinished, dpi=130, format="png")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
