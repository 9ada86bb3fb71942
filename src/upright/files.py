"""Files and folders: checked before anything is done, and there whole or not at all.

What is written is written aside, synced, then renamed.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upright.errors import UserError, nearest


def file_hash(path: Path) -> str:
    """SHA-256 of a file: what is known of one holds for no other."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_exists(path: Path, give: str) -> None:
    """Refuse a path that is not there.

    Args:
        path: as it was given.
        give: what might be given.

    Raises:
        UserError: with the nearest name beside it.
    """
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UserError(f"'{path}' does not exist.{nearest(str(path), map(str, siblings))} Give {give}.")


def check_name(name: str) -> None:
    """A run and a bundle are named by a plain folder name.

    Raises:
        UserError: for anything else.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"--name '{name}' must be a plain folder name.")


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to, which takes its place at the end; on any error nothing changes."""
    # Always the same name: what a killed process left is overwritten, and does not pile up.
    aside = target.with_name(f".{target.name}.new")
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(target))
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        # A full disk does not say of itself where.
        error.filename = error.filename or str(target)
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Replace ``target`` by ``text``, in UTF-8."""
    with replacing_file(target) as aside:
        aside.write_text(text, encoding="utf-8")


def check_replaceable(target: Path, what: str, mark: str) -> None:
    """Refuse what is neither free, nor an empty folder, nor one of our own making.

    Args:
        target: to be replaced.
        what: it must be, with an article.
        mark: the file in it by which that is known.

    Raises:
        UserError: if it is something else.
    """
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"'{parent}' is a file, so that '{target}' cannot be made; give another place.")
    if target.exists() and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
        raise UserError(f"'{target}' is not {what} (it has no {mark}) and is not replaced; give another place.")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to fill, which takes its place at the end; on any error nothing changes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    if old.exists() and not target.exists():
        # A process was killed between the two renames.
        os.replace(old, target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(aside, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
