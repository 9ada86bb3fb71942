"""The base of datasets that are image files on disk."""

import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from upright.data.datamodule import ImageDataModule
from upright.data.source import Source
from upright.errors import UserError, nearest
from upright.images import MAX_PIXELS, ImageSpec, Pixels, Resize, decode


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


class ImageFiles(ImageDataModule):
    """Images of any size and format. A subclass finds the files; it implements `classes`, `rows` and `where`.

    Args:
        size: height and width of the network's input; by default that of a `Timm`, else 32.
        channels: 1 (grey) or 3 (RGB).
        resize: ``stretch``, ``crop`` (the largest centred square first), ``pad`` (the whole image between bars of
            ``background``), or ``none``, if all images have ``size`` and the network takes any size.
        background: grey level (0 to 255) behind transparent pixels and of the bars.
        mean: subtracted from the pixels, on the scale of 0 to 1: one number per channel, or one for all; by default
            that of a `Timm`, else 0.5.
        std: divisor of the pixels, likewise; by default that of a `Timm`, else 0.25.
        max_pixels: largest number of pixels of an image; a larger one counts as unreadable.
        **options: options of `ImageDataModule`.
    """

    adopted = ("size", "mean", "std")
    """Options whose defaults a network with an ``image_format`` sets; see `upright.data.configs.adopt_format`."""

    def __init__(
        self,
        *,
        size: int | None = None,
        channels: int = 3,
        resize: Resize = "stretch",
        background: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        max_pixels: int = MAX_PIXELS,
        **options: object,
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types
        size = 32 if size is None else size
        self.size, self.channels, self.resize, self.background = size, channels, resize, background
        self.max_pixels = max_pixels
        self.mean, self.std = (
            tuple(v) * channels if len(v) == 1 else tuple(v) for v in (mean or (0.5,), std or (0.25,))
        )

    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Return the labels of the training images, in order."""

    @abstractmethod
    def rows(self) -> Sequence[Row]:
        """Find all images."""

    @abstractmethod
    def where(self, split: str) -> str:
        """Return the name of a split for messages."""

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(
            self.channels, self.size, self.size, self.classes(), self.mean, self.std, self.resize, self.background
        )

    def read(self) -> Source:
        spec, rows = self.spec, self.rows()
        numbers = {name: number for number, name in enumerate(spec.classes)}
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

    def check_classes(self, split: str, labels: set[str]) -> None:
        """Refuse a split that lacks a class."""
        if empty := [name for name in self.spec.classes if name not in labels]:
            raise UserError(f"No image in class {empty} of {self.where(split)}.")


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
