"""Your own images: one folder per class."""

import os
from pathlib import Path
from typing import NoReturn

from upright.data.download import absolute
from upright.data.image_files import ImageFiles, Row
from upright.data.split import SPLITS
from upright.errors import UserError
from upright.images import SUFFIXES


class Folder(ImageFiles):
    """``root/<class>/*``, or ``root/<split>/<class>/*`` for the splits train, val and test.

    Images may lie in subfolders. Links to files and folders are followed. Files and folders whose names begin with a
    dot are ignored.

    Args:
        root: the folder. A missing split is taken from the training images.
        **options: options of `ImageFiles`.
    """

    def __init__(self, *, root: str, **options: object) -> None:
        self.root = absolute(root)
        self.arguments["root"] = str(self.root)
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types

    @property
    def _split_folders(self) -> dict[str, Path]:
        """Folder of the classes by split, or ``root`` under an empty name if there are no splits."""
        if not self.root.is_dir():
            raise UserError(f"Folder '{self.root}' does not exist; `root` (--data.root) is the folder of classes.")
        folders = {name: self.root / name for name in SPLITS if (self.root / name).is_dir()}
        if folders and "train" not in folders:
            raise UserError(f"Folder '{self.root}' has {sorted(folders)} but no 'train'.")
        return folders or {"": self.root}

    def classes(self) -> tuple[str, ...]:
        """Return the names of the training folders, sorted."""
        training = self._split_folders.get("train", self.root)
        names = _class_names(training)
        if len(names) < 2:
            raise UserError(f"Folder '{training}' must hold at least two folders, one per class; found {len(names)}.")
        return tuple(names)

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        for split, folder in self._split_folders.items():
            first = len(rows)
            for name in _class_names(folder):
                place = f"'{folder / name}'"
                for path in _image_files(folder / name):
                    rows.append(Row(path, name, split, path.relative_to(self.root).as_posix(), place))
            if len(rows) == first:
                self.check_classes(split, set())
        return rows

    def where(self, split: str) -> str:
        return f"'{self.root / split}' ({' '.join(sorted(SUFFIXES))})"


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _image_files(folder: Path) -> list[Path]:
    """Return all images of a class, sorted. A folder that several links lead to counts once, so that a loop ends."""
    # Without the parents, a link upwards would bring in the images of other classes.
    visited = {os.path.realpath(parent) for parent in (*folder.parents, *folder.resolve().parents)}
    images: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        images += (Path(parent, name) for name in files if name[0] != "." and Path(name).suffix.lower() in SUFFIXES)
    return sorted(images)


def _raise(error: OSError) -> NoReturn:
    raise UserError(f"Folder '{error.filename}' cannot be read: {error.strerror}.") from None
