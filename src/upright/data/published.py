"""The base of the datasets that others publish: small pictures of one size, to train on and to test."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from upright.data.datamodule import ImageDataModule
from upright.data.download import absolute, cache, download
from upright.data.source import Source
from upright.errors import UserError

Bytes = npt.NDArray[np.uint8]


class Part(NamedTuple):
    """Images ``(N, H, W, C)`` and labels ``(N,)``, uint8, in the published order."""

    images: Bytes
    labels: Bytes


class Published(ImageDataModule):
    """A dataset whose files are in a folder of the user's, or downloaded once.

    A subclass declares what is published, and implements `spec`, `prepare_data` and `parts`.

    Args:
        root: folder of the published files. By default the dataset's own in ``$UPRIGHT_DATA``, or in the user's cache
            where that variable is not set; what is not there is downloaded once, and its MD5 checked.
        val_fraction: of the training images, for validation.
        **options: see `ImageDataModule`.
    """

    cached_as: ClassVar[str]
    """The folder's name in the cache."""
    checksums: ClassVar[dict[str, str]]
    """What is downloaded: names, and the MD5 of each."""
    mirrors: ClassVar[tuple[str, ...]]
    """Addresses of the folders that hold them."""
    what: ClassVar[str]
    """What `root` may hold, for messages."""

    def __init__(self, *, root: str | None = None, val_fraction: float = 0.1, **options: object) -> None:
        if root is not None:
            root = self.arguments["root"] = str(absolute(root))
        super().__init__(val_fraction=val_fraction, **options)  # type: ignore[arg-type]  # the base's own types
        self.root = root

    @abstractmethod
    def prepare_data(self) -> None:
        """Download what is not there; Lightning calls it in one process."""

    @abstractmethod
    def parts(self) -> tuple[Part, Part]:
        """What to train on, and what to test on."""

    @property
    def folder(self) -> Path:
        """Where the files are, or will be."""
        return Path(self.root) if self.root else cache(self.cached_as)

    def find(self, *names: str) -> Path | None:
        """The first of these that is a file in `folder`."""
        return next((path for name in names if (path := self.folder / name).is_file()), None)

    def fetch(self, name: str) -> Path:
        """One of the files of `checksums`, downloaded.

        Raises:
            UserError: if the user named a folder, which is left as it is, or the download fails.
        """
        if self.root:
            raise UserError(
                f"'{self.root}' does not hold {self.what} (no {name}); `root` (--data.root) is the folder of these "
                "files. Without it they are downloaded."
            )
        return download(name, self.checksums[name], self.mirrors, self.folder, self.what)

    def read(self) -> Source:
        """All images, those to train on before those to test on.

        Raises:
            UserError: if images and labels do not fit together, or not to the classes.
        """
        spec = self.spec
        shape = (*self.stored_size, spec.channels)
        parts = dict(zip(("train", "test"), self.parts(), strict=True))
        for name, (images, labels) in parts.items():
            if not len(images) or images.shape != (*labels.shape, *shape) or labels.max() >= len(spec.classes):
                raise UserError(
                    f"The {name} files of '{self.folder}' do not fit together: (N, H, W, C) images of {shape} and (N,) "
                    f"labels below {len(spec.classes)} are needed, got {images.shape} and {labels.shape} up to "
                    f"{labels.max(initial=0)}."
                )
        labels = np.concatenate([part.labels for part in parts.values()])
        # Into an array of its own: what was turned upright on the way keeps its odd strides otherwise.
        images = np.empty((len(labels), *shape), np.uint8)
        np.concatenate([part.images for part in parts.values()], out=images)
        names = [f"{name}-{i:05d}" for name, part in parts.items() for i in range(len(part.labels))]
        count = len(parts["train"].labels)
        splits = {"train": range(count), "test": range(count, len(labels))}
        return Source(images, labels.tolist(), names, splits)
