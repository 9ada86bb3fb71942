"""The base of published datasets: small images of one size, with a training and a test part, downloaded once."""

import gzip
import zipfile
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from upright.data.datamodule import ImageDataModule
from upright.data.download import absolute, data_folder, download
from upright.data.source import Source
from upright.errors import UserError
from upright.images import ImageSpec

Bytes = npt.NDArray[np.uint8]


class LabelledImages(NamedTuple):
    """Images ``(N, H, W, C)`` and labels ``(N,)``, uint8, in the published order."""

    images: Bytes
    labels: Bytes


class Published(ImageDataModule):
    """A published dataset. A subclass sets the class variables and implements `parts`.

    Args:
        root: folder of the published files. By default the dataset's own folder in ``$UPRIGHT_DATA``, or in the user's
            cache if that variable is not set; missing files are downloaded there once, and their MD5 is checked.
        val_fraction: fraction of the training images, for validation.
        **options: options of `ImageDataModule`.
    """

    cached_as: ClassVar[str]
    """Name of the folder in the cache."""
    checksums: ClassVar[dict[str, str]]
    """Names of the files to download, and the MD5 of each."""
    address: ClassVar[str]
    """Address of the folder that holds them."""
    wanted_files: ClassVar[str]
    """Content of `root`, for messages."""
    shape: ClassVar[tuple[int, int, int]]
    """Height, width and channels of an image."""
    classes: tuple[str, ...]
    """Names, in the order of the labels."""
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    """Mean and standard deviation of the training images, on the scale of 0 to 1: well-known numbers, not measured."""

    def __init__(self, *, root: str | None = None, val_fraction: float = 0.1, **options: object) -> None:
        if root is not None:
            root = self.arguments["root"] = str(absolute(root))
        super().__init__(val_fraction=val_fraction, **options)  # type: ignore[arg-type]  # the base's own types
        self.root = root

    @property
    def spec(self) -> ImageSpec:
        height, width, channels = self.shape
        return ImageSpec(channels, height, width, self.classes, self.mean, self.std)

    @abstractmethod
    def parts(self) -> tuple[LabelledImages, LabelledImages]:
        """Read the training part and the test part; `fetch` the files that `find` does not find."""

    @property
    def folder(self) -> Path:
        """Folder of the published files."""
        return Path(self.root) if self.root else data_folder(self.cached_as)

    def find(self, *names: str) -> Path | None:
        """Return the first of these files that exists in `folder`."""
        return next((path for name in names if (path := self.folder / name).is_file()), None)

    def fetch(self, name: str) -> Path:
        """Download one of the files of `checksums`, but not into a folder that the user named: it never changes."""
        if self.root:
            raise UserError(
                f"'{self.root}' does not hold {self.wanted_files} (no {name}); `root` (--data.root) is the folder of "
                "these files. Without it they are downloaded."
            )
        return download(name, self.checksums[name], self.address, self.folder, self.wanted_files)

    def read(self) -> Source:
        """Read all images, the training part first. Raise a `UserError` if images, labels and classes do not fit."""
        train, test = self.parts()
        for name, (images, labels) in (("train", train), ("test", test)):
            if not len(images) or images.shape != (*labels.shape, *self.shape) or labels.max() >= len(self.classes):
                raise UserError(
                    f"The {name} files of '{self.folder}' do not fit together: (N, H, W, C) images of {self.shape} and "
                    f"(N,) labels below {len(self.classes)} are needed, got {images.shape} and {labels.shape} up to "
                    f"{labels.max(initial=0)}."
                )
        labels = np.concatenate([train.labels, test.labels])
        # A new array in C order: transposed parts would keep their strides.
        images = np.empty((len(labels), *self.shape), np.uint8)
        np.concatenate([train.images, test.images], out=images)
        splits = {"train": range(len(train.labels)), "test": range(len(train.labels), len(labels))}
        names = [f"{name}-{i:05d}" for name, split in splits.items() for i in range(len(split))]
        return Source(images, labels.tolist(), names, splits)


def read_file(path: Path | zipfile.Path) -> bytes:
    """Return the content of a file, decompressed if it is gzip. Raise a `UserError` if it is truncated."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path | zipfile.Path, error: Exception) -> UserError:
    return UserError(f"'{path}' cannot be read: {error}. It may be truncated; download it again.")
