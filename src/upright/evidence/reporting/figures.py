"""The figures of a report, for paper, in colours that the colour-blind can tell."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from upright.evidence.reporting.calibration import BINS, Reliability
from upright.evidence.reporting.invariance import Curve, Distortion, Shown, Turning
from upright.runs.drawing import COLOURS, draw_column, draw_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv<P"
GREY, LIGHT = "#555555", "#ececec"
WIDTH = 7.2
"""Inches, of a page between its margins."""
DPI = 200
LETTERS = 17
"""To an inch, about, at the size of a legend."""
PANELS = 3
"""Beside each other, at most."""
SIDE = 56
"""Pixels of an image in a strip."""
STRIP = range(-180, 181, 30)
"""Degrees at which images are shown."""

Ranges = Sequence[Mapping[str, tuple[float, float]]]


@contextmanager
def _paper(height: float, width: float = WIDTH) -> Iterator["Figure"]:
    """A figure, inside whose ``with`` all its text is taken as it is: a name may have dollars."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"text.parse_math": False, "font.size": 8, "axes.titlesize": 8, "axes.linewidth": 0.6}
    style |= {"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        yield Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str]) -> None:
    """Below all panels, on paper of its own."""
    # matplotlib hides what begins with an underscore.
    shown = [f" {name}" if name.startswith("_") else name for name in names]
    width, height = figure.get_size_inches()
    columns = max(1, min(len(shown), int(width * LETTERS / (max(map(len, shown)) + 6))))
    figure.set_size_inches(width, height + 0.1 + 0.2 * -(-len(shown) // columns))
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, fontsize=8)


def _line(panel: "Axes", number: int, count: int, x: Sequence[float], y: Sequence[float]) -> Any:
    """One of so many; where they lie on each other, those below are seen around those above."""
    below = min(count - 1 - number, 4)
    style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    style["linestyle"] = ("-", "--", ":")[number // len(COLOURS) % 3]
    return panel.plot(x, y, linewidth=1.0 + 0.45 * below, markersize=2.4 + 0.9 * below, **style)[0]


def _grid(panel: "Axes") -> None:
    panel.tick_params(labelsize=7, width=0.6)
    panel.grid(color="#dddddd", linewidth=0.5)
    panel.set_axisbelow(True)


def _mark(panel: "Axes", ranges: Sequence[tuple[float, float] | None]) -> None:
    """Grey where all were trained on it; else a bar above the panel in the colour of each that was."""
    if len(set(ranges)) == 1:
        if ranges[0]:
            panel.axvspan(*ranges[0], color=LIGHT, zorder=0, linewidth=0)
        return
    ends = panel.get_xlim()
    for number, span in enumerate(ranges):
        if span:
            height = 1.03 + 0.035 * number
            inside = np.clip(span, *ends)
            panel.plot(
                inside,
                (height, height),
                color=COLOURS[number % len(COLOURS)],
                linewidth=2,
                solid_capstyle="butt",
                transform=panel.get_xaxis_transform(),
                clip_on=False,
            )


def draw_invariance(
    measure: str,
    names: Sequence[str],
    curves: Sequence[Mapping[str, Curve]],
    ways: Sequence[Distortion],
    trained: Ranges,
) -> "Figure":
    """A panel for each distortion, a line with its interval for each model.

    Args:
        measure: ``accuracy`` or ``consistency``.
        names: of the models.
        curves: of each, by distortion.
        ways: the distortions.
        trained: of each, from where to where it was trained on.
    """
    rows = -(-len(ways) // PANELS)
    with _paper(1.95 * rows) as figure:
        panels = list(figure.subplots(rows, PANELS, sharey=True, squeeze=False).flat)
        handles = []
        for place, (panel, way) in enumerate(zip(panels, ways, strict=False)):
            for number, found in enumerate(curves):
                curve = found[way.name]
                shares = getattr(curve, measure)
                line = _line(panel, number, len(names), curve.strengths, [100 * share.value for share in shares])
                low, high = ([100 * end for end in ends] for ends in zip(*(share[1:] for share in shares), strict=True))
                panel.fill_between(curve.strengths, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
                handles += [] if place else [line]
            panel.set_xlim(way.strengths[0], way.strengths[-1])
            panel.set_ylim(0, 102)
            if way.unit == "degrees":
                panel.set_xticks(np.linspace(way.strengths[0], way.strengths[-1], 5))
            panel.set_xlabel(f"{way.name} ({way.unit})", fontsize=8)
            _mark(panel, [ranges.get(way.name) for ranges in trained])
            _grid(panel)
        for panel in panels[::PANELS]:
            panel.set_ylabel(f"{measure} (%)", fontsize=8)
        for panel in panels[len(ways) :]:
            panel.set_axis_off()
        if len(names) > 1:
            _legend(figure, handles, names)
    return figure


def draw_reliability(
    names: Sequence[str], before: Sequence[Reliability], after: Sequence[Reliability | None]
) -> "Figure":
    """For each model accuracy by confidence, and below how many answers were that sure.

    Args:
        names: of the models.
        before: as it is.
        after: its temperature, where there is one.
    """
    columns = min(len(names), PANELS)
    rows = -(-len(names) // columns)
    edges = np.linspace(0, 100, BINS + 1)
    with _paper(3.1 * rows, WIDTH * columns / PANELS if columns > 1 else 3.4) as figure:
        ratios = [3, 1] * rows
        panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=ratios)
        handles: dict[str, Any] = {}
        for number, name in enumerate(names):
            row, column = divmod(number, columns)
            upper, lower = panels[2 * row, column], panels[2 * row + 1, column]
            upper.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
            for place, (label, found) in enumerate((("as it is", before[number]), ("with temperature", after[number]))):
                if found is None:
                    continue
                x = [100 * sure for _, sure, _ in found.filled]
                shares = [right for _, _, right in found.filled]
                style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 3.5, "linestyle": ""}
                (points,) = upper.plot(x, [100 * share.value for share in shares], **style)
                bounds = [[100 * end for end in ends] for ends in zip(*(share[1:] for share in shares), strict=True)]
                upper.vlines(x, *bounds, color=COLOURS[place], linewidth=0.8, alpha=0.6)
                share = 100 * np.array(found.counts) / sum(found.counts)
                lower.stairs(share, edges, color=COLOURS[place], linewidth=1.1)
                handles[label] = points
            for panel in (upper, lower):
                panel.set(xlim=(0, 102), ylim=(0, 103), xticks=range(0, 101, 20))
                _grid(panel)
            upper.tick_params(labelbottom=False)
            lower.set_xlabel("confidence (%)", fontsize=8)
            if len(names) > 1:
                upper.set_title(name)
            if column == 0:
                upper.set_ylabel("accuracy (%)", fontsize=8)
                lower.set_ylabel("answers (%)", fontsize=8)
        for number in range(len(names), rows * columns):
            row, column = divmod(number, columns)
            panels[2 * row, column].set_axis_off()
            panels[2 * row + 1, column].set_axis_off()
        _legend(figure, list(handles.values()), list(handles))
    return figure


def draw_turning(numbers: Sequence[int], names: Sequence[str], turnings: Sequence[Turning]) -> "Figure":
    """What is left of an angle after the spatial transformer: the median over images, and its quartiles.

    Args:
        numbers: of the models, which say their colours.
        names: of them.
        turnings: what each did.
    """
    with _paper(2.7, 4.6) as figure:
        panel = figure.subplots()
        ends = (turnings[0].angles[0], turnings[0].angles[-1])
        nothing = panel.plot(ends, ends, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))[0]
        handles = []
        most = ends[1]
        for number, turning in zip(numbers, turnings, strict=True):
            low, middle, high = turning.quartiles
            line = _line(panel, number, max(numbers) + 1, turning.angles, middle)
            panel.fill_between(turning.angles, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
            handles.append(line)
            most = max(most, float(-low.min()), float(high.max()))
        most = 60 * int(np.ceil(most / 60))
        panel.set(xlim=ends, ylim=(-most, most), xticks=range(-180, 181, 60), yticks=range(-most, most + 1, 60))
        panel.set_xlabel("angle applied (degrees)", fontsize=8)
        panel.set_ylabel("angle left (degrees)", fontsize=8)
        _grid(panel)
        if len({turning.within for turning in turnings}) == 1 and turnings[0].within[1] < ends[1]:
            panel.axvspan(*turnings[0].within, color=LIGHT, zorder=0, linewidth=0)
        _legend(figure, [*handles, nothing], [*names, "if nothing were turned"])
    return figure


def draw_strips(shown: Shown, labels: Sequence[str], names: Sequence[str], turnings: Sequence[Turning]) -> Image.Image:
    """For each image a row as it came at every angle, and a row for what each transformer sees of it.

    Args:
        shown: the images as they came.
        labels: of them.
        names: of the models.
        turnings: what each did.
    """
    angles = turnings[0].angles
    rows = []
    for label in labels:
        rows.append(f"{label}, as it came")
        for name, turning in zip(names, turnings, strict=True):
            branches = len(turning.strips[0][0])
            rows += [name + (f" ({branch + 1})" if branches > 1 else "") for branch in range(branches)]
    columns = {}
    for degrees in STRIP:
        at = angles.index(degrees)
        tiles = [
            tile
            for number in range(len(labels))
            for tile in (shown.strips[number][at], *(tile for each in turnings for tile in each.strips[number][at]))
        ]
        columns[f"{degrees:+d}°" if degrees else "0°"] = draw_column(tiles, SIDE)
    return draw_columns("", rows, columns, first_apart=False)
