"""Write the page of a report, with embedded figures."""

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from upright.evidence.reporting.evidence import Evidence
from upright.evidence.reporting.figures import draw_invariance, draw_reliability, draw_rotation_response, draw_strips
from upright.evidence.reporting.invariance import ROTATION
from upright.evidence.reporting.measures import LISTED_MISTAKES, Predictions
from upright.evidence.reporting.tables import write_tables
from upright.runs.drawing import RED, Line, draw_confusion, draw_tiles, pixels_of, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASS_ROWS = 60
"""Largest number of rows in the table of classes. The JSON file lists all classes."""
CSS_DPI = 96


Figures = dict[str, "Image.Image | Figure"]


class EmbeddedFigure(NamedTuple):
    """A PNG image in the page.

    Args:
        data: content of the file in base64.
        width: width in CSS pixels.
    """

    data: str
    width: int


def embed(
    figures: Mapping[str, "Image.Image | Figure"], folder: Path, vector: str | None = None
) -> dict[str, EmbeddedFigure]:
    """Write figures into ``folder`` as PNG, and plots as vector graphics too; return them for the page.

    Args:
        figures: the figures by name.
        folder: the folder of the report.
        vector: ``pdf`` or ``svg``; None writes no vector graphics.
    """
    embedded = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        save_png(figure, path)
        if isinstance(figure, Image.Image):
            width = figure.width
        else:
            width = round(figure.get_figwidth() * CSS_DPI)
            if vector:
                figure.savefig(path.with_suffix(f".{vector}"))
        embedded[name] = EmbeddedFigure(base64.b64encode(path.read_bytes()).decode(), width)
    return embedded


def draw_all(evidence: Evidence) -> dict[str, "Image.Image | Figure"]:
    """Draw all figures.

    Args:
        evidence: the measurements.

    Returns:
        The figures by name. All reports have ``accuracy``, ``consistency`` and ``reliability``. Each model has a
        ``confusion-N``, and ``mistakes-N`` if it made mistakes. With observations of spatial transformers, a report has
        ``turning`` (their response to rotation) and ``sights`` (their outputs).
    """
    subjects, data = evidence.group
    names, classes = [subject.name for subject in subjects], data.spec.classes
    figures: dict[str, Image.Image | Figure] = {}
    curves = [invariance.curves for invariance in evidence.invariances]
    for measure in ("accuracy", "consistency"):
        figures[measure] = draw_invariance(measure, names, curves, evidence.families, evidence.training_ranges)
    before, after = ([each.bins for each in evidence.calibrations], [each.bins_after for each in evidence.calibrations])
    figures["reliability"] = draw_reliability(names, before, after)
    numbered = enumerate(each.rotation_response for each in evidence.invariances)
    responses = {number: response for number, response in numbered if response}
    if responses:
        observed = [subjects[number] for number in responses]
        names_observed = [subject.name for subject in observed]
        figures["turning"] = draw_rotation_response([*responses], names_observed, [*responses.values()])
        rotation = next(family for family in evidence.families if family.name == ROTATION)
        figures["sights"] = draw_strips(observed, evidence.sample, rotation, classes)
    for number, (name, predictions) in enumerate(zip(names, evidence.predictions, strict=True), start=1):
        figures[f"confusion-{number}"] = draw_confusion(name, torch.from_numpy(predictions.confusion), classes)
        if len(predictions.mistakes):
            figures[f"mistakes-{number}"] = _draw_mistakes(evidence, predictions)
    return figures


def _draw_mistakes(evidence: Evidence, predictions: Predictions) -> Image.Image:
    data, indices = evidence.group.data, predictions.mistakes[:LISTED_MISTAKES]
    classes, views = data.spec.classes, data.views(evidence.split)
    captions = []
    for i in indices.tolist():
        lines = [
            Line(f"{predictions.probabilities[i].max():.0%} · {classes[predictions.classes[i]]}"),
            Line(f"is {classes[predictions.labels[i]]}", RED),
        ]
        if view := views.names[i % len(views.names)]:
            lines.append(Line(f"{view}{views.unit}" if views.unit else f"view {view}"))
        captions.append(lines)
    return draw_tiles("", pixels_of(data.samples(evidence.split)[torch.from_numpy(indices)].images), captions)


def write_page(path: Path, template: str, record: Mapping[str, Any], figures: Mapping[str, EmbeddedFigure]) -> None:
    """Write the HTML with embedded figures, and its tables beside it. All text from models and data is escaped.

    Args:
        path: path of the HTML file.
        template: ``report.html``, or ``orientation.html`` for models that estimate the orientation.
        record: all measurements as plain data, see `evidence.to_record`.
        figures: figures by name, see `embed`.
    """
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    text = environment.get_template(template).render(**record, figures=figures, class_rows=CLASS_ROWS)
    path.write_text(text, encoding="utf-8")
    write_tables(text, path.parent)


FILTERS: dict[str, Callable[..., str]] = {
    "percent": lambda share: f"{100 * share:.1f}",
    "number": lambda value, digits=4: "-" if value is None else f"{value:.{digits}f}",
    "count": lambda value: f"{value:,}",
    "degrees": lambda value: f"{value:g}",
}
