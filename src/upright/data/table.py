"""Your own images: a table of paths and labels."""

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


class Row(NamedTuple):
    """One image, and its line in the table, from 1."""

    line: int
    path: str
    label: str
    split: str = ""


class Table(Pictures):
    """A CSV or Parquet file with the columns ``path``, ``label`` and optionally ``split``; other columns are ignored.

    Paths are absolute, or relative to the table's folder. Labels are the names of the classes: text or whole numbers.
    Splits are train, val and test; a missing split is taken from the training images.

    Args:
        file: the table: ``.csv`` (UTF-8, commas, column names in the first line) or ``.parquet`` (needs pyarrow).
        **options: options of `Pictures`.
    """

    def __init__(self, *, file: str, **options: object) -> None:
        self.file = absolute(file)
        self.arguments["file"] = str(self.file)
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types

    @cached_property
    def rows(self) -> list[Row]:
        """The checked rows of the table, without looking for the images."""
        if not self.file.is_file():
            raise UserError(f"Table '{self.file}' does not exist; `file` (--data.file) is a .csv or .parquet file.")
        readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
        if (suffix := self.file.suffix.lower()) not in readers:
            raise UserError(f"Table '{self.file}' must be a .csv or .parquet file.")
        rows = list(readers[suffix](self.file))
        if not rows:
            raise UserError(f"Table '{self.file}' holds no images: no line follows the names of the columns.")
        splits = {row.split for row in rows}
        for row in rows:
            place = f"'{self.file}' line {row.line}"
            if not row.path or not row.label:
                raise UserError(f"{place} has no {'label' if row.path else 'path'}.")
            if row.split not in ("", *SPLITS):
                allowed = f"split must be one of {', '.join(SPLITS)}; got '{row.split}'."
                raise UserError(f"{place}: {allowed}{nearest(row.split, SPLITS)}")
            if not row.split and len(splits) > 1:
                raise UserError(f"{place} has no split, and other lines have one.")
        if "train" not in splits and "" not in splits:
            raise UserError(f"Table '{self.file}' has the splits {sorted(splits)} but no 'train'.")
        return rows

    @property
    def spec(self) -> ImageSpec:
        """Classes are the labels of the training images, sorted; whole numbers by their value."""
        names = {row.label for row in self.rows if row.split in ("", "train")}
        whole = all(re.fullmatch(r"-?\d+", name) for name in names)
        classes = tuple(sorted(names, key=lambda name: (int(name) if whole else 0, name)))
        if len(classes) < 2:
            raise UserError(f"Table '{self.file}' must have at least two labels for training; found {list(classes)}.")
        return self.spec_of(classes)

    def read(self) -> Source:
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
                    "an image has one label and one split."
                )
            splits.setdefault(row.split, []).append(index)
        if missing := [path for path in lines if not os.path.isfile(path)]:
            more = f", and {len(missing) - 1} other files do not exist either" if len(missing) > 1 else ""
            raise UserError(
                f"'{self.file}' line {lines[missing[0]]}: '{missing[0]}' does not exist{more}. "
                f"Paths are absolute, or relative to '{self.file.parent}'."
            )
        labels = [classes[row.label] for row in self.rows]
        return self.source_of([Path(path) for path in lines], labels, [row.path for row in self.rows], splits)

    def where(self, split: str) -> str:
        return f"split '{split}' of '{self.file}'"


def _csv_rows(file: Path) -> Iterator[Row]:
    try:
        # Spreadsheets write a byte order mark before the first name.
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            columns = _columns(header, file)
            for cells in filter(None, reader):
                if len(cells) != len(header):
                    raise UserError(
                        f"'{file}' line {reader.line_num}: {len(cells)} cells under {len(header)} names. "
                        "A comma that belongs to a name needs quotes around it."
                    )
                row = dict(zip(header, cells, strict=True))
                yield _row(reader.line_num, {name: row[name] for name in columns})
    except UnicodeDecodeError:
        raise UserError(f"Table '{file}' is not text in UTF-8; save it as UTF-8.") from None
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
        columns = _columns(pyarrow.parquet.read_schema(file).names, file)
        table = pyarrow.parquet.read_table(file, columns=columns, partitioning=None)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"Table '{file}' cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    for line, cells in enumerate(table.to_pylist(), start=1):
        yield _row(line, {name: "" if cell is None else str(cell) for name, cell in cells.items()})


def _columns(header: list[str], file: Path) -> list[str]:
    """Return the columns to read, after checking the header."""
    columns = [name for name in header if name in ("path", "label", "split")]
    if len(columns) > len(set(columns)) or not {"path", "label"} <= set(columns):
        raise UserError(
            f"Table '{file}' needs the columns path and label, and may have split, each once; it has {header}."
        )
    return columns


def _row(line: int, cells: dict[str, str]) -> Row:
    return Row(line, cells["path"], cells["label"].strip(), cells.get("split", "").strip())
