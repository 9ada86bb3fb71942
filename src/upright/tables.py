"""Read and write tables as CSV, and write them as Markdown."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from upright.files import write_text


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file such as ``metrics.csv``, or no rows if the file does not exist."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def markdown(rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Return a Markdown table whose columns are also aligned in a terminal. The first row has the headings.

    The last ``numbers`` columns hold numbers, which are aligned to the right.
    """
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" * (len(widths) - numbers) + ">" * numbers
    lines = [[f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows]
    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in zip(sides, widths, strict=True)]
    lines.insert(1, rule)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
