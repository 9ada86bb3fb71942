"""What a dataset gives: pictures, labels, names, and the splits that it defines itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from upright.images import Pixels


class Images(Protocol):
    """A list of pictures, an array ``(N, H, W, C)``, or what decodes a file at every access."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> Pixels:
        """One, uint8 ``(H, W, C)``; raises `UprightError`, naming the file, if it cannot be decoded."""


@dataclass(frozen=True)
class Source:
    """A dataset as it comes.

    Args:
        images: decoded, uint8 ``(H, W, C)``, each of its own size.
        labels: index into the spec's classes.
        names: short, unique; for messages and files.
        splits: indices of ``train``, ``val`` and ``test`` where the dataset itself defines some of them.
        files: that the images are read from, one each; none where they are in memory.
    """

    images: Images
    labels: Sequence[int]
    names: Sequence[str]
    splits: Mapping[str, Sequence[int]] | None = None
    files: Sequence[Path] | None = None


class Original(NamedTuple):
    """One image as it goes into a deployed model: uint8 ``(H, W, C)`` at its own size."""

    name: str
    pixels: Pixels
    label: int
