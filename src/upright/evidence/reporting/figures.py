"""Draw the figures of a report, for print and for colour-blind readers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from upright.evidence.reporting.invariance import ROTATION, DistortionFamily, Sample, transformer_views
from upright.evidence.reporting.measures import BINS
from upright.evidence.reporting.subjects import Floats, Subject
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
RELIABILITY = {"bins": "without temperature", "bins_after": "with temperature"}
STRIP_IMAGES = 4
STRIP_PIXELS = 56
"""Side of an image in a strip."""
STRIP_DEGREES = range(-180, 181, 30)

Models = Sequence[Mapping[str, Any]]
"""The entry ``models`` of ``report.json``."""


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


def _add_legend(figure: "Figure", handles: Sequence[Any], models: Models) -> None:
    """Add a legend below all panels, and increase the height of the figure accordingly."""
    # matplotlib omits names that begin with an underscore.
    labels = [f" {model['name']}" if model["name"].startswith("_") else model["name"] for model in models]
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), int(width * CHARACTERS_PER_INCH / (max(map(len, labels)) + 6))))
    figure.set_size_inches(width, height + 0.1 + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}


def _draw_line(
    panel: "Axes", x: Sequence[float], middle: Any, low: Any = None, high: Any = None, *, number: int, count: int
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


def _percent(shares: Sequence[Mapping[str, float]]) -> npt.NDArray[np.float64]:
    """Return values, lower and upper ends of shares in percent, ``(3, N)``."""
    return 100 * np.array([[share[name] for share in shares] for name in ("value", "low", "high")])


def _mark_ranges(panel: "Axes", ranges: Sequence[tuple[float, float] | None]) -> None:
    """Mark the training range: as a grey area if all models share it, else as one bar per model above the panel."""
    if all(span == ranges[0] for span in ranges):
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


def draw_circle(models: Models) -> "Figure":
    """Draw the share of right sides and the median error of orientations, by the angle of the image."""
    with _styled_figure(2.3) as figure:
        share_panel, error_panel = figure.subplots(1, 2)
        lines = []
        for number, model in enumerate(models):
            circle, drawn = model["circle"], partial(_draw_line, number=number, count=len(models))
            lines.append(drawn(share_panel, circle["degrees"], *_percent(circle["right_side"])))
            drawn(error_panel, circle["degrees"], circle["median"])
        share_panel.set(ylabel="right side, %", ylim=(0, 102))
        error_panel.set(ylabel="median error, degrees", ylim=(0, None))
        for each in (share_panel, error_panel):
            each.set(xlabel="angle of the image, degrees", xticks=range(-180, 181, 90))
        _add_legend(figure, lines, models)
        return figure


def draw_abstention(models: Models, curves: Sequence[tuple[Floats, Floats]]) -> "Figure":
    """Draw the share of wrong sides among the most confident answers, by their share of all answers."""
    with _styled_figure(2.3, PAGE_INCHES / 2) as figure:
        panel = figure.subplots()
        lines = []
        for number, (answered, wrong) in enumerate(curves):
            lines += panel.plot(100 * answered, 100 * wrong, linewidth=1.4, **_style(number))
        panel.set(xlabel="answered, %", ylabel="wrong side, %", xlim=(0, 100), ylim=(0, None))
        _add_legend(figure, lines, models)
        return figure


def draw_invariance(measure: str, models: Models) -> "Figure":
    """Draw a panel for each distortion, with a line of ``accuracy`` or ``consistency`` for each model."""
    families = models[0]["invariance"]
    rows = -(-len(families) // COLUMNS)
    with _styled_figure(1.95 * rows) as figure:
        panels = list(figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat)
        for panel, (name, family) in zip(panels, families.items(), strict=False):
            curves, strengths = [model["invariance"][name] for model in models], family["strengths"]
            lines = [
                _draw_line(panel, strengths, *_percent(curve[measure]), number=number, count=len(models))
                for number, curve in enumerate(curves)
            ]
            panel.set(xlim=(strengths[0], strengths[-1]), ylim=(0, 102), xlabel=f"{name} ({family['unit']})")
            if family["unit"] == "degrees":
                panel.set_xticks(np.linspace(strengths[0], strengths[-1], 5))
            _mark_ranges(panel, [curve["trained"] for curve in curves])
        for panel in panels[::COLUMNS]:
            panel.set_ylabel(f"{measure} (%)")
        for panel in panels[len(families) :]:
            panel.set_axis_off()
        if len(models) > 1:
            _add_legend(figure, lines, models)
    return figure


def draw_turning_circle(models: Models) -> "Figure":
    """Draw the accuracy at all angles of each model, and of those with a transformer also at the identity pose."""
    curves = []
    for model in models:
        rotation = model["invariance"][ROTATION]
        if model["identity"]:
            curves.append((f"{model['name']}, without its rotation", rotation["strengths"], model["identity"]))
        abstains = f", abstains below {model['effect']['threshold']:.2f}" if model["effect"] else ""
        curves.append((model["name"] + abstains, rotation["strengths"], rotation["accuracy"]))
    with _styled_figure(2.9) as figure:
        panel = figure.subplots()
        lines = [
            _draw_line(panel, angles, *_percent(shares), number=number, count=len(curves))
            for number, (_, angles, shares) in enumerate(curves)
        ]
        panel.set(xlim=(-180, 180), ylim=(0, 102), xticks=range(-180, 181, 45))
        panel.set(xlabel="rotation of the image (degrees)", ylabel="accuracy (%)")
        _add_legend(figure, lines, [{"name": name} for name, *_ in curves])
    return figure


def draw_reliability(models: Models) -> "Figure":
    """Draw accuracy by confidence for each model, and the share of predictions in each bin below."""
    columns = min(len(models), COLUMNS)
    rows = -(-len(models) // columns)
    edges = np.linspace(0, 100, BINS + 1)
    with _styled_figure(3.1 * rows, PAGE_INCHES * columns / COLUMNS if columns > 1 else 3.4) as figure:
        panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
        for panel in panels.flat:
            panel.set_axis_off()
        handles: dict[str, Any] = {}
        for number, model in enumerate(models):
            row, column = divmod(number, columns)
            upper, lower = panels[2 * row : 2 * row + 2, column]
            upper.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle=DASHES)
            for place, (key, label) in enumerate(RELIABILITY.items()):
                bins = model["calibration"][key] or []
                if not (full := [each for each in bins if each["count"]]):
                    continue
                x = [100 * each["confidence"] for each in full]
                value, low, high = _percent([each["accuracy"] for each in full])
                style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 3.5, "linestyle": ""}
                (handles[label],) = upper.plot(x, value, **style)
                upper.vlines(x, low, high, color=COLOURS[place], linewidth=0.8, alpha=0.6)
                counts = np.array([each["count"] for each in bins])
                lower.stairs(100 * counts / counts.sum(), edges, color=COLOURS[place], linewidth=1.1)
            for panel in (upper, lower):
                panel.set_axis_on()
                panel.set(xlim=(0, 102), ylim=(0, 103), xticks=range(0, 101, 20))
            upper.tick_params(labelbottom=False)
            lower.set_xlabel("confidence (%)")
            if len(models) > 1:
                upper.set_title(model["name"])
            if column == 0:
                upper.set_ylabel("accuracy (%)")
                lower.set_ylabel("predictions (%)")
        _add_legend(figure, list(handles.values()), [{"name": label} for label in handles])
    return figure


def draw_rotation_response(models: Models) -> "Figure":
    """Draw the residual angle after the spatial transformer: the median over images, and the quartiles."""
    observed = {number: model for number, model in enumerate(models) if "left" in model["uprightness"]}
    responses = {number: model["uprightness"] for number, model in observed.items()}
    first, *_ = responses.values()
    with _styled_figure(2.7, 4.6) as figure:
        panel = figure.subplots()
        ends = (first["angles"][0], first["angles"][-1])
        lines = panel.plot(ends, ends, color=GREY, linewidth=0.8, linestyle=DASHES)
        largest = ends[1]
        for number, response in responses.items():
            low, middle, high = (response["left"][name] for name in ("lower_quartile", "median", "upper_quartile"))
            lines.append(
                _draw_line(panel, response["angles"], middle, low, high, number=number, count=max(responses) + 1)
            )
            largest = max(largest, -min(low), max(high))
        largest = 60 * int(np.ceil(largest / 60))
        panel.set(xlim=ends, ylim=(-largest, largest), xticks=range(-180, 181, 60))
        panel.set(yticks=range(-largest, largest + 1, 60), ylabel="residual angle (degrees)")
        panel.set_xlabel("rotation (degrees)")
        if first["within"][1] < ends[1] and all(each["within"] == first["within"] for each in responses.values()):
            panel.axvspan(*first["within"], color=LIGHT, zorder=0, linewidth=0)
        _add_legend(figure, [*lines[1:], lines[0]], [*observed.values(), {"name": "without a transformer"}])
    return figure


def draw_strips(
    subjects: Sequence[Subject], sample: Sample, family: DistortionFamily, classes: Sequence[str]
) -> Image.Image:
    """Draw images of some classes at several angles, and below them the outputs of each model's transformers."""
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
