"""Your own pictures: a table that says where each one is and what it shows."""

import csv
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from upright.data.download import absolute
from upright.data.pictures import Pictures
from upright.data.source import Source
from upright.data.split import SPLITS
from upright.errors import UserError, nearest
from upright.images import ImageSpec

COLUMNS = ("path", "label", "split")


class Row(NamedTuple):
    """One picture, and its line in the table, from 1."""

    line: int
    path: str
    label: str
    split: str


class Table(Pictures):
    """A CSV or Parquet file with the columns ``path``, ``label`` and, if you have it, ``split``; others do not count.

    Paths are absolute, or from the table's own folder. Labels are the names of the classes: text or whole numbers.
    Splits are train, val and test; one that is not there is split off the training images.

    Args:
        file: the table: ``.csv`` (UTF-8, commas, the columns' names in the first line) or ``.parquet`` (needs pyarrow).
        **options: see `Pictures`.
    """

    def __init__(self, *, file: str, **options: object) -> None:
        self.file = absolute(file)
        self.arguments["file"] = str(self.file)
        super().__init__(**options)  # type: ignore[arg-type]  # jsonargparse reads the base's own types

    @cached_property
    def rows(self) -> list[Row]:
        """The table, checked; no picture is looked for."""
        if not self.file.is_file():
            raise UserError(f"Table '{self.file}' does not exist; `file` (--data.file) is a .csv or .parquet file.")
        readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
        if (suffix := self.file.suffix.lower()) not in readers:
            raise UserError(f"Table '{self.file}' must be a .csv or .parquet file.")
        rows = list(readers[suffix](self.file))
        if not rows:
            raise UserError(f"Table '{self.file}' holds no pictures: no line follows the names of the columns.")
        for row in rows:
            if row.split not in ("", *SPLITS):
                raise UserError(
                    f"'{self.file}' line {row.line}: split must be one of {', '.join(SPLITS)}; got '{row.split}'."
                    + nearest(row.split, SPLITS)
                )
        given = {row.split for row in rows}
        if "" in given and len(given) > 1:
            line = next(row.line for row in rows if not row.split)
            raise UserError(f"'{self.file}' line {line} says no split, and others do.")
        if "" not in given and "train" not in given:
            raise UserError(f"Table '{self.file}' has the splits {sorted(given)} but no 'train'.")
        return rows

    @property
    def spec(self) -> ImageSpec:
        """Classes are the labels of the training images, sorted; whole numbers by their value."""
        names = {row.label for row in self.rows if row.split in ("", "train")}
        whole = all(re.fullmatch(r"-?\d+", name) for name in names)
        classes = tuple(sorted(names, key=lambda name: (int(name) if whole else 0, name)))
        if len(classes) < 2:
            raise UserError(f"Table '{self.file}' must have at least two labels to train on; found {list(classes)}.")
        return self.spec_of(classes)

    def read(self) -> Source:
        """Look for all pictures; they are decoded when they are needed."""
        classes = {name: label for label, name in enumerate(self.spec.classes)}
        lines: dict[str, int] = {}
        splits: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.label not in classes:
                raise UserError(
                    f"'{self.file}' line {row.line}: label '{row.label}' of split '{row.split}' is not among the "
                    f"training labels {tuple(classes)}.{nearest(row.label, classes)}"
                )
            path = os.path.normpath(self.file.parent / row.path)
            if lines.setdefault(path, row.line) != row.line:
                raise UserError(
                    f"'{self.file}' line {row.line}: '{row.path}' is already in line {lines[path]}; "
                    "a picture has one label and one split."
                )
            splits.setdefault(row.split, []).append(index)
        if missing := [(line, path) for path, line in lines.items() if not os.path.isfile(path)]:
            (line, path), *others = missing
            raise UserError(
                f"'{self.file}' line {line}: '{path}' does not exist"
                + (f", nor do {len(others)} others" if others else "")
                + f". Paths are absolute, or from '{self.file.parent}'."
            )
        labels = [classes[row.label] for row in self.rows]
        return self.source_of([Path(path) for path in lines], labels, [row.path for row in self.rows], splits)

    def where(self, split: str) -> str:
        """The split, and the table."""
        return f"split '{split}' of '{self.file}'"


def _csv_rows(file: Path) -> Iterator[Row]:
    try:
        # Spreadsheets put a byte order mark before the first name.
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            places = _places(header, file)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"'{file}' line {reader.line_num}: {len(cells)} cells under {len(header)} names. "
                        "A comma that belongs to a name needs quotes around it."
                    )
                yield _row(file, reader.line_num, {name: cells[place] for name, place in places.items()})
    except UnicodeDecodeError:
        raise UserError(f"Table '{file}' is not text in UTF-8; save it as that.") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"Table '{file}' cannot be read: {error}.") from None


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"Table '{file}' needs the package 'pyarrow': pip install 'upright[parquet]', or save it as .csv."
        ) from None
    try:
        places = _places(pyarrow.parquet.read_schema(file).names, file)
        table = pyarrow.parquet.read_table(file, columns=list(places), partitioning=None)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"Table '{file}' cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    for line, cells in enumerate(table.to_pylist(), start=1):
        yield _row(file, line, {name: "" if cell is None else str(cell) for name, cell in cells.items()})


def _places(header: list[str], file: Path) -> dict[str, int]:
    """Where our columns are."""
    twice = [name for name in COLUMNS if header.count(name) > 1]
    if twice or not {"path", "label"} <= set(header):
        raise UserError(
            f"Table '{file}' needs the columns path and label, and may have split, each once; it has {header}."
        )
    return {name: header.index(name) for name in COLUMNS if name in header}


def _row(file: Path, line: int, cells: dict[str, str]) -> Row:
    row = Row(line, cells["path"], cells["label"].strip(), cells.get("split", "").strip())
    for name in ("path", "label"):
        if not getattr(row, name):
            raise UserError(f"'{file}' line {line} has no {name}.")
    return row
