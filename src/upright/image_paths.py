"""Find image files. One rule decides in training and in inference which files are images, without torch."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from upright.errors import UserError

SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")
"""First bytes of an image file with another suffix, or without one. TIFF is not among them, because camera raw files
begin like TIFF; nor is BMP, whose signature is two letters."""
CLUTTER = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"})
"""Names of files and folders that file managers and archives leave behind."""


class Listing(NamedTuple):
    """Files below a folder, sorted."""

    images: list[Path]  # image files
    others: list[Path]  # visible files that are no images


def list_files(folder: Path, *, recursive: bool = True) -> Listing:
    """List the files of a folder, and of its subfolders unless ``recursive`` is false.

    Hidden files and folders (their names begin with a dot) and `CLUTTER` are ignored. Links are followed; a folder that
    several links lead to counts once, so that a loop ends. A folder that cannot be read is a `UserError`.
    """
    # Without the parents, a link upwards would bring in the images of other classes.
    visited = {os.path.realpath(parent) for parent in (*folder.absolute().parents, *folder.resolve().parents)}
    listing = Listing([], [])
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(filter(_is_visible, folders)) if recursive else []
        for path in (Path(parent, name) for name in files if _is_visible(name)):
            (listing.images if _is_image(path) else listing.others).append(path)
    return Listing(sorted(listing.images), sorted(listing.others))


def list_folders(folder: Path) -> list[Path]:
    """List the visible folders in a folder, sorted, links included."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and _is_visible(path.name))
    except OSError as error:
        _raise(error)


def describe_others(others: Sequence[Path]) -> str:
    """Return a sentence about files that are no images."""
    counts = Counter(path.suffix.lower() or "no suffix" for path in others)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
    return f"{len(others)} files are not in a format that can be read ({kinds}), for example '{others[0]}'."


def find_images(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the image files for a list of files, folders and patterns, or raise a `UserError` if one has no images.

    A folder stands for all images of `list_files`. A pattern is a path that does not exist and contains ``*``, ``?`` or
    ``[``; ``**`` matches all folders.
    """
    for path in map(Path, paths):
        if path.is_dir():
            files, others = list_files(path)
            if not files:
                more = f" {describe_others(others)}" if others else ""
                raise UserError(f"Folder '{path}' holds no images ({' '.join(sorted(SUFFIXES))}).{more}")
        elif path.exists():
            files = [path]
        elif glob.has_magic(str(path)):
            files = [match for match in map(Path, sorted(glob.iglob(str(path), recursive=True))) if match.is_file()]
            if not files:
                raise UserError(f"'{path}' does not exist, and no file matches it as a pattern.")
        else:
            raise UserError(f"'{path}' does not exist.")
        yield from files


def _is_visible(name: str) -> bool:
    return name[0] != "." and name not in CLUTTER


def _is_image(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES:
        return path.is_file() or path.is_symlink()  # decoding names a dangling link
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(SIGNATURES) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def _raise(error: OSError) -> NoReturn:
    raise UserError(f"Folder '{error.filename}' cannot be read: {error.strerror}.") from None
