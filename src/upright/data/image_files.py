"""The base of datasets that are image files on disk."""

import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from upright.data.resized import ResizedImages
from upright.data.source import Source
from upright.errors import UserError, nearest
from upright.images import ImageSpec, Pixels, decode


class Row(NamedTuple):
    """One image file.

    Args:
        path: the file.
        label: name of the class.
        split: ``train``, ``val`` or ``test``; empty if the user did not split the images.
        name: short name of the image.
        place: where the label comes from, for messages.
    """

    path: Path
    label: str
    split: str
    name: str
    place: str


class ImageFiles(ResizedImages):
    """Images of any size and format in files. A subclass finds them; it implements `classes`, `rows` and `where`.

    Args:
        **options: options of `ResizedImages`.
    """

    @abstractmethod
    def rows(self) -> Sequence[Row]:
        """Find all images."""

    def read(self) -> Source:
        spec, rows = self.spec, self.rows()
        numbers = {name: number for number, name in enumerate(spec.classes or ("",))}
        splits: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            if row.label not in numbers:
                raise UserError(
                    f"{row.place}: label '{row.label}' of split '{row.split}' is not among the training labels "
                    f"{spec.classes}.{nearest(row.label, numbers)}"
                )
            splits.setdefault(row.split, []).append(index)
        for split, indices in splits.items():
            self.check_classes(split, {rows[index].label for index in indices})
        paths, labels, _, names, _ = zip(*rows, strict=True)
        return Source(
            _Files(paths, spec, self.max_pixels),
            [numbers[label] for label in labels],
            names,
            None if "" in splits else splits,
            paths,
            self.remarks_on_rows(),
        )

    def remarks_on_rows(self) -> list[str]:
        """Return sentences for the user about the files, for example about those that are left out."""
        return []


class _Files(Sequence[Pixels]):  # its name is part of the cache's key
    """Images that are decoded at every access."""

    def __init__(self, paths: Sequence[Path], spec: ImageSpec, max_pixels: int) -> None:
        self.paths, self.spec, self.max_pixels = paths, spec, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # only one image at a time is used
        return decode(self.paths[index], self.spec, self.max_pixels)


def class_name(text: str) -> str:
    """Return the name of a class in Unicode's composed form (NFC): file systems and tables may decompose it."""
    return unicodedata.normalize("NFC", text)
