"""A picture of a plan: how even its ranks are, how many tokens change rank, and what each expert is, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.policies.quality import crossings_J, rank_loads
from mixtralkit.whole_file import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_plan(plan: ExpertPlan, loads_LE: np.ndarray, transitions_LEE: np.ndarray | None, path: Path) -> None:
    """Draws loads of the ranks as a heat map, and crossings against ``contiguous``; without transitions the peaks.

    A plan with precision or tiers has a third part: the format of every expert, and a cross where it is on the host.

    Args:
        loads_LE, transitions_LEE: as in ``quality.measure``.
        path: picture file; its suffix says which kind.

    Raises:
        ValueError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot needs matplotlib: pip install 'mixtralkit[plot]'") from None
    more = bool(plan.counts())
    figure = Figure(figsize=(16 if more else 11, 5), layout="constrained")
    left, right, *others = figure.subplots(1, 2 + more, width_ratios=(1, 1.6, 1.2)[: 2 + more])
    for axes in others:
        _draw_experts(axes, plan)
    loads_LW = _over_mean(plan, loads_LE)
    spread = max(float(np.abs(loads_LW - 1).max()), 0.05)
    image = left.imshow(loads_LW, aspect="auto", cmap="coolwarm", vmin=1 - spread, vmax=1 + spread)
    figure.colorbar(image, ax=left, label="load / mean of the layer")
    left.set(xlabel="rank", ylabel="layer", title=f"{plan.policy}: load of the ranks")
    left.xaxis.get_major_locator().set_params(integer=True)
    plain = contiguous(plan.num_layers, plan.num_experts, plan.world_size)
    for shown, name, colour in ((plain, "contiguous", "tab:grey"), (plan, plan.policy, "tab:blue")):
        if transitions_LEE is None:
            right.plot(_over_mean(shown, loads_LE).max(1), color=colour, label=name)
        else:
            crossed_J = crossings_J(shown, transitions_LEE)
            label = f"{name}: {crossed_J.sum():.2f} in all"
            right.plot(range(1, plan.num_layers), crossed_J, color=colour, label=label)
    if transitions_LEE is None:
        right.set(xlabel="layer", ylabel="max / mean load", title="Busiest rank")
    else:
        right.axhline(1 - 1 / plan.world_size, color="black", linestyle=":", label="uniform")
        right.set(xlabel="layer", ylabel="share of tokens", title="Tokens that come from another rank", ylim=(0, 1))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="lower right")
    save_figure(figure, path, dpi=120)


def _draw_experts(axes: Axes, plan: ExpertPlan) -> None:
    """Layers by experts: a colour for each precision, a cross for the host's memory."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = plan.precision or [[None] * plan.num_experts] * plan.num_layers
    names_LE = np.array([[name or "as run" for name in row] for row in rows])
    names, number_LE = np.unique(names_LE, return_inverse=True)
    colours = [colormaps["Pastel1"](number % 9) for number in range(len(names))]
    bounds = {"vmin": -0.5, "vmax": len(names) - 0.5}
    axes.imshow(number_LE.reshape(names_LE.shape), aspect="auto", cmap=ListedColormap(colours), **bounds)
    layers, experts = plan.on_host_LE.nonzero()
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    if len(layers):
        handles.append(axes.scatter(experts, layers, marker="x", color="black", s=14, label="host"))
    axes.set(xlabel="expert", ylabel="layer", title="Format and memory of the experts")
    axes.figure.legend(handles=handles, loc="outside right upper")


def _over_mean(plan: ExpertPlan, loads_LE: np.ndarray) -> np.ndarray:
    loads_LW = rank_loads(plan, loads_LE)
    return loads_LW / loads_LW.mean(1, keepdims=True)
