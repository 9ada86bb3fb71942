"""Folder of a run. One process at a time writes to it, and a replaced run is restored if the new one fails."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from upright.errors import UserError

ROOT = Path("checkpoints")
"""Default folder of all runs."""
SWEEP = "sweep.yaml"
"""File in a sweep's folder that describes the search."""


def is_first_process() -> bool:
    """Return True in the one of several processes that writes. It works before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


def is_sweep(folder: Path) -> bool:
    """Return True if `upright sweep` created the folder."""
    return (folder / SWEEP).is_file()


@contextmanager
def locked(path: Path, error: str | None = None) -> Iterator[None]:
    """Hold a lock, which one process at a time can hold. The system releases it when the process ends or is killed.

    If another process holds the lock, wait for it, or raise a `UserError` with the message ``error``.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=error is None)
    except Timeout:
        raise UserError(str(error)) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs, and delete the new folder of all runs if it stays empty."""
    if folder.parent.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder.parent))
    new = not folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    error = f"Run '{folder}' is running in another process: wait for it, stop it, or give this one another --name."
    try:
        with locked(folder.with_name(f".{folder.name}.running"), error):
            _restore_or_delete_old(folder)
            yield
    finally:
        if new:
            with suppress(OSError):
                folder.parent.rmdir()


@contextmanager
def replacing_run(folder: Path) -> Iterator[None]:
    """Move the existing run aside. If the new run writes no checkpoint, delete its folder and restore the old one."""
    try:
        if folder.exists():
            folder.rename(_backup(folder))
        yield
    finally:
        if not _has_checkpoint(folder):
            shutil.rmtree(folder, ignore_errors=True)
        _restore_or_delete_old(folder)


def _restore_or_delete_old(folder: Path) -> None:
    if not _backup(folder).exists():
        return
    if _has_checkpoint(folder):
        shutil.rmtree(_backup(folder), ignore_errors=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    _backup(folder).rename(folder)


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("*.ckpt"))
