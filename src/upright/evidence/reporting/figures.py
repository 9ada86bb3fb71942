"""Draw the figures of a report, for print and for colour-blind readers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from upright.evidence.reporting.invariance import (
    DistortionFamily,
    InvarianceCurve,
    RotationResponse,
    Sample,
    transformer_views,
)
from upright.evidence.reporting.measures import BINS
from upright.evidence.reporting.subjects import Subject
from upright.intervals import Share, wilson
from upright.runs.drawing import COLOURS, draw_column, draw_columns, evenly_spread, pixels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv<P"
GREY, LIGHT = "#555555", "#ececec"
DASHES = (0, (4, 3))
PAGE_INCHES = 7.2
CHARACTERS_PER_INCH = 17
"""Approximate density of the text in a legend."""
COLUMNS = 3
STRIP_IMAGES = 4
STRIP_PIXELS = 56
"""Side of an image in a strip."""
STRIP_DEGREES = range(-180, 181, 30)


@contextmanager
def _styled_figure(height: float, width: float = PAGE_INCHES) -> Iterator["Figure"]:
    """Yield a figure. Text inside the ``with`` is not parsed as mathematics, because names may contain dollar signs."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"text.parse_math": False, "font.size": 8, "axes.titlesize": 8, "axes.linewidth": 0.6}
    style |= {"axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 8}
    style |= {"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5, "axes.axisbelow": True}
    style |= {"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        yield Figure(figsize=(width, height), dpi=300, layout="constrained")


def _add_legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str]) -> None:
    """Add a legend below all panels, and increase the height of the figure accordingly."""
    # matplotlib omits names that begin with an underscore.
    labels = [f" {name}" if name.startswith("_") else name for name in names]
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), int(width * CHARACTERS_PER_INCH / (max(map(len, labels)) + 6))))
    figure.set_size_inches(width, height + 0.1 + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}


def _draw_line(
    panel: "Axes", number: int, count: int, x: Sequence[float], middle: Any, low: Any = None, high: Any = None
) -> Any:
    """Draw line ``number`` of ``count``, with a band if it has ends.

    Earlier lines are thicker, so that they stay visible below later ones.
    """
    later_lines = min(count - 1 - number, 4)
    marker: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 2.4 + 0.9 * later_lines}
    (line,) = panel.plot(x, middle, linewidth=1.0 + 0.45 * later_lines, **marker, **_style(number))
    if low is not None:
        panel.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    return line


def _mark_ranges(panel: "Axes", ranges: Sequence[tuple[float, float] | None]) -> None:
    """Mark the training range: as a grey area if all models share it, else as one bar per model above the panel."""
    if len(set(ranges)) == 1:
        if ranges[0]:
            panel.axvspan(*ranges[0], color=LIGHT, zorder=0, linewidth=0)
        return
    ends = panel.get_xlim()
    style: dict[str, Any] = {"linewidth": 2, "solid_capstyle": "butt", "clip_on": False}
    for number, span in enumerate(ranges):
        if span:
            height = 1.03 + 0.035 * number
            style |= {"color": COLOURS[number % len(COLOURS)], "transform": panel.get_xaxis_transform()}
            panel.plot(np.clip(span, *ends), (height, height), **style)


def draw_circle(
    names: Sequence[str],
    degrees: Sequence[int],
    answers: Sequence[tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]],
) -> "Figure":
    """Draw the share of right sides and the median error of orientations, by the angle of the image.

    Args:
        names: names of the models.
        degrees: the angles.
        answers: whether each answer of a model has the right side, and its error in degrees, both ``(N, A)``.
    """
    with _styled_figure(2.3) as figure:
        share_panel, error_panel = figure.subplots(1, 2)
        lines = []
        for number, (right, errors) in enumerate(answers):
            shares = [wilson(float(column.mean()), len(column)) for column in right.T]
            lines.append(_draw_line(share_panel, number, len(names), degrees, *_percent(shares)))
            _draw_line(error_panel, number, len(names), degrees, np.median(errors, axis=0))
        share_panel.set(ylabel="right side, %", ylim=(0, 102))
        error_panel.set(ylabel="median error, degrees", ylim=(0, None))
        for each in (share_panel, error_panel):
            each.set(xlabel="angle of the image, degrees", xticks=range(-180, 181, 90))
        _add_legend(figure, lines, names)
        return figure


def draw_abstention(
    names: Sequence[str], curves: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
) -> "Figure":
    """Draw the share of wrong sides among the most confident answers, by their share of all answers.

    Args:
        names: names of the models.
        curves: both shares, for each model.
    """
    with _styled_figure(2.3, PAGE_INCHES / 2) as figure:
        panel = figure.subplots()
        lines = []
        for number, (answered, wrong) in enumerate(curves):
            lines += panel.plot(100 * answered, 100 * wrong, linewidth=1.4, **_style(number))
        panel.set(xlabel="answered, %", ylabel="wrong side, %", xlim=(0, 100), ylim=(0, None))
        _add_legend(figure, lines, names)
        return figure


def _percent(shares: Sequence[Share]) -> npt.NDArray[np.float64]:
    """Return values, lower and upper ends in percent, ``(3, N)``."""
    return 100 * np.transpose(shares)


