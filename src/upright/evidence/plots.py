"""Lines and points over seeds: what the pictures of studies are made of."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from upright.runs.drawing import COLOURS


def panels(columns: int, rows: int = 1, *, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; sizes of one in inches."""
    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.tick_params(which="both", labelsize=8)
        axis.set_prop_cycle(color=COLOURS)
    return figure, axes


def draw_band(axis: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, **style: object) -> None:
    """The mean over runs as a line, least and greatest as a band.

    Args:
        axis: to draw on.
        x: the places, ``n``.
        runs: values there, each ``n``.
        label: for the legend.
        **style: of the line.
    """
    found = np.array(runs, dtype=float)
    (line,) = axis.plot(x, found.mean(axis=0), label=label, linewidth=1.4, **style)  # type: ignore[arg-type]
    if len(found) > 1:
        axis.fill_between(x, found.min(axis=0), found.max(axis=0), color=line.get_color(), alpha=0.18, linewidth=0)


def draw_points(axis: Axes, groups: Mapping[str, Sequence[float]], label: str = "") -> None:
    """Every run as a point, and the mean of each group as a line across it."""
    for place, (name, found) in enumerate(groups.items()):
        colour = COLOURS[place % len(COLOURS)]
        if found:
            spread = np.linspace(-0.12, 0.12, len(found)) if len(found) > 1 else np.zeros(1)
            axis.scatter(place + spread, found, s=16, color=colour, label=name, zorder=3)
            axis.hlines(float(np.mean(found)), place - 0.25, place + 0.25, color=colour, linewidth=1.4)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_ylabel(label, fontsize=9)
