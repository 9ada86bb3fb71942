"""Your own images: a table of paths and labels."""

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

from upright.data.download import absolute
from upright.data.image_files import ImageFiles
from upright.data.parquet import read_columns, read_parquet
from upright.data.resized import Row, class_name
from upright.data.split import SPLITS, split_of
from upright.errors import UserError, nearest

COLUMNS = ("path", "label", "split")
Cells = tuple[str, str, str]
"""Path, label and split of one line."""
Reader = Callable[[Path], Iterator[tuple[int, Cells]]]


class Table(ImageFiles):
    """A CSV or Parquet file with the columns ``path``, ``label`` and optionally ``split``; other columns are ignored.

    Paths are absolute, or relative to the table's folder. Labels are the names of the classes: text or whole numbers.
    Splits are train, val and test, in any spelling that `split_of` reads; a missing split is taken from the training
    images.

    Args:
        file: the table: ``.csv`` (UTF-8, commas, column names in the first line) or ``.parquet`` (needs pyarrow).
        separator: text between the classes of an image, such as ``;`` for ``cat;dog``. An image then has any number of
            classes; an empty label is none. In Parquet, a label may be a list. The splits are random, not stratified.
        **options: options of `ResizedImages`.
    """

    def __init__(self, *, file: str, separator: str | None = None, **options: object) -> None:
        if separator == "":
            raise UserError("separator must be at least one character, such as ';'; omit it for one class per image.")
        self.file, self.separator, self.multilabel = absolute(file), separator, separator is not None
        self.arguments["file"] = str(self.file)
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types

    @cached_property
    def _cells(self) -> dict[int, Cells]:
        """The checked cells by line, without looking for the images."""
        if not self.file.is_file():
            problem = "is a folder" if self.file.is_dir() else "does not exist"
            raise UserError(f"Table '{self.file}' {problem}; `file` (--data.file) is a .csv or .parquet file.")
        readers: dict[str, Reader] = {".csv": _csv_cells, ".parquet": partial(_parquet_cells, separator=self.separator)}
        if (suffix := self.file.suffix.lower()) not in readers:
            raise UserError(f"Table '{self.file}' must be a .csv or .parquet file.")
        table = dict(readers[suffix](self.file))
        if not table:
            raise UserError(f"Table '{self.file}' holds no images: no line follows the names of the columns.")
        splits = {split for _, _, split in table.values()}
        for line, (path, label, split) in table.items():
            if not path or not (label or self.multilabel):
                advice = " If an image may have several classes or none, give a `separator`." if path else ""
                raise UserError(f"{self._place(line)} has no {'label' if path else 'path'}.{advice}")
            if split not in ("", *SPLITS):
                raise UserError(
                    f"{self._place(line)}: split must be one of {', '.join(SPLITS)} (validation, Test, ... "
                    f"also count); got '{split}'." + nearest(split, SPLITS)
                )
            if not split and len(splits) > 1:
                raise UserError(f"{self._place(line)} has no split, and other lines have one.")
        if "train" not in splits and "" not in splits:
            raise UserError(f"Table '{self.file}' has the splits {sorted(splits)} but no 'train'.")
        return table

    def _place(self, line: int) -> str:
        return f"'{self.file}' line {line}"

    def classes(self) -> tuple[str, ...]:
        """Return the training labels, sorted; whole numbers by their value."""
        labels = {label for _, label, split in self._cells.values() if split in ("", "train")}
        names = {name for label in labels for name in self.class_names(label)}
        whole = all(re.fullmatch(r"-?\d+", name) for name in names)
        if len(names) < 2:
            advice = (
                " For one class, label each image with one of two names, such as cat and other, without a `separator`."
                if self.multilabel
                else ""
            )
            raise UserError(
                f"Table '{self.file}' must have at least two labels for training; found {sorted(names)}.{advice}"
            )
        return tuple(sorted(names, key=lambda name: (int(name) if whole else 0, name)))

    def class_names(self, label: str) -> list[str]:
        return [label] if self.separator is None else [n for part in label.split(self.separator) if (n := part.strip())]

    def remarks_on_rows(self) -> list[str]:
        if self.separator is None or any(self.separator in label for _, label, _ in self._cells.values()):
            return []
        return [f"No label contains the separator '{self.separator}', so no image has several classes."]

    def rows(self) -> list[Row]:
        lines: dict[str, int] = {}
        rows = []
        for line, (name, label, split) in self._cells.items():
            path = _existing_form(os.path.normpath(self.file.parent / name))
            if lines.setdefault(path, line) != line:
                raise UserError(
                    f"{self._place(line)}: '{name}' is already in line {lines[path]}; "
                    "an image has one label and one split."
                )
            rows.append(Row(label, split, name, self._place(line), Path(path)))
        if missing := [path for path in lines if not os.path.isfile(path)]:
            more = f", and {len(missing) - 1} other files do not exist either" if len(missing) > 1 else ""
            raise UserError(
                f"{self._place(lines[missing[0]])}: '{missing[0]}' does not exist{more}. "
                f"Paths are absolute, or relative to '{self.file.parent}'."
            )
        return rows

    def where(self, split: str) -> str:
        return f"split '{split}' of '{self.file}'"


def _csv_cells(file: Path) -> Iterator[tuple[int, Cells]]:
    try:
        # Spreadsheets write a byte order mark before the first name.
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, file)
            for cells in filter(None, reader):
                if len(cells) != len(header):
                    raise UserError(
                        f"'{file}' line {reader.line_num}: {len(cells)} cells under {len(header)} names. "
                        "A comma that belongs to a name needs quotes around it."
                    )
                yield reader.line_num, _cells(dict(zip(header, cells, strict=True)))
    except UnicodeDecodeError:
        raise UserError(f"Table '{file}' is not text in UTF-8; save it as UTF-8.") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"Table '{file}' cannot be read: {error}.") from None


def _parquet_cells(file: Path, separator: str | None) -> Iterator[tuple[int, Cells]]:
    header = read_parquet(file, lambda pq: pq.read_schema(file).names, advice=", or save it as .csv")
    _check_header(header, file)
    table = read_columns(file, [name for name in header if name in COLUMNS])
    for line, row in enumerate(table.to_pylist(), start=1):
        if isinstance(row["label"], list):
            if separator is None:
                raise UserError(f"'{file}' line {line}: the label is a list; give a `separator`, such as ';'.")
            row["label"] = separator.join(map(str, row["label"]))
        yield line, _cells({name: "" if cell is None else str(cell) for name, cell in row.items()})


def _check_header(header: list[str], file: Path) -> None:
    if any(header.count(name) > 1 for name in COLUMNS) or not {"path", "label"} <= set(header):
        raise UserError(
            f"Table '{file}' needs the columns path and label, and may have split, each once; it has {header}."
        )


def _cells(row: dict[str, str]) -> Cells:
    split = row.get("split", "").strip()
    return row["path"], class_name(row["label"].strip()), split_of(split) or split


def _existing_form(path: str) -> str:
    """Return the path in the Unicode form (composed or decomposed) in which it exists, or unchanged."""
    if path.isascii() or os.path.lexists(path):
        return path
    forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next(filter(os.path.lexists, forms), path)
