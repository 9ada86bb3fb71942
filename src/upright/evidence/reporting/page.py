"""Write the page of a report, with embedded figures."""

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from upright.evidence.reporting.tables import write_tables
from upright.runs.drawing import save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
CLASS_ROWS = 60
"""Largest number of rows in the table of classes. The JSON file lists all classes."""
CSS_DPI = 96
FILTERS: dict[str, Callable[..., str]] = {
    "percent": lambda share: f"{100 * share:.1f}",
    "number": lambda value, digits=4: "-" if value is None else f"{value:.{digits}f}",
    "count": lambda value: f"{value:,}",
    "degrees": lambda value: f"{value:g}",
}

Figures = dict[str, "Image.Image | Figure"]


def write_page(
    folder: Path, template: str, record: Mapping[str, Any], figures: Figures, vector: str | None = None
) -> None:
    """Write ``report.html`` with its figures and tables, also as files. Text from models and data is escaped.

    Args:
        folder: the folder of the report.
        template: file of the template, beside this module.
        record: all measurements as plain data, the content of ``report.json``.
        figures: the figures by name, which become PNG files.
        vector: also write the plots as ``pdf`` or ``svg``; None writes no vector graphics.
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
        embedded[name] = {"data": base64.b64encode(path.read_bytes()).decode(), "width": width}
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    text = environment.get_template(template).render(**record, figures=embedded, class_rows=CLASS_ROWS)
    (folder / PAGE).write_text(text, encoding="utf-8")
    write_tables(text, folder)
