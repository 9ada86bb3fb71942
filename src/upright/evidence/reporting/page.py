"""The page of a report, with its figures inside."""

import base64
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image

from upright.evidence.reporting.evidence import Evidence
from upright.evidence.reporting.figures import draw_invariance, draw_reliability, draw_strips, draw_turning
from upright.evidence.reporting.invariance import ROTATION
from upright.evidence.reporting.measures import LISTED_MISTAKES, Result
from upright.runs.drawing import RED, Line, draw_confusion, draw_tiles, pixels_of, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "report.html"
CLASS_ROWS = 60
"""Maximum number of rows in the table of classes; the JSON lists all classes."""
CSS_DPI = 96


class Picture(NamedTuple):
    """A PNG image in the page.

    Args:
        data: content of the file in base64.
        width: in CSS pixels.
    """

    data: str
    width: int


def draw_all(evidence: Evidence, folder: Path) -> dict[str, Picture]:
    """Write all figures into ``folder``.

    Returns:
        The figures by name. All reports have ``accuracy``, ``consistency`` and ``reliability``, and for each model
        ``confusion-1``, and ``mistakes-1`` if it made any. With observations they have ``turning`` and ``sights``.
    """
    subjects, data = evidence.group
    names, classes = [subject.name for subject in subjects], data.spec.classes
    pictures: dict[str, Picture] = {}

    def add(name: str, figure: "Image.Image | Figure") -> None:
        path = folder / f"{name}.png"
        save_png(figure, path)
        width = figure.width if isinstance(figure, Image.Image) else round(figure.get_figwidth() * CSS_DPI)
        pictures[name] = Picture(base64.b64encode(path.read_bytes()).decode(), width)

    curves = [course.curves for course in evidence.courses]
    for measure in ("accuracy", "consistency"):
        add(measure, draw_invariance(measure, names, curves, evidence.ways, evidence.trained))
    before, after = ([each.bins for each in evidence.calibrations], [each.bins_after for each in evidence.calibrations])
    add("reliability", draw_reliability(names, before, after))
    turnings = {number: course.turning for number, course in enumerate(evidence.courses) if course.turning}
    if turnings:
        turning = [subjects[number] for number in turnings]
        add("turning", draw_turning([*turnings], [subject.name for subject in turning], [*turnings.values()]))
        rotation = next(way for way in evidence.ways if way.name == ROTATION)
        add("sights", draw_strips(turning, evidence.sample, rotation, classes))
    for number, (name, result) in enumerate(zip(names, evidence.results, strict=True), start=1):
        add(f"confusion-{number}", draw_confusion(name, torch.from_numpy(result.confusion), classes))
        if len(result.mistakes):
            add(f"mistakes-{number}", _draw_mistakes(evidence, result))
    return pictures


def _draw_mistakes(evidence: Evidence, result: Result) -> Image.Image:
    data, indices = evidence.group.data, result.mistakes[:LISTED_MISTAKES]
    classes, views = data.spec.classes, data.views(evidence.split)
    captions = []
    for i in indices.tolist():
        lines = [
            Line(f"{result.probabilities[i].max():.0%} · {classes[result.predicted[i]]}"),
            Line(f"is {classes[result.labels[i]]}", RED),
        ]
        if view := views.names[i % len(views.names)]:
            lines.append(Line(f"{view}{views.unit}" if views.unit else f"view {view}"))
        captions.append(lines)
    return draw_tiles("", pixels_of(data.samples(evidence.split)[torch.from_numpy(indices)].images), captions)


def write_page(path: Path, figures: Mapping[str, Any], pictures: Mapping[str, Picture]) -> None:
    """Write the HTML, with all figures inside. All text from models and data is escaped.

    Args:
        path: path of the HTML file.
        figures: every number, as plain data.
        pictures: figures by name, see `draw_all`.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    text = template.render(**figures, pictures=pictures, class_rows=CLASS_ROWS)
    path.write_text(text, encoding="utf-8")


FILTERS: dict[str, Callable[..., str]] = {
    "percent": lambda share: f"{100 * share:.1f}",
    "number": lambda value, digits=4: "-" if value is None else f"{value:.{digits}f}",
    "count": lambda value: f"{value:,}",
    "degrees": lambda value: f"{value:g}",
}
