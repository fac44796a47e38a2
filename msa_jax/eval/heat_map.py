"""A heat map with its numbers in it, readable on light and dark pages and without colour."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from msa_jax.eval import figures

# From orange for nothing over grey to blue for all, which colour-blind readers tell apart. Cells
# are opaque, so that they look the same on a light and on a dark page.
_COLOURS = LinearSegmentedColormap.from_list("share", ["#d98a52", "#dcd9d3", "#2b78b0"])
_SIDE = 0.96  # of a cell, the rest is a gap


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x: str,
    y: str,
    title: str = "",
) -> str:
    """Shares between 0 and 1 as an SVG figure.

    Args:
      values: [R, C]; NaN is left empty.
      rows: [R] labels from the top.
      columns: [C] labels.
      x: of the columns.
      y: of the rows.
      title: above the map.
    """
    with figures.drawing_style():
        figure, (axes,) = figures.make_panels(1, height=1.3 + 0.34 * len(rows))
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)
        for (row, column), value in np.ndenumerate(values):
            if np.isnan(value):
                axes.text(column, row, "-", ha="center", va="center")
                continue
            colour = _COLOURS(float(value))
            corner = (column - _SIDE / 2, row - _SIDE / 2)
            axes.add_patch(Rectangle(corner, _SIDE, _SIDE, facecolor=colour, edgecolor="none"))
            ink = figures.text_on(colour)
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(title)
        figures.label_axes(axes, x, y, steps=False)
        return figures.finish(figure)
