"""The base of datasets that are image files on disk."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from upright.data.datamodule import ImageDataModule
from upright.data.source import Source
from upright.errors import UserError
from upright.images import ImageSpec, Pixels, Resize, decode


class Pictures(ImageDataModule):
    """Images of any size and format. A subclass finds the files; it implements `spec`, `read` and `where`.

    Args:
        size: height and width of the network's input.
        channels: 1 (grey) or 3 (RGB).
        resize: ``stretch``, ``crop`` (the largest centred square first), or ``none``, if all images have ``size`` and
            the network takes any size.
        background: grey level under transparent pixels.
        mean: subtracted from the pixels, on the scale of 0 to 1: one number per channel, or one for all.
        std: divisor of the pixels, likewise.
        **options: options of `ImageDataModule`.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        channels: int = 3,
        resize: Resize = "stretch",
        background: int = 0,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        **options: object,
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types
        self.size, self.channels, self.resize, self.background = size, channels, resize, background
        self.mean, self.std = (tuple(v) * channels if len(v) == 1 else tuple(v) for v in (mean, std))

    def spec_of(self, classes: tuple[str, ...]) -> ImageSpec:
        """Return the spec of the options and ``classes``."""
        return ImageSpec(
            self.channels, self.size, self.size, classes, self.mean, self.std, self.resize, self.background
        )

    def source_of(
        self, paths: Sequence[Path], labels: Sequence[int], names: Sequence[str], splits: Mapping[str, Sequence[int]]
    ) -> Source:
        """Return the source of these files.

        Args:
            paths: the files.
            labels: indices into the spec's classes.
            names: names of the images, for messages.
            splits: indices of the user's splits, or of all images under an empty name if there are none.

        Raises:
            UserError: if a split lacks a class.
        """
        spec = self.spec
        for split, indices in splits.items():
            present = {labels[i] for i in indices}
            if empty := [name for label, name in enumerate(spec.classes) if label not in present]:
                raise UserError(f"No image in class {empty} of {self.where(split)}.")
        return Source(_Decoded(paths, spec), labels, names, splits if "" not in splits else None, paths)

    @abstractmethod
    def where(self, split: str) -> str:
        """Return the name of a split for messages."""


class _Decoded(Sequence[Pixels]):  # its name is part of the cache's key
    """Images, decoded at every access."""

    def __init__(self, paths: Sequence[Path], spec: ImageSpec) -> None:
        self.paths, self.spec = paths, spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # only one image at a time is used
        return decode(self.paths[index], self.spec)
