"""The base of datasets that are image files on disk."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from upright.data.resized import ResizedImages, Row
from upright.data.source import Source
from upright.images import ImageSpec, Pixels, decode


class ImageFiles(ResizedImages):
    """Images of any size and format in files. A subclass finds them; it implements `classes`, `rows` and `where`.

    Args:
        **options: options of `ResizedImages`.
    """

    @abstractmethod
    def rows(self) -> Sequence[Row]:
        """Find all images."""

    def read(self) -> Source:
        rows = self.rows()
        paths = [row.path for row in rows]
        images = _Files(paths, self.spec, self.max_pixels)
        return self.arrange(rows, images, files=paths, remarks=self.remarks_on_rows())

    def remarks_on_rows(self) -> list[str]:
        """Return sentences for the user about the files, for example about those that are left out."""
        return []


class _Files(Sequence[Pixels]):  # its name is part of the cache's key
    """Images that are decoded at every access."""

    def __init__(self, paths: Sequence[Path], spec: ImageSpec, max_pixels: int) -> None:
        self.paths, self.spec, self.max_pixels = paths, spec, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # only one image at a time is used
        return decode(self.paths[index], self.spec, self.max_pixels)
