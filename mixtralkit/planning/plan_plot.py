"""A picture of a plan: how even its ranks are and how many tokens change rank, layer by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.policies.quality import crossings_J, rank_loads
from mixtralkit.whole_file import save_figure


def plot_plan(plan: ExpertPlan, loads_LE: np.ndarray, transitions_LEE: np.ndarray | None, path: Path) -> None:
    """Draws loads of the ranks as a heat map, and crossings against ``contiguous``; without transitions the peaks.

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
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
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


def _over_mean(plan: ExpertPlan, loads_LE: np.ndarray) -> np.ndarray:
    loads_LW = rank_loads(plan, loads_LE)
    return loads_LW / loads_LW.mean(1, keepdims=True)