def draw_invariance(
    measure: str,
    names: Sequence[str],
    curves: Sequence[Mapping[str, InvarianceCurve]],
    families: Sequence[DistortionFamily],
    training_ranges: Sequence[Mapping[str, tuple[float, float]]],
) -> "Figure":
    """Draw a panel for each distortion, with a line and its interval for each model.

    Args:
        measure: ``accuracy`` or ``consistency``.
        names: names of the models.
        curves: curves of each model, by distortion.
        families: the distortions.
        training_ranges: range of each distortion in the training of each model.
    """
    rows = -(-len(families) // COLUMNS)
    with _styled_figure(1.95 * rows) as figure:
        panels = list(figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat)
        for panel, family in zip(panels, families, strict=False):
            lines = []
            for number, by_family in enumerate(curves):
                curve = by_family[family.name]
                shares = _percent(getattr(curve, measure))
                lines.append(_draw_line(panel, number, len(names), curve.strengths, *shares))
            panel.set(
                xlim=(family.strengths[0], family.strengths[-1]), ylim=(0, 102), xlabel=f"{family.name} ({family.unit})"
            )
            if family.unit == "degrees":
                panel.set_xticks(np.linspace(family.strengths[0], family.strengths[-1], 5))
            _mark_ranges(panel, [ranges.get(family.name) for ranges in training_ranges])
        for panel in panels[::COLUMNS]:
            panel.set_ylabel(f"{measure} (%)")
        for panel in panels[len(families) :]:
            panel.set_axis_off()
        if len(names) > 1:
            _add_legend(figure, lines, names)
    return figure


def draw_reliability(names: Sequence[str], calibrations: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw accuracy by confidence for each model, and below it the share of predictions in each bin.

    Args:
        names: names of the models.
        calibrations: calibration of each model, see `calibrate`.
    """
    columns = min(len(names), COLUMNS)
    rows = -(-len(names) // columns)
    edges = np.linspace(0, 100, BINS + 1)
    with _styled_figure(3.1 * rows, PAGE_INCHES * columns / COLUMNS if columns > 1 else 3.4) as figure:
        panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
        for panel in panels.flat:
            panel.set_axis_off()
        handles: dict[str, Any] = {}
        for number, (name, calibration) in enumerate(zip(names, calibrations, strict=True)):
            row, column = divmod(number, columns)
            upper, lower = panels[2 * row : 2 * row + 2, column]
            upper.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle=DASHES)
            variants = {"without temperature": calibration["bins"], "with temperature": calibration["bins_after"]}
            for place, (label, bins) in enumerate(variants.items()):
                if bins is None:
                    continue
                x = [100 * each.confidence for each in bins if each.confidence is not None]
                value, low, high = _percent([each.accuracy for each in bins if each.accuracy])
                style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 3.5, "linestyle": ""}
                (handles[label],) = upper.plot(x, value, **style)
                upper.vlines(x, low, high, color=COLOURS[place], linewidth=0.8, alpha=0.6)
                counts = np.array([each.count for each in bins])
                lower.stairs(100 * counts / counts.sum(), edges, color=COLOURS[place], linewidth=1.1)
            for panel in (upper, lower):
                panel.set_axis_on()
                panel.set(xlim=(0, 102), ylim=(0, 103), xticks=range(0, 101, 20))
            upper.tick_params(labelbottom=False)
            lower.set_xlabel("confidence (%)")
            if len(names) > 1:
                upper.set_title(name)
            if column == 0:
                upper.set_ylabel("accuracy (%)")
                lower.set_ylabel("predictions (%)")
        _add_legend(figure, list(handles.values()), list(handles))
    return figure


def draw_rotation_response(responses: Mapping[int, RotationResponse], names: Sequence[str]) -> "Figure":
    """Draw the residual angle after the spatial transformer: the median over images, and the quartiles.

    Args:
        responses: responses to rotation, by the number of the model in the report, which sets its colour.
        names: names of these models.
    """
    first, *_ = responses.values()
    with _styled_figure(2.7, 4.6) as figure:
        panel = figure.subplots()
        ends = (first.angles[0], first.angles[-1])
        lines = panel.plot(ends, ends, color=GREY, linewidth=0.8, linestyle=DASHES)
        largest = ends[1]
        for number, response in responses.items():
            low, middle, high = response.quartiles
            lines.append(_draw_line(panel, number, max(responses) + 1, response.angles, middle, low, high))
            largest = max(largest, float(-low.min()), float(high.max()))
        largest = 60 * int(np.ceil(largest / 60))
        panel.set(xlim=ends, ylim=(-largest, largest), xticks=range(-180, 181, 60))
        panel.set(yticks=range(-largest, largest + 1, 60), ylabel="residual angle (degrees)")
        panel.set_xlabel("rotation (degrees)")
        if len({response.within for response in responses.values()}) == 1 and first.within[1] < ends[1]:
            panel.axvspan(*first.within, color=LIGHT, zorder=0, linewidth=0)
        _add_legend(figure, [*lines[1:], lines[0]], [*names, "without a transformer"])
    return figure


def draw_strips(
    subjects: Sequence[Subject], sample: Sample, family: DistortionFamily, classes: Sequence[str]
) -> Image.Image:
    """Draw images of some classes at several angles, and below them the outputs of each model's transformers.

    Args:
        subjects: models with observations.
        sample: images to choose from.
        family: the rotation.
        classes: names of the classes.
    """
    present, firsts = np.unique(sample.labels, return_index=True)
    chosen_classes = evenly_spread(len(present), STRIP_IMAGES)
    labels: list[str] = []
    columns = {}
    for degrees in STRIP_DEGREES:
        images, tiles, labels = family(sample.images[firsts[chosen_classes]], degrees), [], []
        for image, label in zip(images, present[chosen_classes], strict=True):
            tiles += pixels_of(image[None])
            labels.append(f"{classes[label]}, input")
            for subject in subjects:
                views = transformer_views(subject, image[None])
                tiles += views
                labels += [subject.name + (f" ({n})" if len(views) > 1 else "") for n in range(1, len(views) + 1)]
        columns[f"{degrees:+d}°" if degrees else "0°"] = draw_column(tiles, STRIP_PIXELS)
    return draw_columns("", labels, columns, first_apart=False)
