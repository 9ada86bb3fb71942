"""Your own images: one folder per class."""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from upright.data.download import absolute
from upright.data.image_files import ImageFiles
from upright.data.resized import Row, class_name
from upright.data.split import split_of
from upright.errors import UserError
from upright.image_paths import SUFFIXES, Listing, describe_others, list_files, list_folders


class ImageFolder(NamedTuple):
    """A folder of images of one class in a split, and its files."""

    label: str
    split: str
    path: Path
    files: Listing


class Folder(ImageFiles):
    """``root/<class>/*``, or ``root/<split>/<class>/*`` for the splits train, val and test.

    Images may lie in subfolders. Links to files and folders are followed. Hidden files and folders (their names begin
    with a dot) are ignored. A split may have any name that `split_of` reads, such as ``Train`` or ``valid``.

    Args:
        root: the folder. A missing split is taken from the training images.
        **options: options of `ResizedImages`.
    """

    def __init__(self, *, root: str, **options: object) -> None:
        self.root = absolute(root)
        self.arguments["root"] = str(self.root)
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types

    @cached_property
    def _splits(self) -> dict[str, Path]:
        """Folder of the classes by split, or ``root`` under an empty name if there are no splits."""
        if not self.root.is_dir():
            raise UserError(f"Folder '{self.root}' does not exist; `root` (--data.root) is the folder of classes.")
        folders = list_folders(self.root)
        named = [folder for folder in folders if split_of(folder.name)]
        if not any(map(list_folders, named)):
            if named and named == folders:
                raise UserError(
                    f"Folder '{self.root}' has splits {_names(named)}, but no folder per class in them. "
                    "Put the images into folders of their classes, such as train/cat, or use a table "
                    "(upright.data.table.Table)."
                )
            return {"": self.root}
        splits: dict[str, Path] = {}
        for folder in named:
            split = split_of(folder.name)
            assert split
            if split in splits:
                raise UserError(
                    f"'{splits[split]}' and '{folder}' are both split '{split}'. Rename or merge one of them; the "
                    "splits are train, val and test."
                )
            splits[split] = folder
        if "train" not in splits:
            raise UserError(f"Folder '{self.root}' has {sorted(splits)} but no 'train'.")
        return splits

    @cached_property
    def _folders(self) -> list[ImageFolder]:
        return [
            ImageFolder(class_name(path.name), split, path, list_files(path))
            for split, folder in self._splits.items()
            for path in list_folders(folder)
        ]

    def classes(self) -> tuple[str, ...]:
        """Return the names of the training folders, sorted."""
        training = self._splits.get("train", self.root)
        names = sorted({class_name(folder.name) for folder in list_folders(training)})
        if len(names) < 2:
            raise UserError(
                f"Folder '{training}' must hold at least two folders, one per class; found {len(names)}"
                f"{f' ({names[0]})' if names else ''}. For pictures without classes: upright.data.pictures.Pictures "
                "(configs/orientation.yaml)."
            )
        return tuple(names)

    def rows(self) -> list[Row]:
        rows = [
            Row(folder.label, folder.split, path.relative_to(self.root).as_posix(), f"'{folder.path}'", path)
            for folder in self._folders
            for path in folder.files.images
        ]
        for split in self._splits.keys() - {row.split for row in rows}:
            self.check_classes(split, set())
        return rows

    def where(self, split: str) -> str:
        return f"'{self._splits.get(split, self.root)}' ({' '.join(sorted(SUFFIXES))})"

    def remarks_on_rows(self) -> list[str]:
        """Name the files and folders that are left out, and the folders that may not be classes."""
        remarks = []
        if others := [path for folder in self._folders for path in folder.files.others]:
            remarks.append(f"{describe_others(others)} They are left out.")
        used = [*self._splits.values()]
        if "" not in self._splits and (unused := [path for path in list_folders(self.root) if path not in used]):
            remarks.append(
                f"Folders {_names(unused)} in '{self.root}' are left out: their names are not those of splits "
                "(train, val, test)."
            )
        if "" in self._splits:
            folders = list_folders(self.root)
            remarks += [f"'{path}' is a class, because it holds no folders." for path in folders if split_of(path.name)]
            common = set.intersection(*({path.name for path in list_folders(folder)} for folder in folders))
            if len(common) > 1:
                remarks.append(
                    f"Folders {_names(folders)} are classes, and all hold the same folders {sorted(common)}. If they "
                    "are splits, rename them to train, val and test."
                )
        if loose := [path for folder in used for path in list_files(folder, recursive=False).images]:
            remarks.append(
                f"{len(loose)} images lie in no folder of a class and are left out, for example '{loose[0]}'."
            )
        return remarks


def _names(folders: list[Path]) -> str:
    return ", ".join(f"'{folder.name}'" for folder in folders)
