"""Your own images: one folder per class."""

import os
from pathlib import Path
from typing import NoReturn

from upright.data.download import absolute
from upright.data.pictures import Pictures
from upright.data.source import Source
from upright.data.split import SPLITS
from upright.errors import UserError
from upright.images import SUFFIXES, ImageSpec


class Folder(Pictures):
    """``root/<class>/*``, or ``root/<split>/<class>/*`` for the splits train, val and test.

    Images may lie in subfolders. Links to files and folders are followed. Files and folders whose names begin with a
    dot are ignored.

    Args:
        root: the folder. A missing split is taken from the training images.
        **options: options of `Pictures`.
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

    @property
    def spec(self) -> ImageSpec:
        """Classes are the names of the folders, sorted."""
        training = self._split_folders.get("train", self.root)
        classes = tuple(_classes(training))
        if len(classes) < 2:
            raise UserError(f"Folder '{training}' must hold at least two folders, one per class; found {len(classes)}.")
        return self.spec_of(classes)

    def read(self) -> Source:
        classes = self.spec.classes
        paths: list[Path] = []
        labels: list[int] = []
        splits: dict[str, range] = {}
        for split, folder in self._split_folders.items():
            first = len(paths)
            for name in _classes(folder):
                if not (files := _image_files(folder / name)):
                    continue
                if name not in classes:
                    raise UserError(f"Class '{name}' of '{folder}' is not among the training classes {classes}.")
                paths += files
                labels += [classes.index(name)] * len(files)
            splits[split] = range(first, len(paths))
        names = [path.relative_to(self.root).as_posix() for path in paths]
        return self.source_of(paths, labels, names, splits)

    def where(self, split: str) -> str:
        return f"'{self.root / split}' ({' '.join(sorted(SUFFIXES))})"


def _classes(folder: Path) -> list[str]:
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
