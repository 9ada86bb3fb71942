"""Check and replace files and folders. A replacement is complete, or it does not happen.

New content is written beside its target, synced, then renamed.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path

from upright.errors import UserError, nearest


def cache_folder() -> Path:
    """Return the folder of downloads, ``$UPRIGHT_CACHE`` or ``~/.cache/upright``. It may be deleted at any time."""
    try:
        return Path(os.environ.get("UPRIGHT_CACHE") or "~/.cache/upright").expanduser()
    except RuntimeError:
        raise UserError("This user has no home folder for downloads; set UPRIGHT_CACHE to a folder.") from None


def file_hash(path: Traversable) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto


def check_exists(path: Path, expected: str) -> None:
    """Raise a `UserError` if ``path`` does not exist, with the nearest name and what is ``expected`` instead."""
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UserError(f"'{path}' does not exist.{nearest(str(path), map(str, siblings))} Give {expected}.")


def check_name(name: str) -> None:
    """Raise a `UserError` if ``name`` cannot be the name of a run or a bundle."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"--name '{name}' must be a plain folder name.")


def check_replaceable(target: Path, kind: str, mark: str) -> None:
    """Raise a `UserError` unless ``target`` is free, an empty folder, or a folder that Upright wrote.

    ``kind`` names such a folder, with an article, and ``mark`` is a file that every one of them holds.
    """
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"'{parent}' is a file, so '{target}' cannot be created; give another path.")
    if target.exists() and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
        raise UserError(f"'{target}' is not {kind} (it has no {mark}), so it is not replaced; give another path.")


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to, and rename it to ``target`` at the end. After an error ``target`` is unchanged."""
    # The name is always the same, so the next process overwrites the file of a killed one.
    new = target.with_name(f".{target.name}.new")
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(target))
    try:
        yield new
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, target)
    except OSError as error:
        # The error of a full disk names no file.
        error.filename = error.filename or str(target)
        raise
    finally:
        new.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Replace the content of ``target`` by ``text``, in UTF-8."""
    with replacing_file(target) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, and rename it to ``target`` at the end. After an error ``target`` is unchanged."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))

    def restore_old() -> None:
        if old.exists() and not target.exists():
            os.replace(old, target)

    restore_old()  # a process was killed between the two renames
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(new, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        restore_old()
        shutil.rmtree(new, ignore_errors=True)
