"""A picture of what experts lose in each format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixtralkit.planning.precision import ErrorTable
from mixtralkit.whole_file import save_figure


def plot_errors(table: ErrorTable, path: Path) -> None:
    """Draws every expert's error over the bits of each format, and the harm of the experts in the smallest format.

    Args:
        path: picture file; its suffix says which kind.

    Raises:
        ValueError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot needs matplotlib: pip install 'mixtralkit[plot]'") from None
    layers, experts, formats = table.error.shape
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    order = np.argsort(table.bits, kind="stable")
    place_E = (np.arange(layers * experts) / max(layers * experts - 1, 1) - 0.5) * 0.8  # by layer, then expert
    layer_N = np.repeat(np.arange(layers), experts)
    size_N = 6 + 60 * (table.load / table.load.max()).ravel()
    for place, number in enumerate(order):
        points = left.scatter(
            place + place_E,
            table.error[:, :, number].ravel(),
            size_N,
            layer_N,
            cmap="viridis",
            alpha=0.75,
            linewidths=0,
        )
    left.set_xticks(
        range(formats), [f"{table.formats[f]}\n{table.bits[f]:.2f} bits" for f in order], fontsize="small", rotation=35
    )
    left.set(yscale="log", ylabel=f"relative error of the {table.kind}", title="Experts by layer; larger: more rows")
    left.grid(axis="y", which="both", alpha=0.25)
    figure.colorbar(points, ax=left, label="layer")
    smallest = int(order[0])
    image = right.imshow(table.harm[:, :, smallest], aspect="auto", cmap="magma_r", vmin=0)
    right.set(xlabel="expert", ylabel="layer", title=f"Harm in {table.formats[smallest]}: error, load, gate weight")
    right.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=right, label="mean square of what the layer's sum is off by")
    save_figure(figure, path, dpi=130)
