"""Your own pictures: one folder per class."""

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
    """``root/<class>/*``, split by us; or ``root/<split>/<class>/*`` for the splits train, val and test.

    Pictures may lie deeper; links to files and folders are followed. Files and folders whose names begin with a dot
    do not count.

    Args:
        root: the folder. A split that it lacks is split off the training images.
        **options: see `Pictures`.
    """

    def __init__(self, *, root: str, **options: object) -> None:
        self.root = absolute(root)
        self.arguments["root"] = str(self.root)
        super().__init__(**options)  # type: ignore[arg-type]  # jsonargparse reads the base's own types

    @property
    def _class_folders(self) -> dict[str, Path]:
        """By split (or under ``""`` when there are none), the folder that holds the classes."""
        if not self.root.is_dir():
            raise UserError(f"Folder '{self.root}' does not exist; `root` (--data.root) is the folder of classes.")
        given = {name: self.root / name for name in SPLITS if (self.root / name).is_dir()}
        if given and "train" not in given:
            raise UserError(f"Folder '{self.root}' has {sorted(given)} but no 'train'.")
        return given or {"": self.root}

    @property
    def spec(self) -> ImageSpec:
        """Classes are the names of the folders, sorted."""
        training = self._class_folders.get("train", self.root)
        classes = tuple(_classes(training))
        if len(classes) < 2:
            raise UserError(f"Folder '{training}' must hold at least two folders, one per class; found {len(classes)}.")
        return self.spec_of(classes)

    def read(self) -> Source:
        """Find all pictures; they are decoded when they are needed."""
        classes = self.spec.classes
        paths: list[Path] = []
        labels: list[int] = []
        splits: dict[str, range] = {}
        for split, folder in self._class_folders.items():
            first = len(paths)
            for name in _classes(folder):
                if not (found := _pictures(folder / name)):
                    continue
                if name not in classes:
                    raise UserError(f"Class '{name}' of '{folder}' is not among the training classes {classes}.")
                paths += found
                labels += [classes.index(name)] * len(found)
            splits[split] = range(first, len(paths))
        names = [path.relative_to(self.root).as_posix() for path in paths]
        return self.source_of(paths, labels, names, splits)

    def where(self, split: str) -> str:
        """The folder, and what counts as a picture."""
        return f"'{self.root / split}' ({' '.join(sorted(SUFFIXES))})"


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _pictures(folder: Path) -> list[Path]:
    """All under one class, sorted; a real folder counts once, by whatever links it is reached, so that a loop ends."""
    # A link back up would bring the other classes' pictures into this one.
    seen = {os.path.realpath(parent) for parent in (*folder.parents, *folder.resolve().parents)}
    found: list[Path] = []
    for here, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += (Path(here, name) for name in files if name[0] != "." and Path(name).suffix.lower() in SUFFIXES)
    return sorted(found)


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"Folder '{error.filename}' cannot be read: {error.strerror}.") from None
