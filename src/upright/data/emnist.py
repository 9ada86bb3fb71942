"""EMNIST: handwritten letters and digits in six arrangements, in one archive."""

import zipfile
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import ClassVar, Literal, get_args

from upright.data.mnist import IDX
from upright.data.published import LabelledImages, unreadable
from upright.errors import UserError

Arrangement = Literal["letters", "balanced", "byclass", "bymerge", "digits", "mnist"]

# Upper and lower case are one class if they look alike.
MERGED = (*digits, *ascii_uppercase, *"abdefghnqrt")
CLASSES: dict[str, tuple[str, ...]] = {
    "letters": tuple(ascii_uppercase),
    "balanced": MERGED,
    "byclass": (*digits, *ascii_uppercase, *ascii_lowercase),
    "bymerge": MERGED,
    "digits": tuple(digits),
    "mnist": tuple(digits),
}
ARCHIVE = "gzip.zip"


class EMNIST(IDX):
    """Handwritten characters of NIST's Special Database 19, 28 x 28 grey (Cohen, Afshar, Tapson, van Schaik 2017).

    Args:
        split: the arrangement, each with a training and a test part.
            ``letters``: 145,600 images of 26 classes, upper and lower case merged;
            ``balanced``: 131,600 of 47, the same number of each; ``byclass``: all 814,255 of 62;
            ``bymerge``: all of 47; ``digits``: 280,000 of 10; ``mnist``: 70,000 of 10.
        root: folder of the published ``gzip.zip``, or of the IDX files in it (with or without ``.gz``, also in
            ``gzip/``). By default the archive is downloaded once (560 MB) to ``$UPRIGHT_DATA/emnist``, or to the
            user's cache if that variable is not set, and its MD5 is checked.
        **options: options of `Published`.
    """

    cached_as = "emnist"
    # One pair for all arrangements, which differ little.
    mean, std = (0.1722,), (0.3309,)
    address = "https://biometrics.nist.gov/cs_links/EMNIST"
    checksums: ClassVar = {ARCHIVE: "58c8d27c78d21e728a6bc7b3cc06412e"}
    wanted_files = f"{ARCHIVE} or the IDX files in it"

    def __init__(self, *, split: Arrangement = "letters", root: str | None = None, **options: object) -> None:
        if split not in get_args(Arrangement):
            raise UserError(f"split must be one of {', '.join(get_args(Arrangement))}; got '{split}'.")
        super().__init__(root=root, **options)  # type: ignore[arg-type]  # the base's own types
        self.classes = CLASSES[split]
        self.stems = (f"emnist-{split}-train", f"emnist-{split}-test")
        self.first_label = 1 if split == "letters" else 0

    def file(self, name: str) -> Path | zipfile.Path:
        if unpacked := self.find(*(f"{folder}{name}{suffix}" for folder in ("", "gzip/") for suffix in ("", ".gz"))):
            return unpacked
        archive = self.find(ARCHIVE) or self.fetch(ARCHIVE)
        try:
            member = zipfile.Path(archive, f"gzip/{name}.gz")
        except (OSError, zipfile.BadZipFile) as error:
            raise unreadable(archive, error) from None
        if not member.is_file():
            raise UserError(f"'{archive}' holds no gzip/{name}.gz: it is not the published archive of EMNIST.")
        return member

    def part(self, stem: str) -> LabelledImages:
        images, labels = super().part(stem)
        if images.ndim == 4:  # the files store columns before rows
            images = images.swapaxes(1, 2)
        # uint8: a 0 among labels that start at 1 becomes 255, which `read` refuses.
        return LabelledImages(images, labels - self.first_label)
