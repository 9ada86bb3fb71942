"""Your own pictures without classes, most of them upright: the data of the task "orientation"."""

from functools import cached_property
from pathlib import Path

from upright.data.folder import Folder, ImageFolder
from upright.data.resized import Row
from upright.data.split import split_of
from upright.errors import UserError
from upright.image_paths import SUFFIXES, describe_others, list_files, list_folders
from upright.images import Resize


class Pictures(Folder):
    """All images in a folder and its subfolders.

    If the folder has subfolders for the splits train and test or val, they are the splits. The names of all other
    folders mean nothing. Links are followed; hidden files and folders are ignored.

    Args:
        root: the folder.
        resize: ``crop`` or ``pad``; stretching would change the angles.
        **options: options of `ResizedImages`.
    """

    def __init__(self, *, root: str, resize: Resize = "crop", **options: object) -> None:
        super().__init__(root=root, resize=resize, **options)

    @cached_property
    def _splits(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise UserError(f"Folder '{self.root}' does not exist; `root` (--data.root) is the folder of the pictures.")
        splits = {split: folder for folder in list_folders(self.root) if (split := split_of(folder.name))}
        return splits if "train" in splits and len(splits) > 1 else {"": self.root}

    @cached_property
    def _folders(self) -> list[ImageFolder]:
        return [ImageFolder("", split, path, list_files(path)) for split, path in self._splits.items()]

    def classes(self) -> tuple[str, ...]:
        """Return no classes."""
        return ()

    def rows(self) -> list[Row]:
        if not (rows := super().rows()):
            raise UserError(f"Folder '{self.root}' holds no image ({' '.join(sorted(SUFFIXES))}).")
        return rows

    def remarks_on_rows(self) -> list[str]:
        others = [path for folder in self._folders for path in folder.files.others]
        return [f"{describe_others(others)} They are left out."] if others else []
