"""The base of the datasets that are pictures on disk: how they are seen, and a source that decodes when asked."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from upright.data.datamodule import ImageDataModule
from upright.data.source import Source
from upright.errors import UserError
from upright.images import ImageSpec, Pixels, Resize, decode


class Pictures(ImageDataModule):
    """Pictures of any sizes and formats, found by a subclass, which implements `spec`, `read` and `where`.

    Args:
        size: height and width that the network sees.
        channels: 1 (grey) or 3 (RGB).
        resize: ``stretch``, ``crop`` the largest centred square first, or ``none`` where all have ``size`` and the
            network takes any.
        background: grey level that transparent pixels are laid over.
        mean: subtracted, one number per channel or one for all, on the scale of 0 to 1.
        std: divided by, likewise.
        **options: see `ImageDataModule`.
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
        super().__init__(**options)  # type: ignore[arg-type]  # jsonargparse reads the base's own types
        self.size, self.channels, self.resize, self.background = size, channels, resize, background
        self.mean, self.std = (tuple(v) * channels if len(v) == 1 else tuple(v) for v in (mean, std))

    def spec_of(self, classes: tuple[str, ...]) -> ImageSpec:
        """What the options say, for these classes."""
        size = self.size
        return ImageSpec(
            self.channels, size, size, classes, self.mean, self.std, self.resize, background=self.background
        )

    def source_of(
        self, paths: Sequence[Path], labels: Sequence[int], names: Sequence[str], splits: Mapping[str, Sequence[int]]
    ) -> Source:
        """The source of these files, in this order.

        Args:
            paths: of the pictures.
            labels: index into the spec's classes.
            names: of the pictures, as people know them.
            splits: those that the user made; one under ``""`` that holds all is none.

        Raises:
            UserError: if a split lacks a class.
        """
        spec = self.spec
        for split, part in splits.items():
            found = {labels[i] for i in part}
            if empty := [name for label, name in enumerate(spec.classes) if label not in found]:
                raise UserError(f"No picture in class {empty} of {self.where(split)}.")
        return Source(_Decoded(paths, spec), labels, names, splits if "" not in splits else None, paths)

    @abstractmethod
    def where(self, split: str) -> str:
        """The split, as messages name it."""


class _Decoded(Sequence[Pixels]):
    """Pictures, decoded at every access."""

    def __init__(self, paths: Sequence[Path], spec: ImageSpec) -> None:
        self.paths, self.spec = paths, spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # one picture at a time is all that is asked for
        return decode(self.paths[index], self.spec)
