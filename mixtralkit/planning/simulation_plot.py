"""A picture of several simulations side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mixtralkit.planning.replay import PHASES
from mixtralkit.planning.simulate import Simulation
from mixtralkit.whole_file import save_figure

# Okabe and Ito's colours, which everybody can tell apart.
_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#000000")
_DASHES = ("solid", "dashed", "dotted")  # lines of one value stay visible under each other


def draw(results: Mapping[str, Simulation], path: str | Path) -> None:
    """Writes a picture: a step's phases, time and imbalance by layer, bytes inside and across nodes.

    Args:
        results: simulations by the label to draw them under.
        path: file to write; its ending chooses the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'mixtralkit[plot]'") from None
    figure = Figure(figsize=(13, 4.5 + 0.5 * len(results)), layout="constrained")
    (phases, layers), (traffic, balance) = figure.subplots(2, 2)
    _draw_phases(phases, results)
    _draw_traffic(traffic, results)
    for number, (label, result) in enumerate(results.items()):
        style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[number % len(_DASHES)], "marker": "."}
        layers.plot(result.seconds_L / result.steps * 1e3, label=label, **style)
        balance.plot(result.max_over_mean_L, **style)
    layers.set(title="time of a layer, per step", xlabel="layer", ylabel="ms", ylim=(0, None))
    balance.set(title="busiest rank's choices against the mean", xlabel="layer", ylabel="max / mean")
    balance.axhline(1.0, color="grey", linewidth=0.8)
    figure.legend(*layers.get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize="small")
    save_figure(figure, path, dpi=130)


def _draw_phases(axes, results: Mapping[str, Simulation]) -> None:
    left = np.zeros(len(results))
    for phase, (name, colour) in enumerate(zip(PHASES, _COLOURS, strict=False)):
        ms = np.array([r.phases_LP[:, phase].sum() / r.steps * 1e3 for r in results.values()])
        axes.barh(list(results), ms, left=left, label=name, color=colour)
        left += ms
    hidden = np.array([r.hidden_L.sum() / r.steps * 1e3 for r in results.values()])
    if hidden.any():
        axes.barh(
            list(results), hidden, left=left - hidden, color="none", edgecolor="black", hatch="//", label="hidden"
        )
    axes.invert_yaxis()
    axes.set(title="phases of a step, slowest rank", xlabel="ms", xlim=(0, 1.35 * left.max()))
    axes.legend(fontsize="small", loc="center right")


def _draw_traffic(axes, results: Mapping[str, Simulation]) -> None:
    inside, across = np.array([r.bytes_by_network for r in results.values()]).T
    steps = np.array([r.steps for r in results.values()])
    axes.barh(list(results), inside / steps / 1e6, label="inside nodes", color=_COLOURS[1])
    if across.any():
        axes.barh(list(results), across / steps / 1e6, left=inside / steps / 1e6, label="across", color=_COLOURS[5])
    axes.invert_yaxis()
    most = max(float((inside + across).max() / steps.min() / 1e6), 1e-9)
    axes.set(title="bytes of the MoE layers over all links, per step", xlabel="MB", xlim=(0, 1.35 * most))
    axes.legend(fontsize="small", loc="center right")
