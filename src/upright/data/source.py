"""`Source`, which a dataset returns: images, labels, names, and the splits that the dataset defines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from upright.images import Pixels

Images = Sequence[Pixels] | Pixels
"""Images, each uint8 ``(H, W, C)``; a lazy sequence decodes one on access, with an `UprightError` if that fails."""


@dataclass(frozen=True)
class Source:
    """The images of a dataset.

    Args:
        images: decoded images, uint8 ``(H, W, C)``; their sizes may differ.
        labels: indices into the classes of the spec; 0 and 1 ``(N, K)`` if an image has several classes.
        names: short unique names, for messages and files.
        splits: indices of ``train``, ``val`` and ``test``, if the dataset defines some of them.
        files: the file of each image; ``None`` if they have no files of their own.
        fingerprint: identifies the content of lazy images that have no files of their own. With neither ``files`` nor
            ``fingerprint`` the images are in memory.
        remarks: sentences for the user about the dataset.
    """

    images: Images
    labels: Sequence[int] | npt.NDArray[np.int64]
    names: Sequence[str]
    splits: Mapping[str, Sequence[int]] | None = None
    files: Sequence[Path] | None = None
    remarks: Sequence[str] = ()
    fingerprint: str | None = None

    @property
    def lazy(self) -> bool:
        """True if images are decoded on access, false if they are in memory."""
        return self.files is not None or self.fingerprint is not None


class Original(NamedTuple):
    """One image as a deployed model gets it: uint8 ``(H, W, C)``, not resized."""

    name: str
    pixels: Pixels
    label: Any
    """Index of the class; with several classes, 0 or 1 for each."""
