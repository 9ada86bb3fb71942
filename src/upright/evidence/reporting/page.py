"""The report's page and its pictures."""

import base64
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image

from upright.evidence.reporting.figures import draw_invariance, draw_reliability, draw_strips, draw_turning
from upright.evidence.reporting.gathering import Evidence
from upright.evidence.reporting.judging import WORST, Judged
from upright.runs.drawing import RED, Line, draw_confusion, draw_tiles, pixels_of, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "report.html"
MOST_CLASSES = 60
"""So many rows the page's table of classes has at most; the JSON has all."""
CSS_DPI = 96


class Picture(NamedTuple):
    """A PNG as the page shows it.

    Args:
        file: its name, beside the page.
        data: its content, in base 64.
        width: CSS pixels.
    """

    file: str
    data: str
    width: int


def draw_all(evidence: Evidence, folder: Path) -> dict[str, Picture]:
    """Write all pictures into ``folder``.

    Returns:
        By name: ``accuracy``, ``consistency``, ``reliability``, ``turning`` and ``sights`` where there is a spatial
        transformer, and ``confusion-1``, ``mistakes-1`` and so on of each model; no ``mistakes`` where there are none.
    """
    subjects, data = evidence.group
    names, classes = [subject.name for subject in subjects], data.spec.classes
    curves = [course.curves for course in evidence.courses]
    found: dict[str, Picture] = {}

    def add(name: str, drawn: "Image.Image | Figure") -> None:
        path = folder / f"{name}.png"
        save_picture(drawn, path)
        width = drawn.width if isinstance(drawn, Image.Image) else round(drawn.get_figwidth() * CSS_DPI)
        found[name] = Picture(path.name, base64.b64encode(path.read_bytes()).decode(), width)

    for measure in ("accuracy", "consistency"):
        add(measure, draw_invariance(measure, names, curves, evidence.ways, evidence.trained))
    before, after = ([getattr(each, when) for each in evidence.calibrated] for when in ("before", "after"))
    add("reliability", draw_reliability(names, before, after))
    turnings = [(number, course.turning) for number, course in enumerate(evidence.courses) if course.turning]
    if turnings:
        numbers, turned = [number for number, _ in turnings], [turning for _, turning in turnings]
        known = [names[number] for number in numbers]
        add("turning", draw_turning(numbers, known, turned))
        labels = [classes[evidence.sample.labels[place]] for place in evidence.shown.places]
        add("sights", draw_strips(evidence.shown, labels, known, turned))
    for number, judged in enumerate(evidence.judged, start=1):
        add(f"confusion-{number}", draw_confusion(names[number - 1], judged.confusion, classes))
        if len(judged.worst):
            add(f"mistakes-{number}", _mistakes(evidence, judged))
    return found


def _mistakes(evidence: Evidence, judged: Judged) -> Image.Image:
    data, chosen = evidence.group.data, judged.worst[:WORST]
    classes, views = data.spec.classes, data.views(evidence.split)
    number = len(views.names)
    captions = []
    for i in chosen.tolist():
        view = views.names[i % number]
        captions.append(
            [
                Line(f"{judged.probabilities[i].max():.0%} · {classes[judged.predicted[i]]}"),
                Line(f"is {classes[judged.labels[i]]}", RED),
                *([Line(f"{view}{views.unit}" if views.unit else f"view {view}")] if view else []),
            ]
        )
    images = pixels_of(data.samples(evidence.split)[torch.from_numpy(chosen)].images)
    return draw_tiles("", images, captions)


def write_page(path: Path, figures: Mapping[str, Any], pictures: Mapping[str, Picture]) -> None:
    """Write the HTML, with all pictures inside. Whatever comes from models and data is escaped.

    Args:
        path: of the file.
        figures: every number.
        pictures: by name, see `draw_all`.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    text = template.render(**figures, pictures=pictures, most_classes=MOST_CLASSES)
    path.write_text(text, encoding="utf-8")


FILTERS: dict[str, Callable[..., str]] = {
    "percent": lambda share: f"{100 * share:.1f}",
    "number": lambda value, digits=4: "-" if value is None else f"{value:.{digits}f}",
    "count": lambda value: f"{value:,}",
    "degrees": lambda value: f"{value:g}",
}
