"""The base of datasets of images of any size."""

import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from upright.data.datamodule import ImageDataModule
from upright.data.source import Images, Source
from upright.errors import UserError, nearest
from upright.images import MAX_PIXELS, ImageSpec, Interpolation, Resize


class Row(NamedTuple):
    """One image of a dataset.

    Args:
        label: name of the class; with several classes, see `ResizedImages.class_names`.
        split: ``train``, ``val`` or ``test``; empty if the user did not split the images.
        name: short name of the image.
        place: where the label comes from, for messages.
        path: the file, if the image has its own.
    """

    label: str
    split: str
    name: str
    place: str
    path: Path = Path()


class ResizedImages(ImageDataModule):
    """Images of any size and format, resized to one size. A subclass implements `classes`, `where` and `read`.

    Args:
        size: height and width of the network's input; by default that of a `Timm`, else 32.
        stored: height and width of the stored training images, by default ``size``. A larger one keeps details for
            `RandomResizedCrop`; the model resizes the augmented images.
        channels: 1 (grey) or 3 (RGB).
        resize: ``stretch``, ``crop`` (the largest centred square first), ``pad`` (the whole image between bars of
            ``background``), or ``none``, if all images have ``size`` and the network takes any size.
        interpolation: ``bilinear`` or ``bicubic``, with antialiasing; by default that of a `Timm`, else bilinear.
        background: grey level (0 to 255) behind transparent pixels and of the bars.
        mean: subtracted from the pixels, on the scale of 0 to 1: one number per channel, or one for all; by default
            that of a `Timm`, else 0.5.
        std: divisor of the pixels, likewise; by default that of a `Timm`, else 0.25.
        max_pixels: largest number of pixels of an image; a larger one counts as unreadable.
        **options: options of `ImageDataModule`.
    """

    adopted = ("size", "mean", "std", "interpolation")
    """Options whose defaults a network with an ``image_format`` sets; see `upright.data.configs.adopt_format`."""
    multilabel = False
    """See `ImageSpec`."""

    def __init__(
        self,
        *,
        size: int | None = None,
        stored: int | None = None,
        channels: int = 3,
        resize: Resize = "stretch",
        interpolation: Interpolation | None = None,
        background: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        max_pixels: int = MAX_PIXELS,
        **options: object,
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types
        size = 32 if size is None else size
        if stored is not None and (stored < size or resize == "none"):
            raise UserError(
                f"stored must be at least size, and needs a resize other than none; got stored {stored}, size {size} "
                f"and resize {resize}."
            )
        self.stored = stored
        self.size, self.channels, self.resize, self.background = size, channels, resize, background
        self.interpolation: Interpolation = interpolation or "bilinear"
        self.max_pixels = max_pixels
        self.mean, self.std = (
            tuple(v) * channels if len(v) == 1 else tuple(v) for v in (mean or (0.5,), std or (0.25,))
        )

    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Return the labels of the training images, in order."""

    @abstractmethod
    def where(self, split: str) -> str:
        """Return the name of a split for messages."""

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(
            self.channels, self.size, self.size, self.classes(), self.mean, self.std, self.resize, self.background,
            interpolation=self.interpolation, multilabel=self.multilabel,
        )  # fmt: skip

    @property
    def stored_size(self) -> tuple[int, int]:
        side = self.stored or self.size
        return side, side

    def class_names(self, label: str) -> Sequence[str]:
        """Return the classes in the label of a `Row`."""
        return [label]

    def arrange(self, rows: Sequence[Row], images: Images, **details: Any) -> Source:
        """Return the source of these images, one per row; ``details`` are other arguments of `Source`.

        Raise a `UserError` if a label is not among the classes, or a split lacks a class.
        """
        classes = self.classes()
        numbers = {name: number for number, name in enumerate(classes or ("",))}
        splits: dict[str, list[int]] = {}
        labels: Any = np.zeros((len(rows), len(classes)), np.int64) if self.multilabel else []
        for index, row in enumerate(rows):
            for label in self.class_names(row.label):
                if label not in numbers:
                    raise UserError(
                        f"{row.place}: label '{label}' of split '{row.split}' is not among the training labels "
                        f"{classes}.{nearest(label, numbers)}"
                    )
                if self.multilabel:
                    labels[index, numbers[label]] = 1
                else:
                    labels.append(numbers[label])
            splits.setdefault(row.split, []).append(index)
        for split, indices in ({} if self.multilabel else splits).items():
            self.check_classes(split, {rows[index].label for index in indices})
        names = [row.name for row in rows]
        return Source(images, labels, names, None if "" in splits else splits, **details)

    def check_classes(self, split: str, labels: set[str]) -> None:
        """Refuse a split that lacks a class."""
        if empty := [name for name in self.classes() if name not in labels]:
            raise UserError(f"No image in class {empty} of {self.where(split)}.")


def class_name(text: str) -> str:
    """Return the name of a class in Unicode's composed form (NFC): file systems and tables may decompose it."""
    return unicodedata.normalize("NFC", text)
