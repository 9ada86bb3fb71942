"""Your own pictures without classes, most of them upright: the data of the task "orientation"."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from upright.data.download import absolute
from upright.data.image_files import ImageFiles, Row
from upright.data.split import split_of
from upright.errors import UserError
from upright.image_paths import SUFFIXES, Listing, describe_others, list_files, list_folders
from upright.images import Resize


class Pictures(ImageFiles):
    """All images in a folder and its subfolders.

    If the folder has subfolders for the splits train and test or val, they are the splits. The names of all other
    folders mean nothing. Links are followed; hidden files and folders are ignored.

    Args:
        root: the folder.
        resize: ``crop`` or ``pad``; stretching would change the angles.
        **options: options of `ResizedImages`.
    """

    def __init__(self, *, root: str, resize: Resize = "crop", **options: object) -> None:
        self.root = absolute(root)
        self.arguments["root"] = str(self.root)
        super().__init__(resize=resize, **options)  # type: ignore[arg-type]  # the base's own types

    @cached_property
    def _splits(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise UserError(f"Folder '{self.root}' does not exist; `root` (--data.root) is the folder of the pictures.")
        splits = {split: folder for folder in list_folders(self.root) if (split := split_of(folder.name))}
        return splits if "train" in splits and len(splits) > 1 else {"": self.root}

    def classes(self) -> tuple[str, ...]:
        """Return no classes."""
        return ()

    @cached_property
    def _listings(self) -> dict[str, Listing]:
        return {split: list_files(folder) for split, folder in self._splits.items()}

    def rows(self) -> Sequence[Row]:
        rows = [
            Row(path, "", split, path.relative_to(self.root).as_posix(), f"'{self._splits[split]}'")
            for split, listing in self._listings.items()
            for path in listing.images
        ]
        if not rows:
            raise UserError(f"Folder '{self.root}' holds no image ({' '.join(sorted(SUFFIXES))}).")
        return rows

    def where(self, split: str) -> str:
        return f"'{self._splits.get(split, self.root)}'"

    def remarks_on_rows(self) -> list[str]:
        others = [path for listing in self._listings.values() for path in listing.others]
        return [f"{describe_others(others)} They are left out."] if others else []
