"""Your own pictures: one folder per class."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from upright.data.datamodule import ImageDataModule
from upright.data.source import Source
from upright.data.split import SPLITS
from upright.errors import UprightError
from upright.images import SUFFIXES, ImageSpec, Pixels, Resize, decode


class Folder(ImageDataModule):
    """``root/<class>/*``, split by us; or ``root/<split>/<class>/*`` for the splits train, val and test.

    Files and folders whose names begin with a dot do not count.

    Args:
        root: the folder. A split that it lacks is split off the training images.
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
        root: str,
        size: int = 32,
        channels: int = 3,
        resize: Resize = "stretch",
        background: int = 0,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        **options: object,
    ) -> None:
        self.root = Path(root).expanduser().resolve()
        # A checkpoint is used from any working directory.
        self.arguments["root"] = str(self.root)
        super().__init__(**options)  # type: ignore[arg-type]  # jsonargparse reads the base's own types
        self.size, self.channels, self.resize, self.background = size, channels, resize, background
        self.mean, self.std = (tuple(v) * channels if len(v) == 1 else tuple(v) for v in (mean, std))

    @property
    def _class_folders(self) -> dict[str, Path]:
        """By split (or under ``""`` when there are none), the folder that holds the classes."""
        if not self.root.is_dir():
            raise UprightError(f"Folder '{self.root}' does not exist; `root` (--data.root) is the folder of classes.")
        given = {name: self.root / name for name in SPLITS if (self.root / name).is_dir()}
        if given and "train" not in given:
            raise UprightError(f"Folder '{self.root}' has {sorted(given)} but no 'train'.")
        return given or {"": self.root}

    @property
    def spec(self) -> ImageSpec:
        """Classes are the names of the folders, sorted."""
        training = self._class_folders.get("train", self.root)
        classes = tuple(sorted(path.name for path in training.iterdir() if path.is_dir() and path.name[0] != "."))
        if len(classes) < 2:
            raise UprightError(
                f"Folder '{training}' must hold at least two folders, one per class; found {len(classes)}."
            )
        size = self.size
        return ImageSpec(
            self.channels, size, size, classes, self.mean, self.std, self.resize, background=self.background
        )

    def read(self) -> Source:
        """Find all pictures; they are decoded when they are needed."""
        spec = self.spec
        paths: list[Path] = []
        labels: list[int] = []
        splits: dict[str, range] = {}
        for split, folder in self._class_folders.items():
            first = len(paths)
            for path in _pictures(folder):
                name = path.relative_to(folder).parts[0]
                if name not in spec.classes:
                    raise UprightError(
                        f"Class '{name}' of '{folder}' is not among the training classes {spec.classes}."
                    )
                paths.append(path)
                labels.append(spec.classes.index(name))
            splits[split] = range(first, len(paths))
        for split, part in splits.items():
            found = {labels[i] for i in part}
            if empty := [name for label, name in enumerate(spec.classes) if label not in found]:
                where = self.root / split
                raise UprightError(f"No picture in class {empty} of '{where}' ({' '.join(sorted(SUFFIXES))}).")
        names = [path.relative_to(self.root).as_posix() for path in paths]
        return Source(_Decoded(paths, spec), labels, names, splits if "" not in splits else None, paths)


class _Decoded(Sequence[Pixels]):
    """Pictures, decoded at every access."""

    def __init__(self, paths: list[Path], spec: ImageSpec) -> None:
        self.paths, self.spec = paths, spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # one picture at a time is all that is asked for
        return decode(self.paths[index], self.spec)


def _pictures(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.glob("*/**/*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            yield path
