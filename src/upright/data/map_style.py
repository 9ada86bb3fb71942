"""Map-style datasets of other libraries, such as torchvision's: ``dataset[i]`` is an image with its label."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from upright.data.resized import ResizedImages, Row
from upright.data.source import Source
from upright.data.split import SPLITS, content_hash
from upright.errors import ImageError, UserError, one_line
from upright.images import ImageSpec, Pixels, decode
from upright.recipes import Recipe, build, recipe

LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
"""Attributes in which torchvision's datasets store their labels."""


class MapStyle(ResizedImages):
    """Datasets with ``__len__`` and ``__getitem__``, which returns ``(image, label)``.

    An image is a PIL image, a uint8 array ``(H, W)`` or ``(H, W, C)``, or a uint8 tensor ``(C, H, W)``. Labels are
    whole numbers from 0. The names of the classes are those of ``train.classes``, else the numbers.

    A cache on disk is valid for the same classes and arguments, labels, and first, middle and last image. If other
    images change, delete the cache.

    Args:
        train: training images: ``class_path`` and ``init_args`` of the dataset, or ``functools.partial`` of its class.
        val: validation images; without them, a part of the training images.
        test: test images, likewise.
        **options: options of `ResizedImages`.
    """

    def __init__(
        self,
        *,
        train: Recipe | Callable[[], Any],
        val: Recipe | Callable[[], Any] | None = None,
        test: Recipe | Callable[[], Any] | None = None,
        **options: object,
    ) -> None:
        self._recipes = {
            split: recipe(part) for split, part in zip(SPLITS, (train, val, test), strict=True) if part is not None
        }
        for split, part in self._recipes.items():
            if not isinstance(part, dict) or "class_path" not in part:
                raise UserError(f"{split} needs class_path and init_args of a dataset, got {part!r}.")
        self.arguments |= self._recipes
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types

    @cached_property
    def _datasets(self) -> dict[str, Any]:
        datasets = {}
        for split, part in self._recipes.items():
            try:
                datasets[split] = dataset = build(part)()
                lacks = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
            except UserError:
                raise
            except Exception as error:  # anything that a user's class raises
                raise UserError(f"{split}: {part['class_path']} cannot be built: {_one_line(error)}") from error
            if lacks or not len(dataset):
                raise UserError(f"{split}: {part['class_path']} has no {' and no '.join(lacks) or 'images'}.")
        return datasets

    @cached_property
    def _split_labels(self) -> dict[str, list[int]]:
        return {split: _labels(split, dataset) for split, dataset in self._datasets.items()}

    def classes(self) -> tuple[str, ...]:
        """Return the names of the training classes."""
        names = getattr(self._datasets["train"], "classes", None)
        if isinstance(names, Sequence) and not isinstance(names, str):
            return tuple(map(str, names))
        return tuple(map(str, range(max(self._split_labels["train"]) + 1)))

    def where(self, split: str) -> str:
        return f"split '{split}' of {self._recipes['train']['class_path']}"

    def read(self) -> Source:
        classes, rows = self.classes(), []
        for split, labels in self._split_labels.items():
            for index, label in enumerate(labels):
                name = classes[label] if 0 <= label < len(classes) else str(label)
                rows.append(Row(name, split, f"{split}/{index:06d}", f"Item {index} of {self.where(split)}"))
        images = _Items(list(self._datasets.values()), [row.name for row in rows], self.spec, self.max_pixels)
        samples = [content_hash(images[index]) for index in sorted({0, len(rows) // 2, len(rows) - 1})]
        labels = [label for part in self._split_labels.values() for label in part]
        key = json.dumps([self._recipes, labels, samples, self.max_pixels]).encode()
        return self.arrange(rows, images, fingerprint=blake2b(key, digest_size=16).hexdigest())


class _Items(Sequence[Pixels]):
    """Images of several datasets, one after the other."""

    def __init__(self, datasets: list[Any], names: list[str], spec: ImageSpec, max_pixels: int) -> None:
        self.datasets, self.names, self.spec, self.max_pixels = datasets, names, spec, max_pixels
        self.ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # only one image at a time is used
        number = int(np.searchsorted(self.ends, index, side="right"))
        dataset = self.datasets[number]
        try:
            image = dataset[int(index - (self.ends[number] - len(dataset)))][0]
        except Exception as error:  # anything that a user's class raises
            raise ImageError(f"'{self.names[index]}' cannot be read: {_one_line(error)}") from error
        try:
            if isinstance(image, torch.Tensor):
                if image.dtype != torch.uint8:
                    raise ImageError(
                        f"a tensor must be uint8, got {image.dtype}. Leave out `transform`: Upright resizes, augments "
                        "and normalises images itself"
                    )
                image = image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy()
            return decode(image, self.spec, self.max_pixels)
        except ImageError as error:
            raise ImageError(f"'{self.names[index]}': {error}") from None


def _labels(split: str, dataset: Any) -> list[int]:
    """Return all labels: from an attribute if it agrees with the first and the last item, else from every item."""
    try:
        last = len(dataset) - 1
        ends = [int(dataset[index][1]) for index in (0, last)]
        for attribute in LABEL_ATTRIBUTES:
            labels = getattr(dataset, attribute, None)
            if labels is not None and len(labels) == len(dataset) and [int(labels[0]), int(labels[last])] == ends:
                return list(map(int, labels))
        return [int(dataset[index][1]) for index in range(len(dataset))]
    except Exception as error:  # anything that a user's class raises
        raise UserError(
            f"{split}: {type(dataset).__name__} must return (image, label) with a whole number as label: "
            f"{_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"
