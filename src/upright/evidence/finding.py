"""The result of a study (verdict, sentence, table and figure), and functions to make tables and figures."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from upright.evidence.bench import Run
from upright.runs.drawing import COLOURS

Key = TypeVar("Key")

STYLE: dict[Any, Any] = {"axes.labelsize": 9, "axes.titlesize": 9, "legend.fontsize": 8}
"""Matplotlib settings of all studies."""


class Finding(NamedTuple):
    """The result of a study.

    Args:
        held: True if the claim holds by the rule of the protocol.
        sentence: description of the observations, with their numbers.
        table: rows of the table; each maps headings to cells.
        figure: the figure, which is saved as a PNG.
        numbers: all measurements, for ``results.json``.
    """

    held: bool
    sentence: str
    table: Sequence[Mapping[str, str]]
    figure: Figure
    numbers: Any


def metric(runs: Mapping[Key, Iterable[Run]], name: str) -> dict[Key, list[float]]:
    """Return a metric of the test split for groups of runs, without the runs that do not have it."""
    return {key: [run.metrics[name] for run in each if name in run.metrics] for key, each in runs.items()}


def last_values(runs: Mapping[Key, Iterable[Run]], column: str) -> dict[Key, list[float]]:
    """Return the last value of a column of ``metrics.csv`` for groups of runs."""
    return {key: [run.column(column)[-1] for run in each] for key, each in runs.items()}


def errors(accuracies: Mapping[Key, Iterable[float]]) -> dict[Key, list[float]]:
    """Return errors in percent for groups of accuracies."""
    return {key: [100 * (1 - accuracy) for accuracy in each] for key, each in accuracies.items()}


def means(groups: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Return the mean of each group that is not empty."""
    return {key: statistics.mean(each) for key, each in groups.items() if each}


def mean_and_spread(numbers: Sequence[float], digits: int = 4) -> str:
    """Return mean ± standard deviation as text, or a dash if there are no numbers."""
    if not numbers:
        return "-"
    return f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def spreads(groups: Mapping[Key, Sequence[float]], digits: int = 4) -> dict[Key, str]:
    """Return `mean_and_spread` of each group, as a column for `rows`."""
    return {key: mean_and_spread(each, digits) for key, each in groups.items()}


def rows(
    heading: str, titles: Mapping[Key, str] | Sequence[str], columns: Mapping[str, Mapping[Any, str]]
) -> list[dict[str, str]]:
    """Return the rows of a table; ``titles`` are the first cells by key, or the keys themselves.

    Each of the other columns has a cell per key; a missing cell becomes a dash.
    """
    cells = titles if isinstance(titles, Mapping) else {title: title for title in titles}
    return [
        {heading: title} | {name: column.get(key, "-") for name, column in columns.items()}
        for key, title in cells.items()
    ]


def panels(columns: int, rows: int = 1, *, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row. The width and height of one panel are in inches."""
    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.tick_params(which="both", labelsize=8)
        axis.set_prop_cycle(color=COLOURS)
    return figure, axes


def draw_band(axis: Axes, x: Iterable[float], runs: npt.ArrayLike, label: str, **style: Any) -> None:
    """Draw the mean over ``runs`` ``(runs, n)`` as a line, and the range from minimum to maximum as a band."""
    x, lines = list(x), np.asarray(runs, dtype=float)
    (line,) = axis.plot(x, lines.mean(axis=0), label=label, linewidth=1.4, **style)
    if len(lines) > 1:
        axis.fill_between(x, lines.min(axis=0), lines.max(axis=0), color=line.get_color(), alpha=0.18, linewidth=0)


def draw_points(
    axis: Axes, groups: Mapping[Key, Sequence[float]], label: str, titles: Mapping[Key, str] | Sequence[Key]
) -> None:
    """Draw every run as a point, and the mean of each group as a line across it. ``titles`` are the groups to draw."""
    for index, key in enumerate(titles):
        colour, numbers = COLOURS[index % len(COLOURS)], groups.get(key, [])
        if numbers:
            spread = np.linspace(-0.12, 0.12, len(numbers)) if len(numbers) > 1 else np.zeros(1)
            axis.scatter(index + spread, numbers, s=16, color=colour, zorder=3)
            axis.hlines(statistics.mean(numbers), index - 0.25, index + 0.25, color=colour, linewidth=1.4)
    names = [titles[key] if isinstance(titles, Mapping) else str(key) for key in titles]
    axis.set_xticks(range(len(names)), [fill(name, 12, break_long_words=False) for name in names], fontsize=7)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_ylabel(label)
